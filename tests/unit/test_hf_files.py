"""Headers are read strictly, a failure while writing leaves the old files, hashes see every byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_mopd.student.hf_files import (
    INDEX,
    SINGLE,
    TensorReader,
    TensorSpec,
    content_hash,
    read_headers,
    write_model,
)
from megatron_mopd.yaml_config import ConfigError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(5, dtype=torch.float32).to(torch.bfloat16),
    "c": torch.full((2, 2), 0.5, dtype=torch.float16),
}


def _specs(tensors: dict[str, Tensor] = TENSORS) -> list[TensorSpec]:
    return [TensorSpec(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()]


def _write(folder: Path, max_shard_bytes: int = 1 << 20) -> None:
    write_model(folder, _specs(), iter(TENSORS.items()), max_shard_bytes)


def _fails(folder: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        read_headers(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("max_bytes", "files"), [(1 << 20, 1), (60, 2), (1, 3)])
def test_written_files_are_read_by_the_safetensors_library(tmp_path: Path, max_bytes: int, files: int) -> None:
    _write(tmp_path, max_bytes)
    found = sorted(tmp_path.glob("*.safetensors"))
    assert len(found) == files
    assert (tmp_path / INDEX).exists() == (files > 1)
    read = {name: tensor for file in found for name, tensor in load_file(file).items()}
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert {name: stored.shape for name, stored in read_headers(tmp_path).items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }


def test_a_slice_is_read(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    with TensorReader(read_headers(tmp_path)) as reader:
        assert reader["a"][1:3, :].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
        assert reader["a"][:, 2:4].tolist() == [[2, 3], [6, 7], [10, 11]]


def test_hash_is_of_the_contents_not_of_the_files(tmp_path: Path) -> None:
    _write(tmp_path / "one")
    _write(tmp_path / "many", 1)
    save_file(dict(reversed(TENSORS.items())), tmp_path / "one" / "other.safetensors")
    (tmp_path / "library").mkdir()
    (tmp_path / "one" / "other.safetensors").rename(tmp_path / "library" / SINGLE)
    hashes = {content_hash(tmp_path / name) for name in ("one", "many", "library")}
    assert len(hashes) == 1
    path = tmp_path / "one" / SINGLE
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert content_hash(tmp_path / "one") not in hashes


def test_a_truncated_file(tmp_path: Path) -> None:
    _write(tmp_path)
    path = tmp_path / SINGLE
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    _fails(
        tmp_path,
        rf"{re.escape(str(path))}: {len(data) - 3} bytes, but its header describes {len(data)}; .*again",
    )
    path.write_bytes(data[:20])
    _fails(tmp_path, f"{SINGLE}: 20 bytes, too short for its header")
    path.write_bytes(b"")
    _fails(tmp_path, f"{SINGLE}: 0 bytes, too short for its header")


def _with_header(path: Path, header: str, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)


@pytest.mark.parametrize(
    ("header", "size", "pattern"),
    [
        ("{not json", 0, "not a safetensors header"),
        ("[1]", 0, "not a safetensors header"),
        ('{"a":{"dtype":"F32"}}', 0, "not a safetensors header"),
        ('{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', 4, "'a' is F8_E4M3.*unquantised"),
        ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', 4, "'a' has 4 bytes, its shape needs 16"),
        ('{"a":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}}', 8, "'a' overlap or leave a gap"),
    ],
)
def test_a_corrupt_header(tmp_path: Path, header: str, size: int, pattern: str) -> None:
    _with_header(tmp_path / SINGLE, header, bytes(size))
    _fails(tmp_path, rf"{SINGLE}: .*{pattern}")


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    _fails(tmp_path, f"neither {SINGLE} nor {INDEX}")
    torch.save(TENSORS, tmp_path / SINGLE)
    _fails(tmp_path, f"{SINGLE}: .*header")


def _index(folder: Path, change: dict[str, str]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= change
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_does_not_fit_the_files(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    _index(tmp_path, {"a": second})
    _fails(tmp_path, f"{INDEX}: places tensor 'a' in {second}, which lacks it")
    _index(tmp_path, {"a": first, "b": first})
    _fails(tmp_path, "lacks it|holds 'b'")
    _index(tmp_path, {"a": "../evil.safetensors"})
    _fails(tmp_path, f"{INDEX}: tensor 'a' is in '../evil.safetensors'")
    _index(tmp_path, {"a": first, "b": second})
    (tmp_path / second).unlink()
    _fails(tmp_path, f"{INDEX}: names {second}, which is not there")
    (tmp_path / INDEX).write_text('{"weight_map": {')
    _fails(tmp_path, f"{INDEX}: not valid JSON")
    (tmp_path / INDEX).write_text("{}")
    _fails(tmp_path, f"{INDEX}: has no 'weight_map'")


def test_a_failure_while_writing_leaves_the_old_model(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(3, 4)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_model(tmp_path, _specs(), breaks_off(), 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_model_replaces_files_of_another_sharding(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("kept")
    _write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SINGLE, "notes.txt"]
    _write(tmp_path, 60)
    assert len(read_headers(tmp_path)) == 3
    assert not (tmp_path / SINGLE).exists()


def test_tensors_other_than_announced_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got b \(5,\), expected a \(3, 4\)"):
        write_model(tmp_path, _specs(), iter(list(TENSORS.items())[1:]))
    with pytest.raises(ValueError, match="'c' comes after the last"):
        write_model(tmp_path, _specs()[:2], iter(TENSORS.items()))
    assert list(tmp_path.iterdir()) == []

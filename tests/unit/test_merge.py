"""A merged checkpoint is what a plain float64 computation of whole tensors gives, bit for bit, and appears whole."""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mopd.cli import main
from megatron_mopd.merge import MergeConfig, bench, merge
from megatron_mopd.merge.run import run_merge
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.student.hf_files import INDEX, content_hash, read_headers
from megatron_mopd.student.weights import check_hf
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.yaml_config import ConfigError
from tests.unit.merge_models import load, plain_merge, write_checkpoint

METHODS = {
    "average": {},
    "average, weighted": {"weights": {"a": 1.0, "b": 2.5, "c": 0.3}},
    "task_arithmetic": {"scaling": 0.4},
    "task_arithmetic, weighted": {"weights": {"a": 1.0, "b": 2.5, "c": 0.3}},
    "ties": {"density": 0.2},
    "ties, weighted": {"density": 0.35, "scaling": 1.3, "weights": {"a": 1.0, "b": 2.5, "c": 0.3}},
    "dare": {"density": 0.3, "scaling": 0.7, "seed": 5},
    "dare_ties": {"density": 0.5, "seed": 5},
    "sce": {"density": 0.1},
    "sce, all": {"density": 1.0, "scaling": 0.9},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models of it, each in other files."""
    folder = tmp_path_factory.mktemp("merge")
    base = write_checkpoint(folder / "base", 0, shard_bytes=2000)
    for seed, name in enumerate("abc", start=1):
        write_checkpoint(folder / name, seed, base=base, shard_bytes=1500 * seed)
    assert len(list(folder.rglob("*.safetensors"))) > 12
    return folder


def config_of(folder: Path, out: Path, method: str = "task_arithmetic", **keys: object) -> MergeConfig:
    models = {name: str(folder / name) for name in "abc"}
    return MergeConfig(out=str(out), base=str(folder / "base"), models=models, method=method, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("slice_values", [1 << 20, 100])
def test_bit_equal_to_plain_float64(case: str, slice_values: int, folder: Path, tmp_path: Path) -> None:
    """The slices of 25 elements also take TIES and SCE through several passes."""
    config = config_of(folder, tmp_path / "out", case.split(",")[0], **METHODS[case])
    run_merge(config, slice_values=slice_values)
    merged, plain, base = load(tmp_path / "out"), plain_merge(config), load(folder / "base")
    assert merged.keys() == plain.keys()
    for name, tensor in plain.items():
        assert merged[name].dtype == torch.bfloat16
        assert torch.equal(merged[name].view(torch.int16), tensor.view(torch.int16)), name
    assert sum(not torch.equal(merged[name], base[name]) for name in base) > 10


@pytest.mark.parametrize("method", ["ties", "dare_ties", "sce"])
def test_files_and_slices_do_not_matter(method: str, folder: Path, tmp_path: Path) -> None:
    """In float32, where a different order of operations would show."""
    hashes = set()
    for number, (shard_bytes, slice_values) in enumerate([(1 << 30, 1 << 20), (3000, 50), (1, 999)]):
        config = config_of(folder, tmp_path / str(number), method, density=0.3, dtype="float32")
        hashes.add(content_hash(run_merge(config, max_shard_bytes=shard_bytes, slice_values=slice_values)))
    assert len(hashes) == 1


def test_what_dare_drops_depends_on_the_name_not_on_the_order(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "abc", "dare", density=0.3, dtype="float32")
    backwards = dataclasses.replace(config, out=str(tmp_path / "cba"), models=dict(reversed(config.models.items())))
    renamed = dataclasses.replace(
        config, out=str(tmp_path / "xbc"), models={"x": config.models["a"], **{k: config.models[k] for k in "bc"}}
    )
    reseeded = dataclasses.replace(config, out=str(tmp_path / "seed"), seed=1)
    first, second, third, fourth = (load(merge(c)) for c in (config, backwards, renamed, reseeded))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-6, atol=1e-9)
    for other in (third, fourth):
        assert sum(torch.equal(other[name], tensor) for name, tensor in first.items()) < len(first) / 2


def test_the_folder(folder: Path, tmp_path: Path) -> None:
    """Files of limited size, an index, config and tokenizer of the base, and the record; the parts fit each other."""
    config = config_of(folder, tmp_path / "new" / "out", "ties", density=0.25)
    out = run_merge(config, max_shard_bytes=4000)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 5
    large = max(t.end - t.begin for t in read_headers(out).values())
    assert all(path.stat().st_size < max(4000, large) + 2000 for path in shards)
    assert len(json.loads((out / INDEX).read_text())["weight_map"]) == len(read_headers(folder / "base"))
    arch = read_architecture(out)
    assert arch == read_architecture(folder / "base")
    check_hf(arch, out, "out")
    assert Tokenizer.load(out).fingerprint == Tokenizer.load(folder / "base").fingerprint
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    record = json.loads((out / "merge.json").read_text())
    assert record["method"] == "ties"
    assert record["weights"] == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert record["models"]["b"] == {"checkpoint": str(folder / "b"), "content": content_hash(folder / "b")}
    assert record["base"]["content"] == content_hash(folder / "base")
    # Half of the elements differ from the base at all; equal magnitudes make a little more than the quarter.
    assert all(0.25 <= share < 0.3 for share in record["kept"].values()), record["kept"]


def test_average_needs_no_base_and_float32_is_written(folder: Path, tmp_path: Path) -> None:
    config = MergeConfig(
        out=str(tmp_path / "out"), models={n: str(folder / n) for n in "ab"}, method="average", dtype="float32"
    )
    merged, a, b = load(merge(config)), load(folder / "a"), load(folder / "b")
    for name, tensor in merged.items():
        assert torch.equal(tensor, ((a[name].double() + b[name].double()) / 2).float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_second_call_does_nothing(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = config_of(folder, tmp_path / "out")
    run_merge(config)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").iterdir()}
    assert run_merge(config, say=said.append) == tmp_path / "out"
    assert said[-1] == f"{tmp_path / 'out'} holds this merge already: nothing to do"
    # The same weights in another place are the same merge.
    moved = write_checkpoint(tmp_path / "moved", 1, base=folder / "base", shard_bytes=999)
    run_merge(dataclasses.replace(config, models=config.models | {"a": str(moved)}))
    after = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").iterdir()}
    assert after == before
    with pytest.raises(ConfigError, match=r"out: .*another merge: scaling was 1.0, is 0.5; name a new folder"):
        merge(dataclasses.replace(config, scaling=0.5))
    with pytest.raises(ConfigError, match=r"another merge: weights.b was 1.0, is not there; name a new folder"):
        merge(dataclasses.replace(config, models={"a": config.models["a"]}))
    other = dataclasses.replace(config, models=config.models | {"b": config.models["a"], "a": config.models["b"]})
    old, new = (content_hash(folder / name)[:12] for name in "ab")
    with pytest.raises(ConfigError, match=rf"another merge: models.a.content was {old}, is {new}; name a new folder"):
        merge(other)


def test_an_empty_folder_is_filled(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(config_of(folder, tmp_path / "out"))
    assert (tmp_path / "out" / "merge.json").exists()


KILLED = """
import os, signal, sys, pathlib
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background would ignore it
from megatron_mopd.merge import MergeConfig
from megatron_mopd.merge.run import run_merge
folder, out = map(pathlib.Path, sys.argv[1:3])
def say(line):
    if line.startswith("merged "):
        print("half", flush=True)
        if sys.argv[3] == "kill": os.kill(os.getpid(), signal.SIGKILL)
        sys.stdin.readline()
models = {name: str(folder / name) for name in "abc"}
config = MergeConfig(out=str(out), base=str(folder / "base"), models=models, method="ties")
run_merge(config, say=say, max_shard_bytes=2000)
"""


def _start(folder: Path, out: Path, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(out), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_interrupted_and_two_at_once(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path / "out", "ties")
    killed = _start(folder, tmp_path / "out", "kill")
    assert killed.wait(300) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.tmp"]
    assert any((tmp_path / "out.tmp").iterdir())
    with pytest.raises(ConfigError, match=r"incomplete \(.tmp"):
        merge(dataclasses.replace(config, out=str(tmp_path / "other"), base=str(tmp_path / "out.tmp")))

    holder = _start(folder, tmp_path / "out", "wait")
    assert holder.stdout is not None and holder.stdout.readline() == "half\n"
    with pytest.raises(ConfigError, match=rf"out: .* is being merged by process {holder.pid} on .*; wait for it"):
        merge(config)
    assert not (tmp_path / "out").exists()
    holder.send_signal(signal.SIGINT)
    holder.wait(300)
    assert [path.name for path in tmp_path.iterdir()] == []

    merge(config)
    plain = plain_merge(dataclasses.replace(config, density=0.2))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in load(tmp_path / "out").items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"out: {tmp_path / 'out'}", f"base: {folder / 'base'}", "models:"]
    lines += [f"  {name}: {folder / name}" for name in "abc"] + ["method: task_arithmetic"]
    path = tmp_path / "merge.yaml"
    path.write_text("\n".join(lines))
    assert main(["merge", str(path), "scaling=0.5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n"
    assert captured.err.splitlines()[-1] == f"{tmp_path / 'out'}: 3 models merged by task_arithmetic"
    half = plain_merge(config_of(folder, tmp_path, scaling=0.5))
    assert all(torch.equal(tensor, half[name]) for name, tensor in load(tmp_path / "out").items())
    assert main(["merge", str(path), "scaling=0.5"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main(["merge", str(path), "densty=0.5"]) == 2
    assert capsys.readouterr().err == f"mopd: error: {path}: unknown key 'densty'. Did you mean 'density'?\n"


def test_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["merge", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for part in ("mopd merge CONFIG", "dare_ties", "examples:", "configs/tiny/param_merge.yaml scaling=0.5"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 112


def test_a_disk_that_fills_up_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 20 kB: the same failed write as on a full disk."""
    config = config_of(folder, tmp_path / "out", dtype="float32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"out: .*/out cannot be written: File too large; make room"):
            merge(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_the_memory_is_that_of_slices() -> None:
    """Two tensors of 10 million elements: one of them in float64, for three checkpoints, would be 240 MB."""
    command = [sys.executable, "-m", "megatron_mopd.merge.bench", "--gb", "0.05", "--method", "ties"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = done.stdout.splitlines()[-1].split()
    assert figures[0] == "ties"
    assert 0 < float(figures[1]) < 0.1, done.stdout


def test_the_bench_says_when_the_disk_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--gb", "1e9"]) == 2
    assert "needs 4000000000 GB, has" in capsys.readouterr().err

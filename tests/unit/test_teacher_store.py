"""Where teachers wait: what is stored once, what goes to disk, which buffer is next. No process group."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from megatron_mopd.config import TeacherMemorySpec
from megatron_mopd.parallel import cpu
from megatron_mopd.teachers import copies as copies_module
from megatron_mopd.teachers import store as store_module
from megatron_mopd.yaml_config import ConfigError

cpu.install()

from megatron_mopd.teachers.copies import CopyThread  # noqa: E402
from megatron_mopd.teachers.slot import Buffers, Place  # noqa: E402
from megatron_mopd.teachers.store import ShardStore  # noqa: E402


def tensors(seed: int, count: int = 3, size: int = 250) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{index}": torch.randn(5, size // 5, generator=generator) for index in range(count)}


def on_disk(folder: Path, host_gb: float = 0.0) -> ShardStore:
    return ShardStore(TeacherMemorySpec(host_gb=host_gb, folder=str(folder)), 3, pin=False)


def test_host_memory_is_filled_first_and_shared_shards_are_stored_once(tmp_path: Path) -> None:
    store = on_disk(tmp_path, host_gb=2000e-9)  # two shards of 1000 bytes
    a = tensors(0)
    b = {**tensors(1), "w0": a["w0"].clone()}
    digests = {"a": store.keep("a", a), "b": store.keep("b", b)}
    assert (store.host_bytes, store.disk_bytes) == (2000, 3000)
    assert digests["a"]["w0"] == digests["b"]["w0"]
    for own, kept in ((a, digests["a"]), (b, digests["b"])):
        for name, tensor in own.items():
            assert torch.equal(store[kept[name]].tensor.view(tensor.shape), tensor)
    assert [store[digests["a"][name]].file is None for name in a] == [True, True, False]
    assert [store[digests["b"][name]].file is None for name in b] == [True, False, False]


def test_the_files_have_no_name_any_more(tmp_path: Path) -> None:
    store = on_disk(tmp_path)
    kept = store.keep("a", tensors(0))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(store[kept["w2"]].tensor.view(5, 50), tensors(0)["w2"])


def test_a_stored_shard_is_a_copy(tmp_path: Path) -> None:
    for store in (on_disk(tmp_path), ShardStore(TeacherMemorySpec(), 0, pin=False)):
        own = tensors(0)
        kept = store.keep("a", own)
        own["w1"].zero_()
        assert torch.equal(store[kept["w1"]].tensor.view(5, 50), tensors(0)["w1"])


@pytest.mark.parametrize("host_gb", [None, 0.0, 2000e-9])
@pytest.mark.parametrize("staging", [4096, 64, 16])
def test_copies_are_exact_whatever_the_pieces(
    host_gb: float | None, staging: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies_module, "STAGING_BYTES", staging)
    spec = TeacherMemorySpec() if host_gb is None else TeacherMemorySpec(host_gb=host_gb, folder=str(tmp_path))
    store = ShardStore(spec, 0, pin=False)
    thread = CopyThread(torch.device("cpu"))
    own = {name: tensor.bfloat16() for name, tensor in tensors(0, size=255).items()}
    kept = store.keep("a", own)
    targets = {name: torch.full_like(tensor, torch.nan) for name, tensor in own.items()}
    for _ in range(2):  # the memory of the file was given back after the first
        report = thread.start([(store[kept[name]], targets[name]) for name in own]).result()
        assert report.num_bytes == 3 * 255 * 2
        assert report.seconds > 0
        assert all(torch.equal(targets[name], own[name]) for name in own)


def test_what_goes_wrong_in_the_thread_is_raised_to_the_one_who_waits(tmp_path: Path) -> None:
    store = on_disk(tmp_path)
    kept = store.keep("a", tensors(0))
    with pytest.raises(RuntimeError, match="size of tensor"):
        CopyThread(torch.device("cpu")).start([(store[kept["w0"]], torch.empty(7, 77))]).result()


def test_a_full_disk_is_told_with_the_bytes_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*unused: object, **unused_too: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "write_model", full)
    message = (
        r"^teacher_memory\.folder: .*/mopd-teachers-rank-00003/a: No space left on device; teacher 'a' needs 3000 "
        r"bytes there on rank 3: choose another folder or raise teacher_memory\.host_gb$"
    )
    with pytest.raises(ConfigError, match=message):
        on_disk(tmp_path).keep("a", tensors(0))


def visit(buffers: Buffers, teacher: str, following: str) -> tuple[Place, Place | None]:
    """One turn of the bank: `teacher` scores, and `following` is copied ahead if it can be."""
    place = buffers.place(teacher)
    buffers.holds[place.buffer] = teacher
    buffers.active = place.buffer
    ahead = buffers.place_ahead(following)
    if ahead is not None:
        buffers.holds[ahead.buffer] = following
    return place, ahead


def test_one_buffer_is_filled_at_every_turn_and_never_ahead() -> None:
    buffers = Buffers([None])
    turns = [visit(buffers, *pair) for pair in ("ab", "bc", "ca", "ab")]
    assert turns == [(Place(0, fill=True), None)] * 4


def test_with_two_buffers_every_copy_but_the_first_is_ahead() -> None:
    buffers = Buffers([None, None])
    turns = [visit(buffers, *pair) for pair in ("ab", "bc", "ca", "ab", "bc")]
    assert turns == [
        (Place(0, fill=True), Place(1, fill=True)),
        (Place(1, fill=False), Place(0, fill=True)),
        (Place(0, fill=False), Place(1, fill=True)),
        (Place(1, fill=False), Place(0, fill=True)),
        (Place(0, fill=False), Place(1, fill=True)),
    ]


def test_two_teachers_in_two_buffers_are_never_copied_again() -> None:
    buffers = Buffers([None, None])
    visit(buffers, "a", "b")
    assert [visit(buffers, *pair) for pair in ("ba", "ab", "ba")] == [
        (Place(1, fill=False), None),
        (Place(0, fill=False), None),
        (Place(1, fill=False), None),
    ]


def test_a_step_without_the_expected_teacher_fills_the_other_buffer() -> None:
    buffers = Buffers([None, None])
    visit(buffers, "a", "b")  # b is in 1, but the next step asks for c alone
    assert visit(buffers, "c", "c") == (Place(1, fill=True), None)
    assert buffers.holds == ["a", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffers": 3}, "buffers: must be 1 or 2, got 3"),
        ({"host_gb": 1.0}, "folder: missing; host_gb needs a folder"),
        ({"folder": "/nvme"}, "host_gb: missing; folder is only used"),
        ({"host_gb": -1.0, "folder": "/nvme"}, "host_gb: must be >= 0"),
    ],
)
def test_memory_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TeacherMemorySpec(**options)

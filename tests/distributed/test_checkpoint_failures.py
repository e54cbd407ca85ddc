"""A checkpoint that cannot be written or read: full disks, kills, damage. Earlier ones stay usable."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_mopd.student import checkpoint, checkpoint_files
from tests.distributed.ranks import RankError, run_ranks
from tests.distributed.trainee import Trainee

DP2 = (2, 1, 1, 1)


def contents(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def write_file(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(100_000))


def saves_after_a_good_one(
    run_dir: Path, fill: Callable[[int], None], levels: list[int]
) -> list[tuple[str, list[str]]]:
    """For each level of free space: the error of a second save, and what is there afterwards."""
    trainee = Trainee(DP2)
    trainee.update(0)
    trainee.save(run_dir, 1)
    found = []
    for level in levels:
        if trainee.world.is_main:
            fill(level)
        trainee.world.barrier()
        error = ""
        try:
            trainee.save(run_dir, 2, write_model=lambda folder: write_file(folder) if trainee.world.is_main else None)
        except checkpoint.CheckpointError as caught:
            error = str(caught)
        found.append((error, contents(run_dir)))
        trainee.world.barrier()
    latest = checkpoint.find_latest(run_dir)
    assert latest is not None
    trainee.load(latest)
    return found


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def leave_bytes(disk: Path) -> Callable[[int], None]:
    def fill(free: int) -> None:
        (disk / "filler").unlink(missing_ok=True)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - free))

    return fill


def leave_files(disk: Path) -> Callable[[int], None]:
    def fill(free: int) -> None:
        for old in disk.glob("filler*"):
            old.unlink()
        for number in range(os.statvfs(disk).f_ffree - free):
            (disk / f"filler{number}").touch()

    return fill


def check(found: list[list[tuple[str, list[str]]]], reason: str) -> int:
    """All ranks agree, and a failed save leaves nothing of itself. Returns how many failed."""
    failures = 0
    for (error, listing), *others in zip(*found, strict=True):
        assert all((error == other) and (listing == seen) for other, seen in others)
        if error:
            failures += 1
            assert "/checkpoints/step_00000002: not written, earlier checkpoints are intact: " in error
            assert reason in error
            assert "\n" not in error
            assert listing == ["latest", "step_00000001"]
        else:
            assert listing == ["latest", "step_00000001", "step_00000002"]
    return failures


def test_too_little_space_is_noticed_before_writing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=16m") as disk:
        levels = [400_000, 12_000_000]
        found = run_ranks(saves_after_a_good_one, 2, disk / "run", leave_bytes(disk), levels, init=False)
        assert check(found, "not enough free space (") == 1


def test_a_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another program takes the space between the look at it and the writing.
    monkeypatch.setattr(checkpoint_files, "free_bytes", lambda folder: 1 << 40)
    with small_disk(tmp_path / "disk", "size=16m") as disk:
        # From nothing over the middle of a tensor and of `.metadata` to the Hugging Face folder.
        levels = [0, 4096, 12288, 100_000, 400_000, 800_000, 1_200_000, 1_250_000, 1_300_000, 12_000_000]
        found = run_ranks(saves_after_a_good_one, 2, disk / "run", leave_bytes(disk), levels, init=False)
        assert check(found, "(1099511627776 bytes free there") >= 5


def test_a_disk_without_room_for_another_file(tmp_path: Path) -> None:
    """Fails in turn at each file and folder of a checkpoint, on one rank or both."""
    with small_disk(tmp_path / "disk", "size=64m,nr_inodes=100") as disk:
        levels = list(range(12))
        found = run_ranks(saves_after_a_good_one, 2, disk / "run", leave_files(disk), levels, init=False)
        assert 8 <= check(found, "No space left on device") <= 11


def save_until_killed(run_dir: Path, killed_rank: int) -> None:
    trainee = Trainee(DP2)
    trainee.save(run_dir, 1)
    is_killed = trainee.world.rank == killed_rank
    trainee.save(run_dir, 2, write_model=lambda folder: os.kill(os.getpid(), 9) if is_killed else None)


def resume_and_save(run_dir: Path) -> None:
    trainee = Trainee(DP2)
    latest = checkpoint.find_latest(run_dir)
    assert latest == run_dir / "checkpoints" / "step_00000001"
    trainee.load(latest)
    trainee.save(run_dir, 2)


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_a_save_that_was_killed(killed_rank: int, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=f"rank {killed_rank} of 2: died without an answer"):
        run_ranks(save_until_killed, 2, tmp_path, killed_rank, init=False)
    assert "step_00000002.tmp" in contents(tmp_path)
    run_ranks(resume_and_save, 2, tmp_path, init=False)
    assert contents(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def save_with_failing_model(run_dir: Path) -> list[str]:
    """One rank's error, of whatever kind, is every rank's."""
    trainee = Trainee(DP2)
    errors = []
    for failing_rank in (0, 1):

        def write_model(folder: Path, failing_rank: int = failing_rank) -> None:
            if trainee.world.rank == failing_rank:
                raise PermissionError(13, "Permission denied", "elsewhere")

        with pytest.raises(checkpoint.CheckpointError) as caught:
            trainee.save(run_dir, 1, write_model=write_model)
        errors.append(str(caught.value))
        trainee.world.barrier()
    assert contents(run_dir) == []
    assert checkpoint.find_latest(run_dir) is None
    return errors


def test_an_error_on_one_rank_reaches_all(tmp_path: Path) -> None:
    results = run_ranks(save_with_failing_model, 2, tmp_path, init=False)
    for error in (error for errors in results for error in errors):
        assert "step_00000001: not written" in error
        assert "PermissionError: [Errno 13] Permission denied: 'elsewhere'" in error


def load_truncated(run_dir: Path) -> None:
    trainee = Trainee(DP2)
    trainee.update(0)
    first, second = trainee.save(run_dir, 1), trainee.save(run_dir, 2)
    if trainee.world.is_main:
        file = second / "state" / "__0_0.distcp"
        os.truncate(file, file.stat().st_size - 1)
    trainee.world.barrier()
    before = trainee.everything()
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"__0_0.distcp: truncated .*; delete .* to resume from step_00000001",
    ):
        trainee.load(second)
    assert all(torch.equal(value, before[name]) for name, value in trainee.everything().items())
    assert checkpoint.find_latest(run_dir) == first


def test_a_truncated_checkpoint_changes_nothing(tmp_path: Path) -> None:
    run_ranks(load_truncated, 2, tmp_path, init=False)

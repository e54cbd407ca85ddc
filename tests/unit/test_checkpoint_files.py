"""The folder of a checkpoint: completeness, `latest`, retention. Its contents here are a few zeros."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mopd.student import checkpoint_files
from megatron_mopd.student.checkpoint_files import CheckpointError, Layout, find_latest, read_manifest
from megatron_mopd.yaml_config import ConfigError

LAYOUT = Layout(ranks=4, tensor=2, pipeline=1, expert=2)
STATE = {"cursors": {"math": [3, 5]}, "num_updates": 7, "note": None, "loss": 0.25}


def write(run_dir: Path, step: int, keep_last: int = 2) -> Path:
    folder = checkpoint_files.step_folder(run_dir, step)
    checkpoint_files.start(folder, 0)
    (checkpoint_files.unfinished(folder) / "state" / "data").write_bytes(bytes(step))
    checkpoint_files.publish(
        folder, step=step, layout=LAYOUT, versions={"torch": "2"}, state=STATE, keep_last=keep_last
    )
    return folder


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, 60))
    assert (manifest.step, manifest.layout, manifest.state) == (60, LAYOUT, STATE)
    assert manifest.files == {"state/data": 60}
    assert manifest == read_manifest(tmp_path / "checkpoints" / "latest")


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(keep_last: int, kept: list[int], tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step, keep_last)
        assert os.readlink(tmp_path / "checkpoints" / "latest") == f"step_{step:08d}"
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in kept)]


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    """After going back: later ones stay until they are reached again, `latest` is what counts."""
    for step in (1, 2, 3, 2):
        folder = write(tmp_path, step)
    assert find_latest(tmp_path) == folder
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]


def test_without_checkpoints_there_is_no_latest(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    (tmp_path / "checkpoints" / "step_00000001.tmp").mkdir(parents=True)
    assert find_latest(tmp_path) is None


def test_a_dangling_latest_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    second.rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == first
    assert f"going back to {first}" in caplog.text
    (tmp_path / "checkpoints" / "latest").unlink()
    assert find_latest(tmp_path) == first


def damage_truncated(folder: Path) -> None:
    os.truncate(folder / "state" / "data", 1)


def damage_missing(folder: Path) -> None:
    (folder / "state" / "data").unlink()


def damage_half_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_version(folder: Path) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(tree | {"format_version": 99}))


def damage_key(folder: Path) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    del tree["layout"]["tensor"]
    (folder / "manifest.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, "state/data: truncated or overwritten: 1 bytes, the manifest says 2"),
        (damage_missing, "state/data: the checkpoint's manifest lists it, but: No such file"),
        (damage_half_manifest, "manifest.json: is damaged or cannot be read"),
        (damage_no_manifest, "manifest.json: is missing"),
        (damage_version, "manifest.json: format_version 99, but this program reads 1"),
        (damage_key, "manifest.json: missing key 'layout.tensor'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_found_and_named(damage: object, message: str, tmp_path: Path) -> None:
    assert callable(damage)
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    damage(second)
    with pytest.raises(ConfigError) as caught:
        read_manifest(second)
    assert message in str(caught.value)
    assert f"; delete {second} to resume from step_00000001" in str(caught.value)
    assert find_latest(tmp_path) == first
    damage_no_manifest(first)
    with pytest.raises(CheckpointError, match=r"/checkpoints: no checkpoint in it is complete \(.*; delete the folder"):
        find_latest(tmp_path)
    with pytest.raises(CheckpointError, match="to start anew"):
        read_manifest(first)


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/manifest.json: is missing.*; check the path"):
        read_manifest(tmp_path / "nowhere")


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    (folder / "step_00000002.tmp" / "state").mkdir(parents=True)
    (folder / "latest.tmp").symlink_to("step_00000002")
    (folder / "step_00000000.old.tmp").mkdir()
    (folder / "notes.txt").touch()
    checkpoint_files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "notes.txt", "step_00000001"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(tmp_path: Path) -> None:
    write(tmp_path, 1, keep_last=1)
    # The place where it would be put to be deleted is taken.
    blocker = tmp_path / "checkpoints" / "step_00000001.old.tmp"
    folder = checkpoint_files.step_folder(tmp_path, 2)
    checkpoint_files.start(folder, 0)
    blocker.write_text("")
    checkpoint_files.publish(folder, step=2, layout=LAYOUT, versions={}, state={}, keep_last=1)
    assert find_latest(tmp_path) == folder


def test_reading_a_manifest_needs_no_torch() -> None:
    program = "import sys, megatron_mopd.student.checkpoint_files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

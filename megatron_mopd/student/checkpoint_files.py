"""The folder of a checkpoint: its manifest, its atomic appearance, `latest`, and which ones are kept.

    run_dir/checkpoints/step_00000060/manifest.json    written last; names every other file and its size
                                      model/           Hugging Face folder, for other runs and for evaluation
                                      state/           Megatron's distributed checkpoint, to resume this run
    run_dir/checkpoints/latest -> step_00000060

Imports neither torch nor Megatron: the command line and the pre-flight checks read manifests too. Nothing is
collective here: the caller lets one rank write.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.yaml_config import ConfigError, build, to_tree

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
UNFINISHED = ".tmp"
"""Suffix of everything that is being written or deleted; what keeps it is garbage of a killed run."""

logger = logging.getLogger(__name__)


class CheckpointError(ConfigError):
    """A checkpoint cannot be written, is incomplete, or does not fit; the message names folder and remedy."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout that wrote a checkpoint. It loads in any other; only random states need this one."""

    ranks: int
    tensor: int
    pipeline: int
    expert: int
    context: int = 1
    """Checkpoints from before there was context parallelism do not say it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json says."""

    format_version: int
    step: int
    layout: Layout
    versions: dict[str, str]
    """Package -> version that wrote it; for the reader, not compared."""
    state: dict[str, Any]
    """The caller's own: data cursors, teachers, counters; exactly what `json` gives back."""
    files: dict[str, int]
    """Relative path -> bytes of every other file: a truncated one is found before anything is loaded."""


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    return checkpoints_folder(run_dir) / f"step_{step:08d}"


def unfinished(folder: Path) -> Path:
    """Where `folder` is put together before it appears under its own name."""
    return Path(os.path.abspath(folder) + UNFINISHED)  # '.' has no name of its own


def find_latest(run_dir: Path) -> Path | None:
    """The checkpoint to resume from: `latest` if complete, else the newest complete one. None if none exists.

    Raises:
        CheckpointError: there are checkpoints, but not one is complete (starting anew would overwrite them).
    """
    folders = _step_folders(run_dir)
    latest = checkpoints_folder(run_dir) / LATEST
    if latest.is_symlink():
        folders.insert(0, latest.parent / os.readlink(latest))
    problems: list[str] = []
    for folder in folders:
        problem = _problem(folder)
        if problem is None:
            if problems:
                logger.warning("%s; going back to %s", problems[0], folder)
            return folder
        problems.append(problem)
    if not problems:
        return None
    raise CheckpointError(
        f"{checkpoints_folder(run_dir)}: no checkpoint in it is complete ({problems[0]}); "
        "delete the folder to start anew"
    )


def read_manifest(path: Path) -> Manifest:
    """Read manifest.json and compare the size of every file with it.

    Raises:
        CheckpointError: not a checkpoint, half written, truncated, or of another format version.
    """
    problem = _problem(path)
    if problem is not None:
        folder = path.resolve()
        others = [other for other in _step_folders(folder.parent.parent) if other.resolve() != folder]
        usable = next((other for other in others if _problem(other) is None), None)
        instead = f"resume from {usable.name}" if usable else "start anew"
        remedy = f"delete {folder} to {instead}" if folder.is_dir() else "check the path"
        raise CheckpointError(f"{problem}; {remedy}")
    return _parse(path)


def _parse(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing, so {path} is not a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: is damaged or cannot be read ({error})") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format_version {version!r}, but this program reads {FORMAT_VERSION}")
    try:
        return build(Manifest, tree)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _problem(path: Path) -> str | None:
    """Why the checkpoint at `path` cannot be used, or None when it is whole."""
    try:
        manifest = _parse(path)
    except CheckpointError as error:
        return str(error)
    for name, size in manifest.files.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            return f"{path / name}: the checkpoint's manifest lists it, but: {error.strerror}"
        if found != size:
            return f"{path / name}: truncated or overwritten: {found} bytes, the manifest says {size}"
    return None


def _step_folders(run_dir: Path) -> list[Path]:
    """Folders under their final names, newest first, whether complete or not."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    found = [child for child in folder.iterdir() if re.fullmatch(r"step_\d{8,}", child.name) and child.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed run had not finished writing or deleting. No other run may be using `run_dir`."""
    folder = checkpoints_folder(run_dir)
    for child in folder.glob(f"*{UNFINISHED}") if folder.is_dir() else ():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def start(folder: Path, needed: int) -> None:
    """Create the empty unfinished folder, after making sure that `needed` bytes are free for it.

    Raises:
        CheckpointError: not enough free space. OSError: the folder cannot be created.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent.parent)
    if free_bytes(folder) < needed:
        raise CheckpointError("not enough free space")
    unfinished(folder).mkdir()
    (unfinished(folder) / "state").mkdir()


def free_bytes(folder: Path) -> int:
    """Room on the disk of `folder`, which need not exist yet."""
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    return shutil.disk_usage(existing).free


def publish(
    folder: Path,
    *,
    step: int,
    layout: Layout,
    versions: dict[str, str],
    state: dict[str, Any],
    keep_last: int,
) -> None:
    """Give the finished checkpoint its name, let `latest` point to it, delete the oldest.

    A crash at any point leaves the previous or this checkpoint complete and `latest` pointing to one of them.
    Only when a step is written a second time is there a moment in which `find_latest` has to fall back.
    """
    partial = unfinished(folder)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    manifest = Manifest(
        format_version=FORMAT_VERSION, step=step, layout=layout, versions=versions, state=state, files=sizes
    )
    (partial / MANIFEST).write_text(json.dumps(to_tree(manifest), indent=1) + "\n", encoding="utf-8")
    for path in [partial, *partial.rglob("*")]:
        fsync(path)
    latest = folder.parent / LATEST
    unfinished(latest).symlink_to(folder.name)  # before the rename: from there on nothing needs space any more
    if folder.exists():
        _delete(folder)
    partial.rename(folder)
    unfinished(latest).replace(latest)
    fsync(folder.parent)
    older = [other for other in _step_folders(folder.parent.parent) if _step(other) < step]
    for other in older[keep_last - 1 :]:
        try:
            _delete(other)
        except OSError as error:
            logger.warning("%s: an old checkpoint that cannot be deleted: %s", other, error.strerror)


def _delete(folder: Path) -> None:
    """Under its final name a folder is always whole: one that is being deleted is renamed first."""
    doomed = folder.with_name(f"{folder.name}.old{UNFINISHED}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def fsync(path: Path) -> None:
    """Of a file or a folder: what it holds survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""From a plan to a merged folder: locked, put together beside its place, and moved there in one step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from megatron_mopd.merge.config import MergeConfig
from megatron_mopd.merge.methods import merge_tensor
from megatron_mopd.merge.plan import Plan, make_plan, read_hashes
from megatron_mopd.merge.record import RECORD, check_out, check_room, check_same, origins, settings
from megatron_mopd.merge.slices import SLICE_VALUES, ValueReader, tensor_slices
from megatron_mopd.run_lock import take_lock
from megatron_mopd.student.checkpoint_files import fsync, unfinished
from megatron_mopd.student.hf_files import MAX_SHARD_BYTES, write_model
from megatron_mopd.student.weight_stream import copy_side_files
from megatron_mopd.yaml_config import ConfigError

Say = Callable[[str], None]
_LOCK = ".lock"


def run_merge(
    config: MergeConfig,
    *,
    say: Say = lambda line: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    slice_values: int = SLICE_VALUES,
) -> Path:
    """Merge as `config` says and return the folder; nothing is done where it holds this very merge already.

    Everything is checked before the first byte is written, NaN included: the inputs are read once for it and for
    their hashes. Raises ConfigError. `say` is told of progress, a line at a time.
    """
    plan = make_plan(config)
    with _locked(plan.out) as folder:
        found = check_out(plan)
        if found is None:
            check_room(plan)
        else:
            check_same(plan, found, settings(plan))  # before the weights are read
        say(f"reading {len(plan.inputs)} checkpoints of {plan.num_bytes / 1e9:.2g} GB: NaN, and content hashes")
        record = settings(plan) | origins(plan, read_hashes(plan))
        if found is not None:
            check_same(plan, found, record)
            say(f"{plan.out} holds this merge already: nothing to do")
            return plan.out
        try:
            kept = _write(plan, folder, say, max_shard_bytes, slice_values)
            _publish(plan, folder, record | ({"kept": kept} if plan.recipe.is_sparse else {}))
        except OSError as error:
            raise ConfigError(f"out: {plan.out} cannot be written: {error.strerror or error}; make room") from None
    say(f"{plan.out}: {len(plan.models)} models merged by {plan.recipe.method}")
    return plan.out


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """The folder in which `out` is put together, empty, for this process alone; gone at the end if not published."""
    folder = unfinished(out)
    ours = any((folder / name).is_file() for name in (_LOCK, RECORD))
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out: {folder} is in the way and not of a merge; move it away, or name another out")
    lock = _lock(folder, out)
    try:
        for child in folder.iterdir():
            if child.name != _LOCK:  # what a killed merge left
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        yield folder
    finally:
        if _is_at(lock, folder / _LOCK):
            shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _lock(folder: Path, out: Path) -> TextIO:
    """The kernel drops the lock with the process, however it ends; no other file is left behind."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {out} cannot be written: {error.strerror}; choose another folder") from None
        try:
            file = (folder / _LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue  # the merge that held the folder finished this moment
        except OSError as error:
            raise ConfigError(f"out: {folder} cannot be written: {error.strerror}; choose another folder") from None
        take_lock(file, f"out: {out}", "is being merged by")
        if _is_at(file, folder / _LOCK):
            return file
        file.close()  # locked the file of a merge that has just finished


def _is_at(file: TextIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _write(plan: Plan, folder: Path, say: Say, max_shard_bytes: int, slice_values: int) -> dict[str, float]:
    """Write the merged weights; returns model -> share of its task vector that is not 0 after the selection."""
    kept = torch.zeros(len(plan.models), dtype=torch.int64)
    # `average` works on the values themselves.
    base = plan.base.tensors if plan.base is not None and plan.recipe.method != "average" else None
    models = [model.tensors for model in plan.models.values()]

    def pieces(name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        for merged in merge_tensor(plan.recipe, tensor_slices(name, base, models, reader, slice_values)):
            if merged.kept is not None:
                kept.add_(merged.kept)
            _check_range(merged.values, dtype, name)
            yield merged.values

    def stream() -> Iterator[tuple[str, Iterator[Tensor]]]:
        done, total = 0, plan.num_bytes
        for spec in plan.specs:
            yield spec.name, pieces(spec.name, spec.dtype)
            before, done = done, done + spec.num_bytes
            if done * 10 // total > before * 10 // total:
                say(f"merged {100 * done // total} % of {total / 1e9:.2g} GB")

    with ValueReader() as reader:
        write_model(folder, plan.specs, stream(), max_shard_bytes)
    size = sum(torch.Size(spec.shape).numel() for spec in plan.specs)
    return {name: count / size for name, count in zip(plan.models, kept.tolist(), strict=True)}


def _check_range(values: Tensor, dtype: torch.dtype, name: str) -> None:
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest <= torch.finfo(dtype).max:
        stored = str(dtype).removeprefix("torch.")
        raise ConfigError(f"dtype: {largest:.3g} in tensor '{name}' does not fit {stored}; lower scaling, or set dtype")


def _publish(plan: Plan, folder: Path, record: dict[str, Any]) -> None:
    """Add the small files and give the folder its name. `out` is missing or empty: rename(2) replaces it at once."""
    copy_side_files(plan.reference.folder, folder, getattr(torch, plan.dtype))
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (folder / _LOCK).unlink()
    for path in [*folder.iterdir(), folder]:
        fsync(path)
    os.replace(folder, plan.out)
    fsync(plan.out.parent)

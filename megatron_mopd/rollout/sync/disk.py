"""`disk`: a step's weights as safetensors files that the servers read, and late ones can read later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sync.buckets import Weights
from megatron_mopd.rollout.sync.recipients import Recipients
from megatron_mopd.rollout.sync.transport import Deliver
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.hf_files import TensorReader, TensorSpec, read_headers, write_model
from megatron_mopd.student.weight_table import model_tensors
from megatron_mopd.yaml_config import ConfigError


class DiskTransport:
    """One folder per update, named by its number, complete or absent; older ones go once the servers have loaded it."""

    in_parts = False

    def __init__(
        self, *, folder: Path, arch: Architecture, dtype: torch.dtype, timeout: float, keeps_cache: bool = False
    ):
        """keeps_cache: see `Session`."""
        self._folder = folder
        self._arch = arch
        self._dtype = dtype
        self._timeout = timeout
        self._keeps_cache = keeps_cache
        self._current: int | None = None

    def stage(self, weights: Weights, num_updates: int) -> Deliver:
        """Write the stream, one tensor at a time. ConfigError on a full disk; the last snapshot is still there then."""
        specs = [TensorSpec(name=t.name, shape=t.shape, dtype=self._dtype) for t in model_tensors(self._arch)]
        final = self._path(num_updates)
        partial_ = final.with_name(f".{final.name}.partial")
        try:
            shutil.rmtree(partial_, ignore_errors=True)
            write_model(partial_, specs, weights)
            if final.exists():  # of a run that was killed and goes on from an older checkpoint
                shutil.rmtree(final)
            os.replace(partial_, final)
        except OSError as error:
            shutil.rmtree(partial_, ignore_errors=True)
            raise ConfigError(
                f"{self._folder}: cannot write the weights for the servers: {error.strerror or error}; make room, or "
                f"change rollout.sglang.sync.folder or kind"
            ) from None
        self._current = num_updates
        return partial(self._deliver, num_updates)

    def staged(self) -> tuple[Weights, int, Deliver] | None:
        if self._current is None:
            return None
        return self._read(self._path(self._current)), self._current, partial(self._deliver, self._current)

    def forget(self, recipients: Recipients, restarted: frozenset[str]) -> None:
        pass

    def close(self) -> None:
        """Remove the snapshot: the servers have read it."""
        self._remove_all_but(None)
        self._current = None

    def _deliver(self, num_updates: int, recipients: Recipients) -> None:
        def ask(server: ServerConnection) -> None:
            body = {
                "model_path": str(self._path(num_updates).resolve()),
                "load_format": "safetensors",
                "flush_cache": not self._keeps_cache,
            }
            server.post("/update_weights_from_disk", body, timeout=self._timeout)

        recipients.ask(ask)
        self._remove_all_but(self._path(num_updates))

    def _remove_all_but(self, kept: Path | None) -> None:
        """Also what a run that was killed has left. The folder may be the user's: nothing else in it is touched."""
        for path in [*self._folder.glob("update-????????"), *self._folder.glob(".update-????????.partial")]:
            if path != kept:
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, num_updates: int) -> Path:
        return self._folder / f"update-{num_updates:08d}"

    def _read(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        with TensorReader(read_headers(folder)) as reader:
            for tensor in model_tensors(self._arch):
                yield tensor.name, reader[tensor.name][:]

"""The three ways of sending weights, in buckets so small that a tiny model takes several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.rollout.sync.config import SyncSpec
from megatron_mopd.rollout.sync.disk import DiskTransport
from megatron_mopd.rollout.sync.distributed import DistributedTransport
from megatron_mopd.rollout.sync.push import ServerSync
from megatron_mopd.rollout.sync.tensor import TensorTransport
from megatron_mopd.rollout.sync.transport import Transport
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.weight_table import model_tensors

KINDS = ("tensor", "distributed", "disk")
BUCKET = 60_000
"""Bytes: the model takes eight or so."""
TIMEOUT = 120.0


def server_sync(
    kind: str, folder: Path, arch: Architecture, transport: Transport | None = None, *, colocated: bool = False
) -> ServerSync:
    made = transport or transport_of(kind, folder, arch)
    spec = SyncSpec(kind=kind, timeout_seconds=TIMEOUT, colocated=colocated)  # type: ignore[arg-type]
    return ServerSync(spec, made, run_id=f"run-{kind}", head_dim=arch.head_dim)


def transport_of(kind: str, folder: Path, arch: Architecture) -> Transport:
    if kind == "disk":
        return DiskTransport(folder=folder / "weights", arch=arch, dtype=torch.float32, timeout=TIMEOUT)
    if kind == "tensor":
        return TensorTransport(bucket_bytes=BUCKET, timeout=TIMEOUT)
    return DistributedTransport(bucket_bytes=BUCKET, backend="gloo", timeout=TIMEOUT)


class Numbers:
    """Weights that depend on a seed: any will do where only the way counts. `hook` runs before tensor `at`."""

    def __init__(self, arch: Architecture, seed: int, hook: Callable[[], None] | None = None, at: int = 15):
        self._arch, self._seed, self._hook, self._at = arch, seed, hook, at

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed)
        for index, spec in enumerate(model_tensors(self._arch)):
            if index == self._at and self._hook is not None:
                hook, self._hook = self._hook, None
                hook()
            yield spec.name, torch.randn(spec.shape, generator=generator) * 0.15

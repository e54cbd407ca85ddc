"""Copies of shards into device memory by one thread, on a stream of its own, while the device computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mopd.teachers.store import Shard

STAGING_BYTES = 64 << 20
"""Of each of the two pinned buffers through which mapped files travel; a power of two, as torch rounds up to one."""


@dataclass(frozen=True, slots=True)
class CopyReport:
    num_bytes: int
    seconds: float
    """From the moment the target was free until its last byte was there."""


class CopyThread:
    """Fills buffers in the order in which it is asked to.

    From pinned host memory the device copies by itself. What lies in a mapped file is read, piece by piece, into one of
    two pinned buffers while the other is copied: without them CUDA would copy pageable memory on the caller's time.

    Without CUDA the same code runs: `parallel/cpu.py` has streams and events that are always done.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-copies")
        self._stream = torch.cuda.Stream(device)
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []

    def start(self, copies: Sequence[tuple[Shard, Tensor]]) -> Future[CopyReport]:
        """Copy each shard into its tensor, once everything that the caller has queued on the device is done."""
        free = torch.cuda.Event()
        free.record()
        return self._thread.submit(self._copy, copies, free)

    def _copy(self, copies: Sequence[tuple[Shard, Tensor]], free: torch.cuda.Event) -> CopyReport:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        free.synchronize()
        started = time.perf_counter()
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for shard, target in copies:
                flat = target.view(-1)
                if shard.file is None:
                    flat.copy_(shard.tensor, non_blocking=True)
                else:
                    self._through_staging(shard, flat)
            self._stream.synchronize()
        return CopyReport(sum(target.nbytes for _, target in copies), time.perf_counter() - started)

    def _through_staging(self, shard: Shard, target: Tensor) -> None:
        if not self._staging:
            pin = self._device.type == "cuda"
            buffers = (torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=pin) for _ in range(2))
            self._staging = [(buffer, torch.cuda.Event()) for buffer in buffers]
        step = STAGING_BYTES // target.element_size()
        for begin in range(0, len(target), step):
            end = min(begin + step, len(target))
            buffer, copied = self._staging[0]
            self._staging.reverse()
            copied.synchronize()  # its last piece has left it
            piece = buffer.view(target.dtype)[: end - begin].copy_(shard.tensor[begin:end])
            shard.forget(begin, end)
            target[begin:end].copy_(piece, non_blocking=True)
            copied.record()

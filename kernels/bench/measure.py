"""Interleaved timing and peak memory, on a CPU or on a GPU.

Every contender runs in turn, several rounds; what counts is the median, so that a shared machine does no harm. CPU:
CPU time of the process, and its high-water mark of memory over the inputs (Linux). CUDA: events, and the
allocator's peak over what was allocated before.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, ...]
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    run: Callable[[], Gradients]
    """Forward and backward; may overwrite its inputs, which are restored before the next."""
    errors: Callable[[Gradients], tuple[float, ...]]
    """Of each gradient against float64, |got - want| / |want|."""


@dataclass(frozen=True, slots=True)
class Measured:
    name: str
    first: float
    """Seconds of the first call: compilation, building."""
    peak: float
    """MiB over the inputs."""
    errors: tuple[float, ...]
    seconds: tuple[float, ...]
    """One for each round: of CPU time, or of the GPU."""
    wall: tuple[float, ...]


class Meter(Protocol):
    device: torch.device

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds of CPU or GPU, seconds of wall."""
        ...

    def peak(self, call: Callable[[], object]) -> float:
        """MiB over what was there before; nan where nobody says."""
        ...


class CpuMeter:
    device = torch.device("cpu")

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        trim()
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        return time.process_time() - cpu, time.perf_counter() - wall

    def peak(self, call: Callable[[], object]) -> float:
        return peak_mib(call)


class CudaMeter:
    """Has not run on a GPU yet."""

    device = torch.device("cuda")

    def time(self, call: Callable[[], object]) -> tuple[float, float]:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3, time.perf_counter() - wall

    def peak(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB


def meter_for(device: torch.device) -> Meter:
    return CudaMeter() if device.type == "cuda" else CpuMeter()


def trim() -> None:
    """Gives freed memory back, so that the next peak is counted from the inputs alone."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
        return


def status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def peak_mib(call: Callable[[], object]) -> float:
    """MiB by which the process grows at most while `call` runs (Linux: resets and reads VmHWM); else nan."""
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = status_mib("VmRSS")
        kept = call()
        peak = status_mib("VmHWM")
    except OSError:
        return float("nan")
    del kept
    return max(peak - before, 0.0)


def measure(
    entries: Sequence[Contender], meter: Meter, rounds: int, restore: Callable[[], object]
) -> tuple[Measured, ...]:
    """A first round that warms up and checks, one for memory, then `rounds` for time, contender by contender."""
    warm: list[tuple[float, float, tuple[float, ...]]] = []
    for entry in entries:
        start = time.perf_counter()
        gradients = entry.run()
        if meter.device.type == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        errors = entry.errors(gradients)
        del gradients
        restore()
        peak = meter.peak(entry.run)
        restore()
        warm.append((first, peak, errors))
        print(f"{entry.name}: first call {first:.1f} s", file=sys.stderr)  # the tables come after minutes
    times: list[list[tuple[float, float]]] = [[] for _ in entries]
    for _ in range(rounds):
        for entry, found in zip(entries, times, strict=True):
            found.append(meter.time(entry.run))
            restore()
    return tuple(
        Measured(entry.name, *before, *(tuple(column) for column in zip(*found, strict=True)))
        for entry, before, found in zip(entries, warm, times, strict=True)
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in float64."""
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())

"""Time, memory and accuracy of the operations here beside what one would write without them.

    python -m kernels.bench divergence [--tokens 256] [--vocab 151936] [--threads 1] [--csv FILE] [--check]

Forward and backward of the reverse KL from bf16 logits. Every contender runs in turn, several rounds: medians of CPU
time, so that a shared machine does no harm. Peak memory is that of the process over the inputs (the two sets of
logits), by the kernel's own high-water mark; a gradient that does not replace its logits is part of it. The error is
that of the gradient against float64 on a few rows, as |got - want| / |want|.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

FASTER, SMALLER = 10.0, 20.0
"""`--check`: times faster than eager torch, times less memory than it."""

CHECKED_ROWS = 4

Operation = Callable[[Tensor, Tensor], Tensor]
"""Student and teacher logits [T, V] -> gradient of the summed reverse KL; may overwrite the student's."""


@dataclass(slots=True)
class Contender:
    name: str
    run: Operation
    cpu: list[float] = field(default_factory=list)
    """Microseconds of CPU a token, one for each round."""
    wall: list[float] = field(default_factory=list)
    """Microseconds a token."""
    first: float = 0.0
    """Seconds of the first call: compilation, building."""
    peak: float = 0.0
    """MiB over the inputs."""
    error: float = 0.0


def by_autograd(divergence: Operation) -> Operation:
    def run(student: Tensor, teacher: Tensor) -> Tensor:
        leaf = student.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(leaf, teacher).sum(), leaf)
        return gradient

    return run


def eager_log_softmax(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def eager_kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def eager_bf16(student: Tensor, teacher: Tensor) -> Tensor:
    """Without the upcast: fewer bytes, wrong numbers."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def fused(rows: ModuleType) -> Operation:
    """`divergence(student, teacher, inplace=True)` by one implementation of the row primitives, on one rank."""

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        sums = rows.divergence_sums(student, teacher, both=False)
        z, f, d = sums[[1, 3, 4]].double()
        upstream = torch.ones_like(z)
        kl = (d / z + (f / z).log1p()) * upstream
        assert kl.shape == student.shape[:1]
        scale = upstream / z
        factors = torch.stack((scale, -scale * d / z, torch.zeros_like(z))).to(sums.dtype)
        return rows.divergence_gradient(student, teacher, torch.cat((sums[[0, 2]], factors)), student)

    return run


def contenders(compiled: bool) -> list[Contender]:
    """Eager torch first: it is what the others are compared with."""
    found = [Contender("eager log_softmax", by_autograd(eager_log_softmax))]
    found.append(Contender("eager kl_div", by_autograd(eager_kl_div)))
    found.append(Contender("eager, bf16 log_softmax", by_autograd(eager_bf16)))
    if compiled:
        found.append(Contender("torch.compile", by_autograd(torch.compile(eager_log_softmax, dynamic=False))))
    for name in ("torch", "cpp"):
        try:
            rows = importlib.import_module(f"kernels.rows_{name}")
        except ModuleNotFoundError:
            continue
        if name == "cpp" and not rows.available():
            print(f"cpp: not available: {rows.reason()}")
            continue
        found.append(Contender(f"ours, {name}", fused(rows)))
    print("liger-kernel: its divergence of logits is a CUDA kernel, nothing to compare on a CPU")
    return found


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


def make_logits(tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    """bf16 [T, V] of student and teacher, about 0.02 nats apart."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.empty(tokens, vocab, dtype=torch.bfloat16) for _ in range(2))
    for row in range(tokens):  # row by row: no fp32 copy of all, which would leave its mark on the allocator
        logits = 3.0 * torch.randn(vocab, generator=draw)
        student[row] = logits
        teacher[row] = logits + 0.2 * torch.randn(vocab, generator=draw)
    return student, teacher


def gradient_error(gradient: Tensor, student: Tensor, teacher: Tensor) -> float:
    leaf = student[:CHECKED_ROWS].double().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), teacher[:CHECKED_ROWS].double().log_softmax(-1)
    (want,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), leaf)
    return float((gradient[:CHECKED_ROWS].double() - want).norm() / want.norm())


def measure(entries: Sequence[Contender], tokens: int, vocab: int, rounds: int) -> None:
    """A first round that warms up and checks, one for memory, then `rounds` for time, contender by contender."""
    original, teacher = make_logits(tokens, vocab)
    student = original.clone()
    for entry in entries:
        start = time.perf_counter()
        gradient = entry.run(student, teacher)
        entry.first = time.perf_counter() - start
        entry.error = gradient_error(gradient, original, teacher)
        del gradient
        student.copy_(original)
        entry.peak = peak_mib(lambda run=entry.run: run(student, teacher))  # type: ignore[misc]
        student.copy_(original)
    for _ in range(rounds):
        for entry in entries:
            trim()
            cpu, wall = time.process_time(), time.perf_counter()
            entry.run(student, teacher)
            entry.cpu.append((time.process_time() - cpu) * 1e6 / tokens)
            entry.wall.append((time.perf_counter() - wall) * 1e6 / tokens)
            student.copy_(original)


HEADER = (
    "contender",
    "cpu us/token",
    "min",
    "wall us/token",
    "faster",
    "peak MiB",
    "smaller",
    "gradient error",
    "first s",
)


def table(entries: Sequence[Contender]) -> list[tuple[str, ...]]:
    """Rows of `HEADER`; ratios to the first contender. Peaks below 1 MiB count as 1: Linux counts pages loosely."""
    base_cpu, base_peak = statistics.median(entries[0].cpu), entries[0].peak
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        cpu = statistics.median(entry.cpu)
        rows.append((
            entry.name, f"{cpu:.0f}", f"{min(entry.cpu):.0f}", f"{statistics.median(entry.wall):.0f}",
            f"{base_cpu / cpu:.1f}", f"{entry.peak:.1f}", f"{base_peak / max(entry.peak, 1.0):.1f}",
            f"{entry.error:.1e}", f"{entry.first:.1f}",
        ))  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; with `--check` the exit code is 1 if our fastest misses a bar against eager torch."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("operation", choices=["divergence"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it compiles for a minute)")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument("--check", action="store_true", help=f"fail below {FASTER:g}x in time, {SMALLER:g}x in memory")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    entries = contenders(not options.no_compile)
    measure(entries, options.tokens, options.vocab, options.rounds)
    print(f"reverse KL, forward and backward: {options.tokens} x {options.vocab} bf16 logits, "
          f"{options.threads} thread(s), median of {options.rounds}")  # fmt: skip
    rows = [HEADER, *table(entries)]
    for row in rows:
        print(
            f"{row[0]:24}"
            + "".join(f"{cell:>{len(title) + 2}}" for title, cell in zip(HEADER[1:], row[1:], strict=True))
        )
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(options.csv, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    faster, smaller = float(rows[-1][4]), float(rows[-1][6])
    return int(options.check and not (faster >= FASTER and smaller >= SMALLER))


if __name__ == "__main__":
    sys.exit(main())

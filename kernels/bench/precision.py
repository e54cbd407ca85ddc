"""Error of the KL that is read and of the gradient against float64, over KL from 1e-3 to 10.

What is exact are the logits of bf16 hidden states and output layers, and everything after them, in float64. "torch"
is fp32 log_softmax and autograd on logits as they are stored; its gradient of the hidden states is dlogits, in the
dtype that they have, times the weight, summed in fp32 and rounded to bf16, as on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.bench.heads import Heads, Student, with_teacher
from kernels.bench.linear import PLANS, Plan
from kernels.bench.logits import eager_log_softmax
from kernels.bench.measure import relative_error
from kernels.divergence import divergence
from kernels.linear_divergence import linear_divergence
from kernels.support import support
from kernels.topk_divergence import topk_divergence

LEVELS = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
TOPK = 64
BAR = 3e-3
"""On the gradient of the operations that see fp32 logits; bf16 itself is 1.7e-3, root mean square."""

BF16, ROUNDED = "torch, bf16 logits", "torch, fp32 logits, bf16 dlogits"
OURS = ("divergence, fp32 logits", "linear_divergence", "topk_divergence")
HEADER = ("head", "KL", "method", "KL read", "KL error", "dlogits error", "dhidden error")


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one method on one pair of student and teacher."""

    value: Tensor
    """[T]"""
    dlogits: Tensor | None
    """[T, V]; None where no logits exist."""
    dhidden: Tensor
    """[T, H] bf16"""


@dataclass(frozen=True, slots=True)
class Errors:
    head: str
    kl: float
    """Of this student and teacher, mean over the tokens, in float64."""
    method: str
    read: float
    """The mean as the method reads it."""
    value: float
    """Mean over the tokens of |read - exact|, over the mean of the exact."""
    dlogits: float
    """|got - want| / |want|; nan where no logits exist."""
    dhidden: float

    def cells(self) -> tuple[str, ...]:
        numbers = (self.read, self.value, self.dlogits, self.dhidden)
        return (self.head, f"{self.kl:.4g}", self.method, *(f"{number:.4g}" for number in numbers))


@dataclass(frozen=True, slots=True)
class Case:
    heads: Heads
    z: Tensor
    """[T, V] exact logits of the student, float64."""
    t: Tensor


def noise_levels(student: Student, levels: Sequence[float]) -> list[float]:
    """The relative noise at which KL(student || teacher) is about as wanted, by interpolation on a logarithmic grid.

    The logits of a noisy teacher are z + e a + e^2 b for noise e, so that the grid costs no matrix products.
    """
    generator = torch.Generator().manual_seed(2)
    x, w = student.hidden.float(), student.weight.float()
    dx, dw = (each * torch.randn(each.shape, generator=generator) for each in (x, w))
    z, linear, square = (x @ w.t()).double(), (x @ dw.t() + dx @ w.t()).double(), (dx @ dw.t()).double()
    grid = [10 ** (-3 + step / 8) for step in range(33)]
    curve = [math.log(float(reference.reverse_kl(z, z + e * linear + e * e * square).mean())) for e in grid]
    return [_crossing(grid, curve, math.log(level)) for level in levels]


def _crossing(grid: Sequence[float], curve: Sequence[float], wanted: float) -> float:
    """Log-linear between the first two points around `wanted`; the end of the grid if there are none."""
    for place in range(1, len(grid)):
        low, high = curve[place - 1], curve[place]
        if low <= wanted <= high:
            share = (wanted - low) / (high - low)
            return math.exp(math.log(grid[place - 1]) * (1 - share) + math.log(grid[place]) * share)
    return grid[0] if wanted < curve[0] else grid[-1]


def _from_logits(case: Case, dtype: torch.dtype, gradient_dtype: torch.dtype, loss: Callable[..., Tensor]) -> Reading:
    """Logits stored in `dtype`, dlogits handed on in `gradient_dtype`."""
    leaf = case.z.to(dtype, copy=True).requires_grad_()
    value = loss(leaf, case.t.to(dtype))
    (dlogits,) = torch.autograd.grad(value.sum(), leaf)
    dlogits = dlogits.to(gradient_dtype)
    return Reading(value.detach(), dlogits, (dlogits.float() @ case.heads.weight.float()).bfloat16())


def _from_hidden(case: Case, loss: Callable[[Tensor], Tensor]) -> Reading:
    leaf = case.heads.hidden.detach().requires_grad_()
    value = loss(leaf)
    (dhidden,) = torch.autograd.grad(value.sum(), leaf)
    return Reading(value.detach(), None, dhidden)


def _linear(case: Case, plan: Plan) -> Reading:
    heads = case.heads
    return _from_hidden(case, lambda leaf: linear_divergence(
        leaf, heads.weight, heads.teacher_hidden, heads.teacher_weight, gradient=plan).divergence)  # fmt: skip


def _readings(case: Case) -> list[tuple[str, Reading]]:
    """Method by method; all are the full reverse KL."""
    bf16, fp32 = torch.bfloat16, torch.float32

    def inplace(student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student, teacher, inplace=True)

    found = [
        (BF16, _from_logits(case, bf16, bf16, eager_log_softmax)),
        (ROUNDED, _from_logits(case, fp32, bf16, eager_log_softmax)),
        ("divergence, bf16 logits", _from_logits(case, bf16, bf16, inplace)),
        ("divergence, fp32 logits", _from_logits(case, fp32, fp32, inplace)),
    ]
    for name, plan in PLANS:
        found.append((name.replace("ours", "linear_divergence"), _linear(case, plan)))
    return found


def _topk(case: Case) -> tuple[Reading, Tensor, Tensor]:
    """(what `topk_divergence` reads from hidden states, its exact value [T] and dlogits): the tail form."""
    kept = support(None, case.t.float(), TOPK)
    log_q = case.t.log_softmax(-1).gather(1, kept.ids)
    reading = _from_hidden(case, lambda leaf: topk_divergence(
        leaf, kept.ids, log_q, student_weight=case.heads.weight, form="tail"))  # fmt: skip
    leaf = case.z.detach().requires_grad_()
    exact = reference.topk_divergence(leaf.log_softmax(-1).gather(1, kept.ids), log_q, "reverse_kl", "tail")
    (dlogits,) = torch.autograd.grad(exact.sum(), leaf)
    return reading, exact.detach(), dlogits


def errors_at(student: Student, noise: float) -> list[Errors]:
    heads = with_teacher(student, noise)
    wide = heads.weight.double()
    z = heads.hidden.double() @ wide.t()
    case = Case(heads, z, heads.teacher_hidden.double() @ heads.teacher_weight.double().t())
    log_p, log_q = z.log_softmax(-1), case.t.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    dlogits = log_p.exp() * (log_p - log_q - kl[:, None])
    found = []

    def compare(method: str, got: Reading, value: Tensor, want: Tensor) -> None:
        off = float((got.value.double() - value).abs().mean() / value.mean())
        of_logits = math.nan if got.dlogits is None else relative_error(got.dlogits, want)
        of_hidden = relative_error(got.dhidden, want @ wide)
        read = float(got.value.double().mean())
        found.append(Errors(student.name, float(kl.mean()), method, read, off, of_logits, of_hidden))

    for method, reading in _readings(case):
        compare(method, reading, kl, dlogits)
    reading, value, want = _topk(case)
    compare(f"topk_divergence, tail, k={TOPK}", reading, value, want)
    return found


def measure_precision(student: Student, levels: Sequence[float] = LEVELS) -> list[Errors]:
    return [error for noise in noise_levels(student, levels) for error in errors_at(student, noise)]


def pivot(errors: Sequence[Errors], of: Callable[[Errors], float]) -> list[tuple[str, ...]]:
    """A row for each method, its errors in the columns; the first row has the KLs."""
    methods, kls = list(dict.fromkeys(each.method for each in errors)), sorted({each.kl for each in errors})
    rows = [("KL, nats per token", *(f"{kl:.2g}" for kl in kls))]
    for method in methods:
        found = {each.kl: of(each) for each in errors if each.method == method}
        rows.append((method, *("-" if math.isnan(found[kl]) else _share(found[kl]) for kl in kls)))
    return rows


COLUMNS: tuple[tuple[str, Callable[[Errors], float]], ...] = (
    ("error of the KL that is read", lambda each: each.value),
    ("error of dlogits", lambda each: each.dlogits),
    ("error of dhidden", lambda each: each.dhidden),
)


def _share(error: float) -> str:
    if error < 1e-4:
        return f"{error:.0e}"
    return f"{100 * error:.2g}%" if error < 0.995 else f"{100 * error:.0f}%"


def missed(errors: Sequence[Errors]) -> list[str]:
    """One line for each gradient from fp32 logits that is further off than `BAR`."""
    return [
        f"{each.head}, KL {each.kl:.2g}, {each.method}: gradient error {each.dhidden:.2g} > {BAR:g}"
        for each in errors
        if each.method.startswith(OURS) and not each.dhidden <= BAR
    ]

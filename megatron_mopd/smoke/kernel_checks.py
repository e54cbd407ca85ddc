"""Each implementation in `kernels/` against the float64 specification on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from kernels import (
    DivergenceKind,
    Objective,
    divergence,
    linear_divergence,
    one_read,
    reference,
    support,
    token_logprob,
    topk_divergence,
)
from kernels.dispatch import Implementation
from megatron_mopd.smoke.result import Result, attempt, skipped

TOKENS, VOCAB, HIDDEN = 96, 8192, 256
FP32, ROUNDED = 1e-4, 2e-2
"""Relative errors. ROUNDED: of gradients that are themselves bf16, or come from bf16 products (0.2 % on a CPU)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Inputs on one device, all of them values that bf16 can hold: every implementation sees the same numbers."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    ids: Tensor

    @classmethod
    def make(cls, device: torch.device) -> Problem:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).bfloat16().float().to(device)

        ids = torch.randint(0, VOCAB, (TOKENS,), generator=generator).to(device)
        wide = {"scale": HIDDEN**-0.5}
        return cls(normal(TOKENS, HIDDEN, scale=1.0), normal(VOCAB, HIDDEN, **wide),
                   normal(TOKENS, HIDDEN, scale=1.0), normal(VOCAB, HIDDEN, **wide), ids)  # fmt: skip

    def logits(self) -> tuple[Tensor, Tensor]:
        student, teacher = self.hidden @ self.weight.t(), self.teacher_hidden @ self.teacher_weight.t()
        return student.bfloat16().float(), teacher.bfloat16().float()


def kernel_checks(device: torch.device) -> Iterator[Result]:
    """All operations in the implementations that are of this device."""
    problem = Problem.make(device)
    rows: Implementation = "triton" if device.type == "cuda" else "cpp"
    for kind in get_args(DivergenceKind):
        name = f"kernels: divergence {kind}, {rows}, fp32"
        yield attempt(name, FP32, partial(_divergence, problem, kind, rows, torch.float32))
    yield attempt(f"kernels: token log-prob, {rows}, fp32", FP32, lambda: _token(problem, rows))
    yield attempt(f"kernels: teacher top-k, {rows}, fp32", FP32, lambda: _topk(problem, rows))
    for kind in get_args(DivergenceKind):
        name = f"kernels: linear divergence {kind}, {rows}, bf16"
        yield attempt(name, ROUNDED, partial(_linear, problem, kind, rows))
    name = "kernels: one-read reverse KL, cuda, bf16"
    reason = one_read.why_not(device)
    if reason is not None:
        yield skipped(name, reason)
    else:
        yield attempt(name, ROUNDED, lambda: _divergence(problem, "reverse_kl", "cuda", torch.bfloat16))


def _error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, both flattened."""
    return float((found.double() - expected).norm() / expected.norm())


def _against(found: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> float:
    """The larger error of value and gradients; `expected` gets the inputs in float64."""
    exact = [each.detach().double().requires_grad_() for each in inputs]
    given = [each.detach().requires_grad_() for each in inputs]
    value, truth = found(*given), expected(*exact)
    gradients = torch.autograd.grad(value.sum(), given)
    truths = torch.autograd.grad(truth.sum(), exact)
    pairs = [(value, truth.detach()), *zip(gradients, truths, strict=True)]
    return max(_error(a.detach(), b) for a, b in pairs)


def _divergence(problem: Problem, kind: DivergenceKind, impl: Implementation, dtype: torch.dtype) -> float:
    student, teacher = problem.logits()
    return _against(
        lambda z: divergence(z, teacher.to(dtype), kind, impl=impl),
        lambda z: reference.divergence(z, teacher.double(), Objective(kind)),
        student.to(dtype),
    )


def _token(problem: Problem, impl: Implementation) -> float:
    return _against(
        lambda x, w: token_logprob(x, w, problem.ids, impl=impl).logprob,
        lambda x, w: reference.token_logprob(x @ w.t(), problem.ids),
        problem.hidden,
        problem.weight,
    )


def _topk(problem: Problem, impl: Implementation) -> float:
    student, teacher = problem.logits()
    found = support(None, teacher, 64, impl=impl)
    exact = teacher.double().log_softmax(-1).gather(1, found.ids)
    chosen = _error(found.logprobs, teacher.double().log_softmax(-1).topk(64).values)
    return max(chosen, _against(
        lambda z: topk_divergence(z, found.ids, found.logprobs, impl=impl),
        lambda z: reference.topk_divergence(z.log_softmax(-1).gather(1, found.ids), exact, "reverse_kl", "raw"),
        student,
    ))  # fmt: skip


def _linear(problem: Problem, kind: DivergenceKind, impl: Implementation) -> float:
    heads = problem.teacher_hidden.bfloat16(), problem.teacher_weight.bfloat16()
    return _against(
        lambda x, w: linear_divergence(x, w, *heads, kind, impl=impl).divergence,
        lambda x, w: reference.divergence(x @ w.t(), heads[0].double() @ heads[1].double().t(), Objective(kind)),
        problem.hidden.bfloat16(),
        problem.weight.bfloat16(),
    )

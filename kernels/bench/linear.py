"""`linear_divergence`: reverse KL from bf16 hidden states and output layers, gradients of hidden states and weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.bench import peers
from kernels.bench.heads import Heads
from kernels.bench.logits import compiled
from kernels.bench.measure import MIB, Contender, Gradients, Meter, relative_error
from kernels.linear_divergence import linear_divergence

CHECKED_TOKENS, CHECKED_ROWS, SLAB = 8, 256, 8192
NOISE = 0.04
"""Of the teacher, relative: a KL of 0.04 to 0.05 per token, where MOPD starts."""

Plan = Literal["in_forward", "recompute"]
PLANS: tuple[tuple[str, Plan], ...] = (("ours A, in_forward", "in_forward"), ("ours B, recompute", "recompute"))


@dataclass(frozen=True, slots=True)
class LinearProblem:
    heads: Heads
    main_grad: Tensor | None
    """[V, H] fp32, as Megatron's optimizer holds it; dW is added to it. None: dW comes as a tensor of its own."""

    def restore(self) -> None:
        if self.main_grad is not None:
            self.main_grad.zero_()


@dataclass(frozen=True, slots=True)
class Exact:
    """Float64 gradients of the mean reverse KL, on a sample."""

    kl: float
    hidden: Tensor
    """[CHECKED_TOKENS, H] of the first tokens."""
    rows: Tensor
    """[R] int64 rows of the weight: evenly spaced, and the likeliest tokens of the first hidden states."""
    weight: Tensor
    """[R, H]"""


def exact_gradients(heads: Heads) -> Exact:
    """The logits are made slab by slab, twice for the checked tokens. Float64 holds e^z up to z = 700."""
    x, xt = heads.hidden.double(), heads.teacher_hidden.double()
    vocab, tokens = len(heads.weight), len(x)

    def logits(states: slice, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        return x[states] @ heads.weight[rows].double().t(), xt[states] @ heads.teacher_weight[rows].double().t()

    cuts = [slice(start, min(start + SLAB, vocab)) for start in range(0, vocab, SLAB)]
    z_sum, t_sum, cross = (x.new_zeros(tokens) for _ in range(3))
    best, top = x.new_full((tokens,), -torch.inf), torch.zeros(tokens, dtype=torch.int64, device=x.device)
    every, first = slice(0, tokens), slice(0, CHECKED_TOKENS)
    for cut in cuts:
        z, t = logits(every, cut)
        z_sum, t_sum = z_sum + z.exp().sum(1), t_sum + t.exp().sum(1)
        cross += (z.exp() * (z - t)).sum(1)
        value, place = z.max(1)
        top, best = torch.where(value > best, place + cut.start, top), torch.maximum(value, best)
    log_z, log_t = z_sum.log(), t_sum.log()
    kl = cross / z_sum - log_z + log_t

    def dlogits(z: Tensor, t: Tensor, rows: slice) -> Tensor:
        log_p, log_q = z - log_z[rows, None], t - log_t[rows, None]
        return log_p.exp() * (log_p - log_q - kl[rows, None]) / tokens

    hidden = torch.zeros_like(x[first])
    for cut in cuts:
        hidden += dlogits(*logits(first, cut), first) @ heads.weight[cut].double()
    spaced = torch.arange(0, vocab, max(1, vocab // CHECKED_ROWS), device=x.device)
    rows = torch.cat((spaced, top[:CHECKED_ROWS])).unique()
    return Exact(float(kl.mean()), hidden, rows, dlogits(*logits(every, rows), every).t() @ x)


def eager(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (teacher_hidden @ teacher_weight.t()).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def linear_contenders(
    problem: LinearProblem, exact: Exact, with_compiled: bool, liger_chunk: int
) -> tuple[Contender, ...]:
    """Eager torch first. Whoever returns dW adds it to `main_grad`, if there is one; ours does so itself."""
    device = problem.heads.hidden.device
    losses: list[tuple[str, peers.Linear]] = [("eager", eager)]
    if with_compiled:
        losses.append(("torch.compile", compiled(eager)))
    losses += peers.liger_linear(device, with_compiled, liger_chunk)
    for name, plan in PLANS:
        losses.append((name, ours(plan, problem.main_grad)))
    return tuple(Contender(name, runner(problem, loss), errors(problem, exact)) for name, loss in losses)


def ours(plan: Plan, main_grad: Tensor | None) -> peers.Linear:
    return lambda x, w, xt, wt: linear_divergence(x, w, xt, wt, gradient=plan, main_grad=main_grad).divergence.mean()


def runner(problem: LinearProblem, loss: peers.Linear) -> Callable[[], Gradients]:
    heads, main_grad = problem.heads, problem.main_grad

    def run() -> Gradients:
        x, w = heads.hidden.detach().requires_grad_(), heads.weight.detach().requires_grad_()
        value = loss(x, w, heads.teacher_hidden, heads.teacher_weight)
        dx, dw = torch.autograd.grad(value, (x, w), allow_unused=True)
        if main_grad is None:
            return dx, dw
        if dw is not None:
            main_grad.add_(dw)
        return dx, main_grad

    return run


def errors(problem: LinearProblem, exact: Exact) -> Callable[[Gradients], tuple[float, ...]]:
    def compare(gradients: Gradients) -> tuple[float, ...]:
        dx, dw = gradients
        return relative_error(dx[:CHECKED_TOKENS], exact.hidden), relative_error(dw[exact.rows], exact.weight)

    return compare


@dataclass(frozen=True, slots=True)
class Floor:
    """Peak memory of `linear_divergence` with gradient="recompute", MiB over the inputs."""

    tokens: int
    peak: float
    states: float
    """MiB of one [T, H] tensor in fp32."""
    logits: float
    """MiB of one [T, V] tensor in fp32, which does not exist."""


def memory_floor(problem: LinearProblem, meter: Meter) -> Floor:
    heads = problem.heads
    run = runner(problem, ours("recompute", problem.main_grad))
    tokens, hidden = heads.hidden.shape
    elements = tokens * 4 / MIB
    return Floor(tokens, meter.peak(run), elements * hidden, elements * len(heads.weight))

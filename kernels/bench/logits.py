"""Operations on logits [T, V]: `divergence`, `token_logprob`, `topk_divergence`, forward and backward, bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.bench import peers
from kernels.bench.measure import Contender, Gradients, relative_error
from kernels.dispatch import Implementation, row_kernels
from kernels.divergence import divergence
from kernels.objective import DivergenceKind, Objective
from kernels.support import Support, support
from kernels.token_logprob import token_logprob
from kernels.topk_divergence import topk_divergence

CHECKED_ROWS = 4
CPU_IMPLEMENTATIONS: tuple[Implementation, ...] = ("torch", "cpp")
CUDA_IMPLEMENTATIONS: tuple[Implementation, ...] = ("torch", "triton")

Loss = Callable[[Tensor], Tensor]
"""Student's logits [T, V] -> [T], or their sum."""


@dataclass(frozen=True, slots=True)
class LogitsProblem:
    student: Tensor
    """[T, V] bf16; an operation in place leaves its gradient here."""
    original: Tensor
    """What `student` is restored from."""
    teacher: Tensor
    ids: Tensor
    """[T] int64"""

    @classmethod
    def draw(cls, tokens: int, vocab: int, device: torch.device) -> LogitsProblem:
        """Student and teacher about 0.02 nats apart."""
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.empty(tokens, vocab, dtype=torch.bfloat16, device=device) for _ in range(2))
        for row in range(tokens):  # row by row: no fp32 copy of all, which would leave its mark on the allocator
            logits = 3.0 * torch.randn(vocab, generator=generator)
            student[row] = logits
            teacher[row] = logits + 0.2 * torch.randn(vocab, generator=generator)
        ids = torch.randint(vocab, (tokens,), generator=generator).to(device)
        return cls(student, student.clone(), teacher, ids)

    def restore(self) -> None:
        self.student.copy_(self.original)


def implementations(problem: LogitsProblem) -> tuple[Implementation, ...]:
    """Those that run here; one line about each that does not."""
    found: list[Implementation] = []
    logits = problem.student
    for name in CUDA_IMPLEMENTATIONS if logits.is_cuda else CPU_IMPLEMENTATIONS:
        try:
            row_kernels(name, logits.device, logits.dtype, logits.numel())
        except RuntimeError as error:
            print(error)
            continue
        found.append(name)
    return tuple(found)


def contender(name: str, problem: LogitsProblem, loss: Loss, exact: Loss) -> Contender:
    """`exact` is the same in float64 for the first `CHECKED_ROWS` rows."""

    def run() -> Gradients:
        leaf = problem.student.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf).sum(), leaf)

    def errors(gradients: Gradients) -> tuple[float, ...]:
        leaf = problem.original[:CHECKED_ROWS].double().requires_grad_()
        (want,) = torch.autograd.grad(exact(leaf).sum(), leaf)
        return (relative_error(gradients[0][:CHECKED_ROWS], want),)

    return Contender(name, run, errors)


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.compile(loss, dynamic=False))


# Contenders of `divergence`: what one writes without it


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


def divergence_contenders(problem: LogitsProblem, with_compiled: bool) -> tuple[Contender, ...]:
    """Eager torch first: it is what the others are compared with."""
    teacher = problem.teacher

    def entry(name: str, loss: Loss, kind: DivergenceKind = "reverse_kl") -> Contender:
        exact = teacher[:CHECKED_ROWS].double()
        return contender(name, problem, loss, lambda leaf: reference.divergence(leaf, exact, Objective(kind)))

    found = [
        entry("eager log_softmax", lambda leaf: eager_log_softmax(leaf, teacher)),
        entry("eager kl_div", lambda leaf: eager_kl_div(leaf, teacher)),
        entry("eager, bf16 log_softmax", lambda leaf: eager_bf16(leaf, teacher)),
    ]
    if with_compiled:
        run = compiled(eager_log_softmax)
        found.append(entry("torch.compile", lambda leaf: run(leaf, teacher)))
    for name, kind, loss in peers.liger_divergences(problem.student.device):
        found.append(entry(name, lambda leaf, loss=loss: loss(leaf, teacher), kind))  # type: ignore[misc]
    for impl in implementations(problem):
        found.append(entry(f"ours, {impl}", lambda leaf, impl=impl: divergence(  # type: ignore[misc]
            leaf, teacher, impl=impl, inplace=True)))  # fmt: skip
    return tuple(found)


# Contenders of `token_logprob`: log-prob of a token, and the entropy


def eager_token_logprob(logits: Tensor, ids: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    return log_p.gather(1, ids[:, None])[:, 0] + 0.0 * entropy  # used, or the compiler would leave it out


def token_contenders(problem: LogitsProblem, with_compiled: bool) -> tuple[Contender, ...]:
    ids = problem.ids

    def entry(name: str, loss: Loss) -> Contender:
        return contender(name, problem, loss, lambda leaf: reference.token_logprob(leaf, ids[:CHECKED_ROWS]))

    found = [entry("eager log_softmax", lambda leaf: eager_token_logprob(leaf, ids))]
    if with_compiled:
        run = compiled(eager_token_logprob)
        found.append(entry("torch.compile", lambda leaf: run(leaf, ids)))
    liger = peers.liger_token_logprob(problem.student.device)
    if liger is not None:
        found.append(entry("liger cross entropy", lambda leaf: liger(leaf, ids)))
    for impl in implementations(problem):
        found.append(entry(f"ours, {impl}", lambda leaf, impl=impl: token_logprob(  # type: ignore[misc]
            leaf, None, ids, impl=impl, inplace=True).logprob))  # fmt: skip
    return tuple(found)


# Contenders of `topk_divergence`: MOPD Eq. 5 on the teacher's top k


def eager_topk(logits: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(-1).gather(1, ids)
    return (log_p.exp() * (log_p - log_q) - log_p.exp() + log_q.exp()).sum(-1)


def topk_contenders(problem: LogitsProblem, with_compiled: bool, k: int) -> tuple[Contender, ...]:
    kept = _support(problem, k)
    log_q = kept.logprobs[:CHECKED_ROWS].double()

    def exact(leaf: Tensor) -> Tensor:
        log_p = leaf.log_softmax(-1).gather(1, kept.ids[:CHECKED_ROWS])
        return reference.topk_divergence(log_p, log_q, "reverse_kl", "raw")

    found = [contender("eager log_softmax", problem, lambda leaf: eager_topk(leaf, kept.ids, kept.logprobs), exact)]
    if with_compiled:
        run = compiled(eager_topk)
        found.append(contender("torch.compile", problem, lambda leaf: run(leaf, kept.ids, kept.logprobs), exact))
    for impl in implementations(problem):
        found.append(contender(f"ours, {impl}", problem, lambda leaf, impl=impl: topk_divergence(  # type: ignore[misc]
            leaf, kept.ids, kept.logprobs, impl=impl), exact))  # fmt: skip
    return tuple(found)


def _support(problem: LogitsProblem, k: int) -> Support:
    """A few rows at a time: it sorts whole rows."""
    parts: Sequence[Support] = [support(None, rows, k) for rows in problem.teacher.split(16)]
    return Support(torch.cat([part.ids for part in parts]), torch.cat([part.logprobs for part in parts]))

"""Divergence of two vocabulary-parallel softmaxes from their logits: one read, one collective, gradient in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import one_read, reference, sweep
from kernels.dispatch import Implementation, check_implementation, row_kernels
from kernels.objective import (
    FLOATS,
    DivergenceKind,
    Objective,
    accumulation_dtype,
    active_runs,
    check_tokens,
    check_weights,
    split,
)
from kernels.shard import VocabShard

READ_ELEMENTS = 1 << 22
"""Logits that are scaled by the temperature, or searched for statistics, at a time."""


@dataclass(frozen=True, slots=True)
class DivergenceStats:
    """Per row, in nats; fp32 (float64 for float64 inputs). All but `divergence` are detached and unweighted."""

    divergence: Tensor
    """[T] differentiable in the student; times its weight."""
    student_entropy: Tensor
    """[T]"""
    reverse_kl: Tensor | None = None
    """[T] KL(student || teacher), whatever the kind; this and what follows with `return_stats`."""
    teacher_entropy: Tensor | None = None
    student_logprob: Tensor | None = None
    """[T] of `token_ids`, as the next one; None without them."""
    teacher_logprob: Tensor | None = None
    agreement: Tensor | None = None
    """[T] bool: both have the same most likely token (of equals the lowest id)."""

    @classmethod
    def of(cls, divergence: Tensor, statistics: Tensor, has_tokens: bool) -> DivergenceStats:
        kl, entropy, teacher_entropy, log_p, log_q, agreement = statistics.unbind(0)
        student, teacher = (log_p, log_q) if has_tokens else (None, None)
        return cls(divergence, entropy, kl, teacher_entropy, student, teacher, agreement.bool())


@overload
def divergence(
    student_logits: Tensor, teacher_logits: Tensor, kind: DivergenceKind = ..., *, alpha: float = ...,
    beta: float = ..., shard: VocabShard | None = ..., temperature: float = ..., weights: Tensor | None = ...,
    token_ids: Tensor | None = ..., impl: Implementation = ..., inplace: bool = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def divergence(
    student_logits: Tensor, teacher_logits: Tensor, kind: DivergenceKind = ..., *, alpha: float = ...,
    beta: float = ..., shard: VocabShard | None = ..., temperature: float = ..., weights: Tensor | None = ...,
    token_ids: Tensor | None = ..., impl: Implementation = ..., inplace: bool = ..., return_stats: Literal[True],
) -> DivergenceStats: ...  # fmt: skip
def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: DivergenceKind = "reverse_kl",
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    shard: VocabShard | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    impl: Implementation = "auto",
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | DivergenceStats:
    """weights * D(p, q) per row in nats, p = softmax(student / temperature), q likewise. `Objective` lists the kinds.

    Shapes: logits [T, columns] fp32, bf16, fp16 or float64, the columns of this rank's `shard` (None: the whole
    vocabulary; more columns than the shard's rows are padding); rows may be strided, -inf marks excluded tokens.
    weights [T] float constants: a row of weight 0 costs no work on a CPU and may hold anything. token_ids [T] for
    the log-probs among the statistics. Result [T] fp32 (float64 for float64).

    Gradient of the student's logits, in their dtype (`Joined.gradient_rows`; jsd: (1 - beta) p (log p - log m -
    KL(p || m))), divided by the temperature. **inplace=True overwrites the student's logits with it** in backward:
    no memory beyond the inputs, and a second backward raises ValueError. bf16 logits are themselves a rounding: at
    a KL of 1e-3 it alone makes the gradient 96 % wrong; prefer fp32 logits or `linear_divergence`.

    Bytes a logit: 4 read forward, 4 read and 2 written backward in bf16; twice that in fp32; jsd reads once more.
    A temperature other than 1 costs scaled fp32 copies in each pass, `READ_ELEMENTS` of either side at a time (+ 16
    bytes a logit and side in bf16, + 8 in fp32): only a factor inside the row primitives would do without, as sums at
    one temperature say nothing of another. `linear_divergence` scales in place.
    impl="cuda" (`one_read`; reverse_kl of bf16 on one rank, sm_90): 6 in all, as **forward** makes the gradient, in
    place if so wanted; backward scales the rows whose upstream gradient is not 1.
    Collectives: one all-gather of [6, T] (8 for forward_kl and mixed, 12 with statistics), one more of [2, T] for
    jsd; none in backward. Every rank gets the same bits.

    Raises ValueError for shapes, dtypes, devices, ids or options that do not fit; RuntimeError for an `impl` that
    cannot run here.
    """
    objective = Objective(kind, alpha, beta, temperature)
    check_implementation(impl)
    shard = shard or VocabShard.whole(student_logits.shape[-1])
    _check_logits(student_logits, teacher_logits, shard)
    tokens = student_logits.shape[0]
    check_weights(weights, tokens, student_logits.device)
    if token_ids is not None:
        check_tokens(token_ids, tokens, student_logits.device, shard.vocab_size)
    if inplace and student_logits.requires_grad and student_logits.stride(-1) != 1:
        raise ValueError(f"inplace needs logits whose rows are contiguous, got strides {student_logits.stride()}")
    student, teacher = student_logits[:, : shard.rows], teacher_logits.detach()[:, : shard.rows]
    if impl == "reference":
        return _by_reference(student, teacher, objective, shard, weights, token_ids, return_stats)
    if impl == "cuda":
        if return_stats:
            raise ValueError("impl='cuda' has no statistics: leave return_stats off")
        return one_read.divergence(student_logits, teacher, objective, shard, weights, inplace=inplace)
    kernels = row_kernels(impl, student.device, student.dtype, student.numel())
    job = sweep.Job(objective, shard, kernels, token_ids, return_stats)
    value, statistics = _Divergence.apply(student_logits, teacher, weights, job, inplace)
    return DivergenceStats.of(value, statistics, token_ids is not None) if return_stats else value


def _check_logits(student: Tensor, teacher: Tensor, shard: VocabShard) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        shapes = f"student_logits {tuple(student.shape)}, teacher_logits {tuple(teacher.shape)}"
        raise ValueError(f"{shapes}: expected [T, columns] twice")
    if student.dtype not in FLOATS or student.dtype != teacher.dtype:
        raise ValueError(f"logits are {student.dtype} and {teacher.dtype}: expected one floating dtype")
    if student.device != teacher.device:
        raise ValueError(f"student_logits are on {student.device}, teacher_logits on {teacher.device}")
    shard.check_rows(student.shape[1], f"logits {tuple(student.shape)}")


class LogitBlocks:
    """Logits as they are, or copies of a few rows at a time divided by the temperature."""

    def __init__(
        self, student: Tensor, teacher: Tensor, weights: Tensor | None, temperature: float, in_pieces: bool
    ) -> None:
        self.tokens, columns = student.shape
        self.dtype, self.device = accumulation_dtype(student.dtype), student.device
        self.slabs: tuple[slice, ...] = (slice(0, columns),)
        self.temperature = temperature
        copies = temperature != 1.0 or in_pieces
        size = max(1, READ_ELEMENTS // max(columns, 1)) if copies else max(self.tokens, 1)
        self.chunks = split(active_runs(weights, self.tokens), size)
        self._student, self._teacher = (each if each.stride(-1) == 1 else each.contiguous()
                                        for each in (student, teacher))  # fmt: skip

    def student(self, slab: slice, chunk: slice) -> Tensor:
        return self._tempered(self._student[chunk])

    def teacher(self, slab: slice, chunk: slice) -> Tensor:
        return self._tempered(self._teacher[chunk])

    def _tempered(self, logits: Tensor) -> Tensor:
        if self.temperature == 1.0:
            return logits
        if logits.dtype == self.dtype:
            return logits / self.temperature
        return logits.to(self.dtype).div_(self.temperature)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, padded: Tensor, teacher: Tensor, weights: Tensor | None, job: sweep.Job, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        student = padded[:, : job.shard.rows]
        blocks = LogitBlocks(student, teacher, weights, job.objective.temperature, job.stats)
        result = sweep.forward(job, blocks, weights)
        ctx.save_for_backward(padded, teacher, weights, result.joined.sums, result.pair)
        ctx.job, ctx.inplace, ctx.spent = job, inplace, False
        statistics = result.value.new_empty(0)
        if job.stats:
            statistics = sweep.statistics(job, result.joined, blocks.dtype)
        ctx.mark_non_differentiable(statistics)
        return result.value.to(blocks.dtype), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise ValueError("second backward through divergence(inplace=True): its gradient has replaced the logits")
        padded, teacher, weights, sums, pair = ctx.saved_tensors
        job: sweep.Job = ctx.job
        student = padded[:, : job.shard.rows]
        blocks = LogitBlocks(student, teacher, weights, job.objective.temperature, False)
        scale = upstream if weights is None else weights * upstream
        rows = sweep.coefficients(job, (sums, pair), scale, blocks.dtype)
        covers_all = len(blocks.chunks) == 1 and blocks.chunks[0] == slice(0, blocks.tokens)
        with torch.no_grad():
            out = padded if ctx.inplace else (torch.empty_like if covers_all else torch.zeros_like)(padded)
            out[:, job.shard.rows :] = 0
            if ctx.inplace:
                ctx.spent = True
            for chunk in blocks.chunks:
                target, tempered = out[chunk, : job.shard.rows], job.objective.temperature != 1.0
                block, other = blocks.student(blocks.slabs[0], chunk), blocks.teacher(blocks.slabs[0], chunk)
                written = sweep.gradient(job, block, other, rows[:, chunk].contiguous(), block if tempered else target)
                if tempered:
                    target.copy_(written)
            if weights is not None and (ctx.inplace or weights.is_cuda):
                out[weights == 0] = 0
            if ctx.inplace:  # a kernel of ours may have written without autograd's knowledge
                torch.autograd.graph.increment_version(padded)
        return out, None, None, None, None


def _by_reference(
    student: Tensor, teacher: Tensor, objective: Objective, shard: VocabShard, weights: Tensor | None,
    token_ids: Tensor | None, return_stats: bool,
) -> Tensor | DivergenceStats:  # fmt: skip
    """Autograd of the specification in the logits' accumulation dtype: one rank, all logits at once."""
    if shard.ranks > 1:
        raise ValueError("impl='reference' is for one rank: autograd does not differentiate a collective")
    dtype = accumulation_dtype(student.dtype)
    z, t = student.to(dtype), teacher.to(dtype)
    if weights is not None:  # before, not only after: 0 * NaN is NaN in the gradient
        z, t = (torch.where(weights[:, None] != 0, each, 0.0) for each in (z, t))
    value = reference.divergence(z, t, objective)
    value = value if weights is None else torch.where(weights != 0, value * weights, 0.0)
    if not return_stats:
        return value
    with torch.no_grad():
        return DivergenceStats.of(
            value, reference.statistics(z, t, token_ids, objective.temperature), token_ids is not None
        )

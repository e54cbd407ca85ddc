"""Divergence on a small support of each row: the top-k objectives of on-policy distillation.

MOPD (arXiv 2606.30406) Eq. 5 sums p log(p / q) - p + q over the teacher's k most likely tokens, with raw
probabilities of the full softmax. Without the correction - p + q a truncated sum is not stationary at p = q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args, overload

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import Implementation, row_kernels
from kernels.objective import accumulation_dtype, check_ids, check_temperature, check_tokens, check_weights
from kernels.output_layer import check_layer
from kernels.reference import TopkForm
from kernels.selected import FromLayer, FromLogits, TokenJob
from kernels.shard import VocabShard
from kernels.sweep import weigh
from kernels.token_logprob import check_logits

TopkKind = Literal["reverse_kl", "forward_kl"]

_from_layer = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], FromLayer.apply)
_from_logits = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], FromLogits.apply)


@dataclass(frozen=True, slots=True)
class TopkStats:
    """Per row, in nats; fp32 (float64 for float64 inputs). All but `divergence` are detached and unweighted."""

    divergence: Tensor
    """[T] differentiable in the student; times its weight."""
    reverse_kl: Tensor
    """[T] KL(student || teacher) with all tokens outside the support as one, whatever kind and form: never more than
    that of the full vocabulary."""
    student_mass: Tensor
    """[T] the student's probability of the support."""
    teacher_mass: Tensor
    student_entropy: Tensor
    """[T] of the full softmax."""
    student_logprob: Tensor | None = None
    """[T] of `token_ids`; None without them."""


@overload
def topk_divergence(
    student: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, kind: TopkKind = ..., *,
    student_weight: Tensor | None = ..., form: TopkForm = ..., shard: VocabShard | None = ...,
    temperature: float = ..., weights: Tensor | None = ..., token_ids: Tensor | None = ...,
    chunk_tokens: int | None = ..., impl: Implementation = ..., return_stats: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def topk_divergence(
    student: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, kind: TopkKind = ..., *,
    student_weight: Tensor | None = ..., form: TopkForm = ..., shard: VocabShard | None = ...,
    temperature: float = ..., weights: Tensor | None = ..., token_ids: Tensor | None = ...,
    chunk_tokens: int | None = ..., impl: Implementation = ..., return_stats: Literal[True],
) -> TopkStats: ...  # fmt: skip
def topk_divergence(
    student: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: TopkKind = "reverse_kl",
    *,
    student_weight: Tensor | None = None,
    form: TopkForm = "raw",
    shard: VocabShard | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    chunk_tokens: int | None = None,
    impl: Implementation = "auto",
    return_stats: bool = False,
) -> Tensor | TopkStats:
    """weights * divergence on the support, [T] in nats, fp32 (float64 for float64). `reference.topk_divergence` has
    the formulas: "raw" (MOPD Eq. 5), "tail", "renormalised". A log-prob counts as at least -1e4, on either side.

    Shapes: student: logits [T, columns], or hidden states [T, H] with student_weight [rows, H], of this rank's
    `shard`; topk_ids [T, k] global ids, the same on every rank, -1 for an unused place (`support` makes them);
    topk_logprobs [T, k] the teacher's log-probs at `temperature`, constants. weights [T] constants. token_ids [T] for
    the log-prob among the statistics (`TopkStats`), which take no further pass.

    Gradient: with h_i = dL / dlog p_i,  dz_j = (sum_i h_i 1[j = i] - p_j sum_i h_i) / temperature. From hidden
    states dX is this rank's share, to be summed over `shard.group`; dW is complete.

    Collectives: one all-gather of [3 + k, T] ([4 + k, T] with token_ids) forward if `shard.group` has several ranks,
    none backward.

    Raises ValueError when shapes, dtypes or options do not fit, for an id outside the vocabulary or twice in a row.
    """
    _check_options(kind, form, temperature)
    shard = shard or VocabShard.whole((student if student_weight is None else student_weight.t()).shape[-1])
    if student_weight is None:
        check_logits(student, shard)
    else:
        check_layer("student_", student, student_weight, shard)
    check_weights(weights, len(student), student.device)
    _check_support(topk_ids, topk_logprobs, student, shard.vocab_size)
    ids, k = topk_ids, topk_ids.shape[1]
    if token_ids is not None:
        check_tokens(token_ids, len(student), student.device, shard.vocab_size)
        ids = torch.cat((topk_ids, token_ids[:, None].long()), 1)
    dtype = accumulation_dtype(student.dtype)
    kernels = row_kernels(
        impl, student.device, student.dtype if student_weight is None else dtype, len(student) * shard.rows
    )
    job = TokenJob(shard, kernels, temperature, chunk_tokens)
    if student_weight is None:
        log_p, entropy, _ = _from_logits(student, ids, job)
    else:
        log_p, entropy, _ = _from_layer(student, student_weight, ids, job)
    # float64 costs nothing at [T, k]; what is left outside the support is a difference of nearly equal numbers.
    pair, used = (log_p[:, :k].double(), topk_logprobs.detach().double()), topk_ids >= 0
    value = weigh(reference.topk_divergence(*pair, kind, form, used), weights).to(dtype)
    if not return_stats:
        return value
    return _with_statistics(value, *pair, used, entropy, None if token_ids is None else log_p[:, k].detach())


@torch.no_grad()
def _with_statistics(
    value: Tensor, log_p: Tensor, log_q: Tensor, used: Tensor, entropy: Tensor, logprob: Tensor | None
) -> TopkStats:
    """Of float64 log-probs [T, k] on the support."""
    kl = reference.topk_divergence(log_p, log_q, "reverse_kl", "tail", used).to(value.dtype)
    student, teacher = (torch.where(used, each.exp(), 0.0).sum(-1).to(value.dtype) for each in (log_p, log_q))
    return TopkStats(value, kl, student, teacher, entropy, logprob)


def _check_options(kind: str, form: str, temperature: float) -> None:
    if kind not in get_args(TopkKind):
        raise ValueError(f"kind must be reverse_kl or forward_kl, got '{kind}'")
    if form not in get_args(TopkForm):
        raise ValueError(f"form must be one of {', '.join(get_args(TopkForm))}, got '{form}'")
    check_temperature(temperature)


def _check_support(ids: Tensor, logprobs: Tensor, student: Tensor, vocab_size: int) -> None:
    if ids.ndim != 2 or len(ids) != len(student) or ids.dtype != torch.int64 or not ids.shape[1]:
        given = f"{tuple(ids.shape)} {ids.dtype}"
        raise ValueError(f"topk_ids are {given}: expected ({len(student)}, k) of torch.int64, k > 0")
    if logprobs.shape != ids.shape or not logprobs.is_floating_point():
        given = f"{tuple(logprobs.shape)} {logprobs.dtype}"
        raise ValueError(f"topk_logprobs are {given}: expected {tuple(ids.shape)} floats, one for each id")
    if ids.device != student.device or logprobs.device != student.device:
        raise ValueError(f"student is on {student.device}, topk_ids on {ids.device}, topk_logprobs {logprobs.device}")
    check_ids(ids, vocab_size, lowest=-1)
    ordered = ids.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, place = (int(each) for each in twice.nonzero()[0])
        raise ValueError(f"token id {int(ordered[row, place])} is twice in row {row} of topk_ids")

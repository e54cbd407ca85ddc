"""Divergence on a small support of each row: the top-k objectives of on-policy distillation.

MOPD (arXiv 2606.30406) Eq. 5 sums p log(p / q) - p + q over the teacher's k most likely tokens, with raw
probabilities of the full softmax. Without the correction - p + q a truncated sum is not stationary at p = q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import Implementation, row_kernels
from kernels.objective import FLOATS, accumulation_dtype, check_ids, check_temperature, check_weights
from kernels.output_layer import check_layer
from kernels.reference import TopkForm
from kernels.selected import FromLayer, FromLogits, TokenJob
from kernels.shard import VocabShard
from kernels.sweep import weigh
from kernels.token_logprob import check_logits

SupportOf = Literal["teacher", "student", "union"]

_from_layer = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], FromLayer.apply)
_from_logits = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], FromLogits.apply)


@dataclass(frozen=True, slots=True)
class Support:
    """The tokens a row is compared on."""

    ids: Tensor
    """[T, k] int64, -1 for an unused place; a token at most once in a row."""
    logprobs: Tensor
    """[T, k] of the teacher's full softmax, in nats; -inf in unused places."""


def topk_divergence(
    student: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: Literal["reverse_kl", "forward_kl"] = "reverse_kl",
    *,
    student_weight: Tensor | None = None,
    form: TopkForm = "raw",
    shard: VocabShard | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """weights * divergence on the support, [T] in nats, fp32 (float64 for float64). `reference.topk_divergence` has
    the formulas: "raw" (MOPD Eq. 5), "tail", "renormalised". A log-prob counts as at least -1e4, on either side.

    Shapes: student: logits [T, columns], or hidden states [T, H] with student_weight [rows, H], of this rank's
    `shard`; topk_ids [T, k] global ids, the same on every rank, -1 for an unused place (`support` makes them);
    topk_logprobs [T, k] the teacher's log-probs at `temperature`, constants. weights [T] constants.

    Gradient: with h_i = dL / dlog p_i,  dz_j = (sum_i h_i 1[j = i] - p_j sum_i h_i) / temperature. From hidden
    states dX is this rank's share, to be summed over `shard.group`; dW is complete.

    Collectives: one all-gather of [3 + k, T] forward if `shard.group` has several ranks, none backward.

    Raises ValueError when shapes, dtypes or options do not fit, for an id outside the vocabulary or twice in a row.
    """
    if kind not in ("reverse_kl", "forward_kl"):
        raise ValueError(f"kind must be reverse_kl or forward_kl, got '{kind}'")
    if form not in get_args(TopkForm):
        raise ValueError(f"form must be one of {', '.join(get_args(TopkForm))}, got '{form}'")
    check_temperature(temperature)
    shard = shard or VocabShard.whole((student if student_weight is None else student_weight.t()).shape[-1])
    if student_weight is None:
        check_logits(student, shard)
    else:
        check_layer("student_", student, student_weight, shard)
    check_weights(weights, len(student), student.device)
    _check_support(topk_ids, topk_logprobs, student, shard.vocab_size)
    dtype = accumulation_dtype(student.dtype)
    kernels = row_kernels(
        impl, student.device, student.dtype if student_weight is None else dtype, len(student) * shard.rows
    )
    job = TokenJob(shard, kernels, temperature, chunk_tokens)
    if student_weight is None:
        log_p, _, _ = _from_logits(student, topk_ids, job)
    else:
        log_p, _, _ = _from_layer(student, student_weight, topk_ids, job)
    # float64 costs nothing at [T, k]; what is left outside the support is a difference of nearly equal numbers.
    used = topk_ids >= 0
    value = reference.topk_divergence(log_p.double(), topk_logprobs.detach().double(), kind, form, used)
    return weigh(value, weights).to(dtype)


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


@torch.no_grad()
def support(
    student_logits: Tensor | None,
    teacher_logits: Tensor,
    k: int,
    of: SupportOf = "teacher",
    *,
    shard: VocabShard | None = None,
    temperature: float = 1.0,
    impl: Implementation = "auto",
) -> Support:
    """The k most likely tokens of the teacher, of the student, or of either ("union": up to 2 k, the student's new
    ones after the teacher's), over all vocabulary shards, with the teacher's log-probs.

    logits [T, columns]; student_logits may be None for the teacher's. Of equal logits the lowest id wins.
    Collectives: an all-gather of [2 k, T] for each side that is searched, and one of [3 + k or 2 k, T].
    """
    if of not in get_args(SupportOf):
        raise ValueError(f"of must be one of {', '.join(get_args(SupportOf))}, got '{of}'")
    shard = shard or VocabShard.whole(teacher_logits.shape[-1])
    if not 0 < k <= shard.vocab_size:
        raise ValueError(f"k must be in [1, {shard.vocab_size}], got {k}")
    searched: dict[SupportOf, list[Tensor | None]] = {
        "teacher": [teacher_logits],
        "student": [student_logits],
        "union": [teacher_logits, student_logits],
    }
    check_temperature(temperature)
    check_logits(teacher_logits, shard)
    found = []
    for logits in searched[of]:
        if logits is None:
            raise ValueError(f"the support of the {of} needs student_logits")
        _check_alike(logits, teacher_logits)
        found.append(_global_top(logits[:, : shard.rows], k, shard))
    ids = found[0]
    if of == "union":
        new = (found[1][:, :, None] != found[0][:, None, :]).all(-1)
        ids = torch.cat((found[0], torch.where(new, found[1], -1)), -1)
    kernels = row_kernels(impl, teacher_logits.device, teacher_logits.dtype, teacher_logits.numel())
    logprobs, _, _ = _from_logits(teacher_logits, ids, TokenJob(shard, kernels, temperature))
    return Support(ids, logprobs)


def _check_alike(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.device != teacher.device or student.dtype not in FLOATS:
        given = (f"{name}_logits {tuple(each.shape)} {each.dtype} on {each.device}"
                 for name, each in (("student", student), ("teacher", teacher)))  # fmt: skip
        raise ValueError(f"{', '.join(given)}: expected the same shape and device")


def _global_top(logits: Tensor, k: int, shard: VocabShard) -> Tensor:
    """[T, k] ids of the largest logits over all shards, largest first. One all-gather of [2 k, T]."""
    mine = min(k, logits.shape[1])
    dtype = accumulation_dtype(logits.dtype)
    packet = torch.full((2 * k, len(logits)), -torch.inf, dtype=dtype, device=logits.device)
    packet[k:] = shard.vocab_size
    # Stable sorts, twice: torch.topk leaves open which of two equal logits it takes, and ranks must agree.
    values, places = logits.sort(dim=-1, descending=True, stable=True)
    packet[:mine], packet[k : k + mine] = values[:, :mine].t(), (places[:, :mine] + shard.start).t()
    gathered = shard.gather(packet)
    values, ids = gathered[:, :k].flatten(0, 1), gathered[:, k:].flatten(0, 1)
    # Places that a short shard could not fill come last, also after tokens of -inf.
    last = (ids == shard.vocab_size).to(torch.int8).sort(dim=0, stable=True).indices
    values, ids = values.gather(0, last), ids.gather(0, last)
    order = values.sort(dim=0, descending=True, stable=True).indices[:k]
    return ids.gather(0, order).t().long()

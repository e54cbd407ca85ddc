"""The k most likely tokens of a row, over all vocabulary shards, with the teacher's log-probs: what top-k objectives
are compared on. From logits, or from hidden states without a [T, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from kernels.dispatch import Implementation, row_kernels
from kernels.objective import FLOATS, accumulation_dtype, check_temperature
from kernels.output_layer import check_layer
from kernels.partials import PACKETS, combine_tokens
from kernels.rows_torch import EMPTY_SHARD_MAX
from kernels.selected import FromLayer, FromLogits, TokenJob
from kernels.shard import VocabShard
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

    Raises ValueError when shapes, dtypes, devices or options do not fit.
    """
    shard = shard or VocabShard.whole(teacher_logits.shape[-1])
    _check_options(k, of, shard)
    check_temperature(temperature)
    check_logits(teacher_logits, shard)
    found = {}
    for side, logits in (("teacher", teacher_logits), ("student", student_logits)):
        if of not in (side, "union"):
            continue
        if logits is None:
            raise ValueError(f"the support of the {of} needs student_logits")
        _check_alike(logits, teacher_logits)
        found[side] = _search_logits(logits[:, : shard.rows], k, shard)
    ids = _union(found) if of == "union" else found[of]
    kernels = row_kernels(impl, teacher_logits.device, teacher_logits.dtype, teacher_logits.numel())
    logprobs, _, _ = _from_logits(teacher_logits, ids, TokenJob(shard, kernels, temperature))
    return Support(ids, logprobs)


@torch.no_grad()
def linear_support(
    student_hidden: Tensor | None,
    student_weight: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    k: int,
    of: SupportOf = "teacher",
    *,
    shard: VocabShard | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    impl: Implementation = "auto",
) -> Support:
    """As `support`, of the logits X W^T: the blocks of `linear_divergence` recompute, and [T, 2 k] of what was found.

    Shapes: hidden [T, H], weight [rows, H] of this rank's `shard`; the student's may be None for the teacher's support.
    The teacher's takes one pass over its layer, the others two.

    Collectives: "teacher" one all-gather of [3 + 2 k, T]; else one of these for each side that is searched, and one of
    [3 + k or 2 k, T].

    Raises ValueError when shapes, dtypes, devices or options do not fit.
    """
    shard = shard or VocabShard.whole(len(teacher_weight))
    _check_options(k, of, shard)
    check_temperature(temperature)
    check_layer("teacher_", teacher_hidden, teacher_weight, shard)
    dtype, device = accumulation_dtype(teacher_hidden.dtype), teacher_hidden.device
    job = TokenJob(shard, row_kernels(impl, device, dtype, len(teacher_hidden) * shard.rows), temperature, chunk_tokens)
    found, logprobs = {}, None
    if of in ("student", "union"):
        if student_hidden is None or student_weight is None:
            raise ValueError(f"the support of the {of} needs student_hidden and student_weight")
        check_layer("student_", student_hidden, student_weight, shard)
        if len(student_hidden) != len(teacher_hidden) or student_hidden.device != device:
            given = f"{len(student_hidden)} rows on {student_hidden.device}"
            raise ValueError(f"student_hidden has {given}, teacher_hidden {len(teacher_hidden)} on {device}")
        found["student"], _ = _search_layer(student_hidden, student_weight, k, job)
    if of in ("teacher", "union"):
        found["teacher"], logprobs = _search_layer(teacher_hidden, teacher_weight, k, job)
    if of == "teacher" and logprobs is not None:
        return Support(found["teacher"], logprobs)
    ids = _union(found) if of == "union" else found[of]
    logprobs, _, _ = _from_layer(teacher_hidden, teacher_weight, ids, job)
    return Support(ids, logprobs)


def _check_options(k: int, of: SupportOf, shard: VocabShard) -> None:
    if of not in get_args(SupportOf):
        raise ValueError(f"of must be one of {', '.join(get_args(SupportOf))}, got '{of}'")
    if not 0 < k <= shard.vocab_size:
        raise ValueError(f"k must be in [1, {shard.vocab_size}], got {k}")


def _check_alike(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.device != teacher.device or student.dtype not in FLOATS:
        given = (f"{name}_logits {tuple(each.shape)} {each.dtype} on {each.device}"
                 for name, each in (("student", student), ("teacher", teacher)))  # fmt: skip
        raise ValueError(f"{', '.join(given)}: expected the same shape and device")


def _union(found: dict[str, Tensor]) -> Tensor:
    """[T, 2 k]: the teacher's, then those of the student's that are not among them, else -1."""
    new = (found["student"][:, :, None] != found["teacher"][:, None, :]).all(-1)
    return torch.cat((found["teacher"], torch.where(new, found["student"], -1)), -1)


def _search_logits(logits: Tensor, k: int, shard: VocabShard) -> Tensor:
    """[T, k] ids of the largest logits over all shards, largest first. One all-gather of [2 k, T]."""
    packet = _nothing(2 * k, len(logits), accumulation_dtype(logits.dtype), logits.device, shard)
    values, places = _local_top(logits, k)
    count = values.shape[1]
    packet[:count], packet[k : k + count] = values.t(), (places + shard.start).t()
    return _merged(shard.gather(packet), k, shard)[1]


def _search_layer(hidden: Tensor, weight: Tensor, k: int, job: TokenJob) -> tuple[Tensor, Tensor]:
    """As `_search_logits`, and their log-probs [T, k]. One all-gather of [3 + 2 k, T]: m, Z, A of `rows_torch`, too."""
    blocks, shard = job.layer_blocks(hidden, weight), job.shard
    packet = _nothing(2 * k, len(hidden), blocks.dtype, hidden.device, shard)
    sums: list[Tensor] = []
    for slab in blocks.slabs:
        part = torch.zeros(3, len(hidden), dtype=blocks.dtype, device=hidden.device)
        part[0] = EMPTY_SHARD_MAX
        for chunk in blocks.chunks:
            logits = blocks.student(slab, chunk)
            if not logits.numel():
                continue
            nobody = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            part[:, chunk] = job.kernels.token_sums(logits, nobody, nobody.bool())[:3]
            values, places = _local_top(logits, k)
            found = torch.cat((values, (places + (shard.start + slab.start)).to(blocks.dtype)), 1).t()
            # Those found before come first, and have lower ids.
            before, count = packet[:, chunk], values.shape[1]
            candidates = torch.cat((before[:k], found[:count])), torch.cat((before[k:], found[count:]))
            packet[:, chunk] = torch.cat(_largest(*candidates, k, shard))
        sums.append(part.double())
        if len(sums) == PACKETS:
            sums = [combine_tokens(torch.stack(sums), False)]
    own = torch.cat((combine_tokens(torch.stack(sums), False).to(blocks.dtype), packet))
    gathered = shard.gather(own)
    values, ids = _merged(gathered[:, 3:], k, shard)
    m, z, _ = combine_tokens(gathered[:, :3], False)
    return ids, (values.double() - (m + z.log())[:, None]).to(blocks.dtype)


def _nothing(size: int, tokens: int, dtype: torch.dtype, device: torch.device, shard: VocabShard) -> Tensor:
    """[2 k, T]: k logits of -inf and k ids that are none."""
    packet = torch.full((size, tokens), -torch.inf, dtype=dtype, device=device)
    packet[size // 2 :] = shard.vocab_size
    return packet


def _local_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[C, rows] -> the k (or all) largest and their places, largest first, of equals the lowest place."""
    values, places = logits.topk(min(k, logits.shape[1]), dim=-1)
    if values.shape[1]:
        # torch.topk leaves open which of several equals it takes where not all find room: those rows are sorted. On a
        # GPU the look at them waits for the queue.
        last = values[:, -1:]
        tied = (logits == last).sum(-1) > (values == last).sum(-1)
        if tied.any():
            every, order = logits[tied].sort(dim=-1, descending=True, stable=True)
            values[tied], places[tied] = every[:, : values.shape[1]], order[:, : values.shape[1]]
    places, order = places.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, places.gather(1, order)


def _largest(values: Tensor, ids: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """[n, T] twice, equals in the order of their ids -> [k, T] twice, the largest first."""
    # Places that a short part could not fill come last, also after tokens of -inf.
    last = (ids == shard.vocab_size).to(torch.int8).sort(dim=0, stable=True).indices
    values, ids = values.gather(0, last), ids.gather(0, last)
    values, order = values.sort(dim=0, descending=True, stable=True)
    return values[:k], ids.gather(0, order[:k])


def _merged(packets: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """[ranks, 2 k, T] logits and ids -> [T, k] logits, [T, k] int64 ids, largest first; the same on every rank."""
    values, ids = _largest(packets[:, :k].flatten(0, 1), packets[:, k:].flatten(0, 1), k, shard)
    return values.t(), ids.t().long()

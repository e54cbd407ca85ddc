"""Passes over the logits of one vocabulary shard, block by block, wherever the logits come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels.dispatch import RowKernels
from kernels.objective import Objective
from kernels.partials import PACKETS, STATS, Joined, combine
from kernels.shard import VocabShard


class Blocks(Protocol):
    """Logits of T tokens and this shard's rows, made or read one [chunk, slab] block at a time."""

    tokens: int
    dtype: torch.dtype
    """Of accumulation."""
    device: torch.device
    slabs: tuple[slice, ...]
    """Of the shard's rows, at least one, in order."""
    chunks: tuple[slice, ...]
    """Of the tokens; tokens in none of them have weight zero."""

    def student(self, slab: slice, chunk: slice) -> Tensor: ...
    def teacher(self, slab: slice, chunk: slice) -> Tensor: ...


@runtime_checkable
class BlocksWithoutLogits(Protocol):
    """Blocks that hand over sums and dlogits, and never make the logits."""

    def sums(self, slab: slice, chunk: slice) -> Tensor:
        """[6 or 8, C], as `RowKernels.divergence_sums` of one block."""
        ...

    def dlogits(self, slab: slice, chunk: slice, rows: Tensor) -> Tensor:
        """[C, rows of the slab] with rows [5, C], as `RowKernels.divergence_gradient`."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """What all passes of one call share."""

    objective: Objective
    shard: VocabShard
    kernels: RowKernels
    token_ids: Tensor | None = None
    """[T] global; log-probs of these are among the statistics."""
    stats: bool = False


def join(job: Job, blocks: Blocks) -> Joined:
    """First pass: the sums of all rows over the whole vocabulary. One all-gather if there are other ranks."""
    both = job.objective.both or job.stats
    size = 8 if both else 6
    parts: list[Tensor] = []
    for slab in blocks.slabs:
        packet = torch.zeros(
            size + (STATS if job.stats else 0), blocks.tokens, dtype=blocks.dtype, device=blocks.device
        )
        packet[1] = 1.0  # keeps rows that are in no chunk finite
        for chunk in blocks.chunks:
            if isinstance(blocks, BlocksWithoutLogits):
                packet[:, chunk] = blocks.sums(slab, chunk)
                continue
            student, teacher = blocks.student(slab, chunk), blocks.teacher(slab, chunk)
            packet[:size, chunk] = job.kernels.divergence_sums(student, teacher, both=both)
            if job.stats:
                packet[size:, chunk] = _stats(job, slab, chunk, student, teacher)
        parts.append(packet.double())
        if len(parts) == PACKETS:
            parts = [combine(torch.stack(parts))]
    own = parts[0] if len(parts) == 1 else combine(torch.stack(parts))
    return Joined(combine(job.shard.gather(own.to(blocks.dtype))))


def _stats(job: Job, slab: slice, chunk: slice, student: Tensor, teacher: Tensor) -> Tensor:
    """[STATS, C] of one block: z and t of the token if it is here, global ids of the largest logits."""
    result = torch.zeros(STATS, student.shape[0], dtype=torch.float64, device=student.device)
    if student.shape[1] == 0:
        return result
    first = job.shard.start + slab.start
    if job.token_ids is not None:
        local = job.token_ids[chunk].long() - first
        owned = (local >= 0) & (local < student.shape[1])
        local = local.clamp(0, student.shape[1] - 1)[:, None]
        for row, logits in enumerate((student, teacher)):
            result[row] = torch.where(owned, logits.gather(1, local)[:, 0].double(), 0.0)
    result[2], result[3] = student.argmax(-1) + first, teacher.argmax(-1) + first
    return result


def jsd(job: Job, blocks: Blocks, lse: Tensor) -> Tensor:
    """Second pass of jsd: [2, T] float64, KL(p || m) and KL(q || m). One all-gather if there are other ranks."""
    sums = torch.zeros(2, blocks.tokens, dtype=torch.float64, device=blocks.device)
    for slab in blocks.slabs:
        for chunk in blocks.chunks:
            student, teacher = blocks.student(slab, chunk), blocks.teacher(slab, chunk)
            sums[:, chunk] += job.kernels.jsd_sums(student, teacher, lse[:, chunk], job.objective.beta)
    found = job.shard.gather(sums.to(blocks.dtype)).double().sum(0)
    return found + 0.0 * found.flip(0)  # a NaN of the teacher's reaches the gradient through KL(p || m) only


@dataclass(frozen=True, slots=True)
class Result:
    """Of one forward: what is reported, and what the gradient needs."""

    value: Tensor
    """[T] float64, times the weights."""
    joined: Joined
    pair: Tensor | None
    """[4, T] of jsd: log-sum-exps in the accumulation dtype, KL(p || m), KL(q || m) in float64."""


def forward(job: Job, blocks: Blocks, weights: Tensor | None) -> Result:
    joined = join(job, blocks)
    pair = None
    if job.objective.kind == "jsd":
        lse = joined.lse().to(blocks.dtype)
        pair = torch.cat((lse.double(), jsd(job, blocks, lse)))
        value = (1.0 - job.objective.beta) * pair[2] + job.objective.beta * pair[3]
    else:
        value = joined.value(job.objective)
    return Result(weigh(value, weights), joined, pair)


def weigh(value: Tensor, weights: Tensor | None) -> Tensor:
    """weights * value, exactly 0 for rows of weight 0 whatever their logits are."""
    return value if weights is None else torch.where(weights != 0, value * weights, 0.0)


def coefficients(job: Job, result: tuple[Tensor, Tensor | None], upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """[5 or 4, T] for the gradient primitive; `upstream` [T] holds the weights. result: sums and pair."""
    sums, pair = result
    if pair is None:
        return Joined(sums).gradient_rows(job.objective, upstream).to(dtype)
    scale = upstream.double() / job.objective.temperature
    return torch.stack((pair[0], pair[1], pair[2], scale)).to(dtype)


def gradient(job: Job, student: Tensor, teacher: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """dlogits of one block into `out`, which may be `student`."""
    if job.objective.kind == "jsd":
        return job.kernels.jsd_gradient(student, teacher, rows, job.objective.beta, out)
    return job.kernels.divergence_gradient(student, teacher, rows, out)


class Collector(Protocol):
    """Takes dlogits, best where it has made `room` for them."""

    def room(self, logits: Tensor) -> Tensor: ...
    def add(self, slab: slice, chunk: slice, dlogits: Tensor) -> None: ...
    def finish_slab(self, slab: slice) -> None: ...


def backward(job: Job, blocks: Blocks, rows: Tensor, collector: Collector) -> None:
    """Every block's dlogits, handed to the collector. The blocks must be fresh: they are overwritten. No collective."""
    for slab in blocks.slabs:
        for chunk in blocks.chunks:
            part = rows[:, chunk].contiguous()
            if isinstance(blocks, BlocksWithoutLogits):
                dlogits = blocks.dlogits(slab, chunk, part)
            else:
                student = blocks.student(slab, chunk)
                dlogits = gradient(job, student, blocks.teacher(slab, chunk), part, collector.room(student))
            collector.add(slab, chunk, dlogits)
        collector.finish_slab(slab)


class Held:
    """One chunk's logits over the whole shard, already there."""

    def __init__(self, z: Tensor, t: Tensor) -> None:
        self.z, self.t = z, t
        self.tokens, self.dtype, self.device = len(z), z.dtype, z.device
        self.slabs: tuple[slice, ...] = (slice(0, z.shape[1]),)
        self.chunks: tuple[slice, ...] = (slice(0, len(z)),)

    def student(self, slab: slice, chunk: slice) -> Tensor:
        return self.z

    def teacher(self, slab: slice, chunk: slice) -> Tensor:
        return self.t


def statistics(job: Job, joined: Joined, dtype: torch.dtype) -> Tensor:
    """[6, T]: reverse KL, entropies, log p and log q of the token (NaN without token ids), top-1 agreement."""
    sums, lse = joined.sums, joined.lse()
    z, t, student_id, teacher_id = sums[-STATS:]
    if job.token_ids is None:
        z, t = torch.full_like(z, torch.nan), torch.full_like(t, torch.nan)
    agreement = (student_id == teacher_id).double()
    entropies = (joined.student_entropy(), joined.teacher_entropy())
    return torch.stack((joined.reverse_kl(), *entropies, z - lse[0], t - lse[1], agreement)).to(dtype)

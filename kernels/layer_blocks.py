"""Logits made from hidden states one block at a time, and how a call is cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.objective import active_runs, split
from kernels.output_layer import OutputLayer, check_layer
from kernels.shard import VocabShard

BLOCK_ELEMENTS = 1 << 22
"""Logits in a block, and weights in a slab: 16 MiB each in fp32, whatever the vocabulary and the tokens."""

CHUNK_ELEMENTS = 1 << 24
"""Logits in a chunk that spans the shard: 64 MiB in fp32."""

SMALLEST_SLAB = 1024
"""Rows below which a matrix product is slow."""

KEPT_ELEMENTS = 1 << 20
"""Up to here (4 MiB in fp32) forward keeps its logits for backward: cheaper than making them again."""


SMALLEST_CHUNK = {"cpu": 128, "cuda": 1024}
"""Tokens below which a product with the whole weight is slow: reading (and on a CPU packing) the weight shows."""


def whole_chunk(vocab_rows: int, device: torch.device) -> int:
    """Tokens whose logits over `vocab_rows` rows make a chunk."""
    return max(SMALLEST_CHUNK.get(device.type, 1), CHUNK_ELEMENTS // max(1, vocab_rows))


def cut(
    tokens: int, rows: int, hidden_size: int, chunk_tokens: int | None, weights: Tensor | None
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """(slabs of the rows, chunks of the tokens): few large blocks, whose size grows with neither number.

    With `chunk_tokens` the blocks have so many tokens.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    chunk = chunk_tokens or max(1, BLOCK_ELEMENTS // SMALLEST_SLAB)
    per_slab = BLOCK_ELEMENTS // max(1, min(chunk, tokens), hidden_size)
    slab = max(SMALLEST_SLAB, per_slab)
    slabs = tuple(slice(start, min(start + slab, rows)) for start in range(0, max(rows, 1), slab))
    return slabs, split(active_runs(weights, tokens), chunk)


@dataclass(frozen=True, slots=True)
class Teachers:
    """The teacher's side of every row; hidden sizes may differ from one another and from the student's.

    One head: every row. Several with `bounds`: head k has the rows [bounds[k], bounds[k + 1]), its hidden states
    only those. Several with `mixture` [K]: every row has the logits sum_k w_k t_k, which is the normalised
    geometric mean of the teachers; the gradient of the reverse KL is then that of sum_k w_k KL(p || q_k).
    """

    hidden: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]
    bounds: tuple[int, ...] = ()
    mixture: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        hidden: Tensor | Sequence[Tensor],
        weight: Tensor | Sequence[Tensor],
        index: Tensor | None,
        mixture: Sequence[float] | None,
        tokens: int,
    ) -> Teachers:
        """ValueError unless it is clear which teacher has which rows."""
        weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
        if index is not None and mixture is not None:
            raise ValueError("teacher_index routes each row to one teacher, teacher_mixture to all: give one of them")
        if index is None and mixture is None:
            if len(weights) != 1 or not isinstance(hidden, Tensor):
                raise ValueError(f"{len(weights)} teacher heads in a list need a teacher_index or a teacher_mixture")
            return cls((hidden,), weights)
        if mixture is not None:
            states = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
            if not len(states) == len(weights) == len(mixture):
                raise ValueError(f"{len(states)} teacher_hidden, {len(weights)} heads, {len(mixture)} mixture weights")
            return cls(states, weights, mixture=tuple(float(share) for share in mixture))
        assert index is not None
        bounds = _bounds(index, len(weights), tokens)
        if isinstance(hidden, Tensor):
            _same_rows(hidden, tokens)
            states = tuple(hidden[start:stop] for start, stop in pairwise(bounds))
        else:
            states = tuple(hidden)
            counts = tuple(stop - start for start, stop in pairwise(bounds))
            if tuple(map(len, states)) != counts:
                raise ValueError(f"teacher_hidden have {[*map(len, states)]} rows, teacher_index says {[*counts]}")
        return cls(states, weights, bounds)

    def check(self, shard: VocabShard, like: Tensor) -> None:
        for number, (hidden, weight) in enumerate(zip(self.hidden, self.weight, strict=True)):
            check_layer("teacher_" if len(self.hidden) == 1 else f"teacher {number}'s ", hidden, weight, shard)
            if not self.bounds:
                _same_rows(hidden, len(like), like)
            elif hidden.device != like.device:
                raise ValueError(f"student_hidden is on {like.device}, teacher {number}'s hidden on {hidden.device}")

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.hidden, *self.weight)


def _same_rows(teacher: Tensor, tokens: int, student: Tensor | None = None) -> None:
    device = teacher.device if student is None else student.device
    if len(teacher) != tokens or teacher.device != device:
        here, there = f"{tokens} rows on {device}", f"{len(teacher)} rows on {teacher.device}"
        raise ValueError(f"student_hidden has {here}, teacher_hidden {there}: they must describe the same tokens")


def _bounds(index: Tensor, heads: int, tokens: int) -> tuple[int, ...]:
    if index.shape != (tokens,) or index.is_floating_point():
        raise ValueError(f"teacher_index is {tuple(index.shape)} {index.dtype}: expected ({tokens},) integers")
    values = index.tolist()  # a few thousand small numbers
    for row, (before, after) in enumerate(pairwise(values)):
        if after < before:
            raise ValueError(f"rows are not sorted by teacher: row {row + 1} has teacher {after} after {before}")
    if values and not (values[0] >= 0 and values[-1] < heads):
        raise ValueError(f"teacher_index has {values[0]} to {values[-1]}, but there are {heads} teacher heads")
    counts = torch.bincount(index.cpu().long(), minlength=heads).cumsum(0).tolist()
    return (0, *counts)


class LayerBlocks:
    """`sweep.Blocks` of hidden states and output layers, logits divided by the temperature."""

    def __init__(
        self,
        student: OutputLayer,
        teachers: Teachers,
        slabs: tuple[slice, ...],
        chunks: tuple[slice, ...],
        temperature: float,
    ) -> None:
        self.tokens, self.dtype, self.device = len(student.hidden), student.dtype, student.hidden.device
        self.slabs = slabs
        self.layer, self.temperature, self.teachers = student, temperature, teachers
        rows = len(student.weight)
        self.heads = [
            OutputLayer(h, w, rows, self.dtype) for h, w in zip(teachers.hidden, teachers.weight, strict=True)
        ]
        self.chunks = tuple(piece for chunk in chunks for piece in self._by_teacher(chunk))

    def _by_teacher(self, chunk: slice) -> list[slice]:
        """Cut where the next teacher's rows begin."""
        edges = [edge for edge in sorted({*self.teachers.bounds}) if chunk.start < edge < chunk.stop]
        marks = [chunk.start, *edges, chunk.stop]
        return [slice(start, stop) for start, stop in pairwise(marks)]

    def student(self, slab: slice, chunk: slice) -> Tensor:
        return self._tempered(self.layer.logits(slab, chunk))

    def teacher(self, slab: slice, chunk: slice) -> Tensor:
        if self.teachers.mixture:
            parts = zip(self.heads, self.teachers.mixture, strict=True)
            logits = sum(head.logits(slab, chunk).mul_(share) for head, share in parts)
            assert isinstance(logits, Tensor)
            return self._tempered(logits)
        head, part = self.owner(chunk)
        return self._tempered(head.logits(slab, part))

    def owner(self, chunk: slice) -> tuple[OutputLayer, slice]:
        """The teacher of a chunk, and where its rows are among that teacher's hidden states. Not for mixtures."""
        heads, bounds = self.heads, self.teachers.bounds
        if not bounds:
            return heads[0], chunk
        owner = max(k for k in range(len(heads)) if bounds[k] <= chunk.start < bounds[k + 1] or k == 0)
        return heads[owner], slice(chunk.start - bounds[owner], chunk.stop - bounds[owner])

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

"""Which rows of an output layer a rank holds, and the one collective that joins the ranks' row sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

LARGEST_VOCABULARY = 1 << 24
"""Ids travel in fp32."""


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Rows [start, stop) of a vocabulary of `vocab_size` tokens, held by one rank of `group`.

    The local weight may have more rows than `stop - start` on the rank(s) where the vocabulary ends:
    Megatron pads it to a multiple of the tensor-parallel size. Padding takes no part in the softmax and gets
    a gradient of exactly zero. A shard is empty (start == stop) where padding swallows the whole rank.
    The shards of a group must tile the vocabulary, in rank order: `gather` checks it. Vocabularies up to 2^24.
    """

    start: int
    stop: int
    vocab_size: int
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.vocab_size or self.vocab_size == 0:
            raise ValueError(f"rows [{self.start}, {self.stop}) are not a part of a vocabulary of {self.vocab_size}")
        if self.vocab_size > LARGEST_VOCABULARY:
            raise ValueError(f"vocabularies of up to {LARGEST_VOCABULARY} tokens are possible, got {self.vocab_size}")
        if self.ranks == 1 and self.rows != self.vocab_size:
            raise ValueError(
                f"rows [{self.start}, {self.stop}) of {self.vocab_size} and no other rank: "
                "pass the group that holds the rest"
            )

    @classmethod
    def of_rank(cls, rows_per_rank: int, vocab_size: int, group: ProcessGroup | None) -> VocabShard:
        """Megatron's layout: rank r of `group` holds [r * rows, (r + 1) * rows), cut at `vocab_size`.

        Raises ValueError when the ranks together have fewer rows than the vocabulary.
        """
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if rows_per_rank * ranks < vocab_size:
            raise ValueError(f"{ranks} rank(s) of {rows_per_rank} rows cannot hold a vocabulary of {vocab_size}")
        start = min(rank * rows_per_rank, vocab_size)
        return cls(start, min(start + rows_per_rank, vocab_size), vocab_size, group)

    @classmethod
    def whole(cls, vocab_size: int) -> VocabShard:
        """The vocabulary on one rank."""
        return cls(0, vocab_size, vocab_size)

    @property
    def rows(self) -> int:
        """How many rows of the local weight are tokens."""
        return self.stop - self.start

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def check_rows(self, rows: int, given: str) -> None:
        """ValueError unless `rows` local rows (or columns of logits) fit: padding only where the vocabulary ends."""
        surplus = rows - self.rows
        if surplus < 0 or (surplus > 0 and self.stop < self.vocab_size):
            held = f"rows [{self.start}, {self.stop}) of {self.vocab_size}"
            raise ValueError(f"{given}: the shard holds {held}, padding is allowed only after the last")

    def gather(self, packet: Tensor) -> Tensor:
        """[k, T] of this rank -> [ranks, k, T] of all, in rank order: one all-gather, none when alone.

        Called exactly once per forward, also for T = 0, so that ranks never wait for one another in vain. The
        bounds of the shards travel along in a column of their own; ValueError on every rank, with all bounds,
        unless they cover the vocabulary exactly once in rank order (on a GPU only the first time, as looking at
        them stalls the queue).
        """
        if self.ranks == 1:
            return packet[None]
        k, tokens = packet.shape
        own = packet.new_zeros(k, tokens + 1)
        own[:, :tokens] = packet
        own[0, tokens], own[1, tokens] = self.start, self.stop
        if k > 2:  # a packet of two is jsd's second
            own[2, tokens] = self.vocab_size
        gathered = packet.new_empty(self.ranks * k, tokens + 1)
        # torch 2.13 renamed it; the GPU images still carry older releases.
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        all_gather(gathered, own, group=self.group)
        packets = gathered.view(self.ranks, k, tokens + 1)
        if not packet.is_cuda or self not in _COVERING:
            self._check_cover(packets[:, :3, tokens].long().tolist())
            _COVERING.add(self)
        return packets[:, :, :tokens]

    def _check_cover(self, bounds: list[list[int]]) -> None:
        """bounds: start, stop and perhaps vocab_size of each rank."""
        sizes = sorted({each[2] for each in bounds if len(each) > 2})
        if len(sizes) > 1:
            raise ValueError(f"the ranks hold parts of vocabularies of {' and '.join(map(str, sizes))}")
        reached = 0
        for start, stop, *_ in bounds:
            if start != reached:
                break
            reached = stop
        else:
            if reached == self.vocab_size:
                return
        held = ", ".join(f"[{start}, {stop})" for start, stop, *_ in bounds)
        raise ValueError(f"the ranks hold rows {held}: together not {self.vocab_size} rows exactly once in rank order")


_COVERING: set[VocabShard] = set()
"""Shards of this process whose group has been seen to cover the vocabulary (looked at for GPUs only)."""

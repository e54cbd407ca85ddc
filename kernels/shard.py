"""Which rows of an output layer a rank holds, and the one collective that joins the ranks' row sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Rows [start, stop) of a vocabulary of `vocab_size` tokens, held by one rank of `group`.

    The local weight may have more rows than `stop - start` on the rank(s) where the vocabulary ends:
    Megatron pads it to a multiple of the tensor-parallel size. Padding takes no part in the softmax and gets
    a gradient of exactly zero. A shard is empty (start == stop) where padding swallows the whole rank.
    The shards of a group must tile the vocabulary; one rank alone cannot check that.
    """

    start: int
    stop: int
    vocab_size: int
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.vocab_size or self.vocab_size == 0:
            raise ValueError(f"rows [{self.start}, {self.stop}) are not a part of a vocabulary of {self.vocab_size}")
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

    def gather(self, packet: Tensor) -> Tensor:
        """[k, T] of this rank -> [ranks, k, T] of all, in rank order: one all-gather, none when alone.

        Called exactly once per forward, also for T = 0, so that ranks never wait for one another in vain.
        """
        if self.ranks == 1:
            return packet[None]
        gathered = packet.new_empty(self.ranks * packet.shape[0], packet.shape[1])
        # torch 2.13 renamed it; the GPU images still carry older releases.
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        all_gather(gathered, packet.contiguous(), group=self.group)
        return gathered.view(self.ranks, *packet.shape)

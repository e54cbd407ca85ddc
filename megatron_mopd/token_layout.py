"""Where the tokens of a micro-batch lie: sequences end to end, and which of them each context-parallel rank holds.

Causal attention gives late tokens more work than early ones. So with C context ranks every sequence is cut into 2C
equal chunks, and rank r holds chunks r and 2C - 1 - r: as much work on every rank (Llama 3, arXiv 2407.21783 sec.
3.3.2). It is the cut that Transformer Engine's "thd" attention expects (`get_batch_on_this_cp_rank`); a CPU uses the
same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mopd.types import BoolArray, IntArray


def held_tokens(starts: IntArray, context_ranks: int, context_rank: int) -> IntArray:
    """[S / C] indices into the S packed tokens: those that a context rank holds, in the order in which it holds them.

    starts: [N + 1] boundaries of the sequences, each of a multiple of 2C tokens (of any number, where C is 1).
    """
    if context_ranks == 1:
        return np.arange(starts[-1])
    chunks = np.diff(starts) // (2 * context_ranks)
    held = [np.zeros(0, np.int64)]
    for start, size in zip(starts, chunks, strict=False):
        for chunk in (context_rank, 2 * context_ranks - 1 - context_rank):
            held.append(np.arange(start + chunk * size, start + (chunk + 1) * size))
    return np.concatenate(held)


def padded_length(tokens: int, context_ranks: int) -> int:
    """Tokens that a sequence of `tokens` takes in a micro-batch."""
    multiple = 2 * context_ranks if context_ranks > 1 else 1
    return -(-tokens // multiple) * multiple


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """N sequences in S packed tokens, each followed by its padding, and this rank's share of the S."""

    starts: IntArray
    """[N + 1] boundaries; a sequence begins with its tokens and ends with its padding."""
    held: IntArray
    """[S / C] what this context rank holds, as indices into S."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], *, multiple_of: int = 1, context_ranks: int = 1, context_rank: int = 0
    ) -> TokenLayout:
        """Sequences of `lengths` tokens; where it is needed one more, a dummy, so that every context rank holds a
        multiple of `multiple_of` tokens (sequence parallelism cuts them), and not none."""
        padded = [padded_length(length, context_ranks) for length in lengths]
        per_rank = math.lcm(2, multiple_of) if context_ranks > 1 else multiple_of
        dummy = -sum(padded) % (context_ranks * per_rank) if padded else context_ranks * per_rank
        starts = np.concatenate([[0], np.cumsum([*padded, dummy] if dummy else padded)]).astype(np.int64)
        return cls(starts, held_tokens(starts, context_ranks, context_rank))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with its padding, over all context ranks."""
        return int(np.diff(self.starts).max())

    def tokens(self, sequences: Sequence[NDArray[Any]], dtype: Any = np.int64, *, padding: int = 0) -> NDArray[Any]:
        """[T_n, ...] of each sequence, index t for its token t -> [S / C, ...] of the tokens held here and of padding.

        Dummies need no entry. For whatever a rollout carries per token: ids, routed experts.
        """
        tail = sequences[0].shape[1:] if sequences else ()
        packed = np.full((int(self.starts[-1]), *tail), padding, dtype)
        for start, values in zip(self.starts, sequences, strict=False):
            packed[start : start + len(values)] = values
        return packed[self.held]

    def positions(self) -> IntArray:
        """[S / C] the place of each token held here in its whole sequence; padding goes on counting."""
        lengths = np.diff(self.starts)
        return (np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], lengths))[self.held]

    def rows(self, packed: IntArray) -> tuple[IntArray, BoolArray]:
        """Of indices into the S packed tokens: which are held here, and where. ([kept] into S / C, [all] kept?)."""
        place = np.full(int(self.starts[-1]), -1)
        place[self.held] = np.arange(len(self.held))
        found = place[packed]
        return found[found >= 0], found >= 0

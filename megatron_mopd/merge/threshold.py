"""The k-th largest of more numbers than fit in memory: exact, in a few passes.

Non-negative float64 numbers are in the order of their bit patterns. A pass counts them by 16 bits of the pattern,
from the top; the bin in which the k-th largest lies is looked at with the next 16 bits, and as soon as it holds
few enough numbers they are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from torch import Tensor

Passes = Callable[[], Iterable[Tensor]]
"""Gives all numbers again, in pieces: 1-D float64 tensors, finite and >= 0."""
_COUNTED = 1 << 16
"""More numbers than this are counted before any are collected: selecting takes longer, most of all among equal ones."""
_COLLECTED = 1 << 20
"""Numbers that are held at once: 8 MiB."""
_BITS = 16
_SHIFTS = (48, 32, 16, 0)
"""Of the lowest bit of each level; 4 x 16 = 64 bits of a float64."""


def kth_largest(
    values: Passes, size: int, rank: Callable[[int], int], counted: int = _COUNTED, collected: int = _COLLECTED
) -> float:
    """The k-th largest (k = 1: the largest) of `size` numbers; exact. Reads them one to five times.

    `rank` gives k from the number of those that are not 0.
    """
    if size <= counted:
        numbers = np.concatenate([piece.numpy() for piece in values()])
        return _select(numbers, rank(int(np.count_nonzero(numbers))))
    nonzero = 0

    def noting() -> Iterator[npt.NDArray[np.int64]]:
        nonlocal nonzero
        for piece in values():
            nonzero += int(np.count_nonzero(piece.numpy()))
            yield piece.numpy().view(np.int64)

    counts = _count(noting(), _SHIFTS[0])
    chosen, k = _bin(counts, rank(nonzero))
    prefix = chosen
    for above, shift in pairwise(_SHIFTS):
        if counts[chosen] <= collected:
            inside = list(_inside(values, prefix, above))
            return _select(np.concatenate(inside).view(np.float64), k)
        counts = _count(_inside(values, prefix, above), shift)
        chosen, k = _bin(counts, k)
        prefix = prefix << _BITS | chosen
    return float(np.int64(prefix).view(np.float64))


def _count(pieces: Iterable[npt.NDArray[np.int64]], shift: int) -> npt.NDArray[np.int64]:
    """How many of the patterns have each value of the 16 bits from `shift` on."""
    counts = np.zeros(1 << _BITS, dtype=np.int64)
    for piece in pieces:
        counts += np.bincount((piece >> shift) & ((1 << _BITS) - 1), minlength=1 << _BITS)
    return counts


def _bin(counts: npt.NDArray[np.int64], k: int) -> tuple[int, int]:
    """The bin in which the k-th largest lies, and how many-th largest it is there."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, k))
    return len(counts) - 1 - index, k - (int(above[index - 1]) if index else 0)


def _inside(values: Passes, prefix: int, shift: int) -> Iterator[npt.NDArray[np.int64]]:
    """The patterns whose bits from `shift` on are `prefix`."""
    for piece in values():
        patterns = piece.numpy().view(np.int64)
        yield patterns[patterns >> shift == prefix]


def _select(numbers: npt.NDArray[np.float64], k: int) -> float:
    return float(np.partition(numbers, len(numbers) - k)[len(numbers) - k])

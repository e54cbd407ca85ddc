"""The k-th largest of more numbers than fit in memory: exact, in a few passes.

Non-negative float64 numbers are in the order of their bit patterns. A pass counts them by 16 bits of the pattern,
from the top; the bin in which the k-th largest lies is looked at with the next 16 bits, and as soon as it holds
few enough numbers they are collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

Passes = Callable[[], Iterable[Tensor]]
"""Gives all numbers again, in pieces: 1-D float64 tensors, finite and >= 0."""
_COLLECTED = 1 << 23
"""Numbers that are held at once: 64 MiB."""
_BITS = 16
_LEVELS = (48, 32, 16, 0)
"""The lowest bit of each level; 4 x 16 = 64 bits of a float64."""


def kth_largest(values: Passes, size: int, k: int, collected: int = _COLLECTED) -> float:
    """The k-th largest (k = 1: the largest) of `size` numbers; exact. Reads them one to five times."""
    prefix, level = 0, -1  # of the bin: its leading bits, and how many levels of them
    while size > collected and level < len(_LEVELS) - 1:
        counts, low, high = _count(values, prefix, level)
        if low == high:
            return low
        # From the top: the bin in which the running count reaches k.
        running = np.cumsum(counts[::-1])
        index = int(np.searchsorted(running, k))
        chosen = len(counts) - 1 - index
        k -= int(running[index - 1]) if index else 0
        size, prefix, level = int(counts[chosen]), prefix << _BITS | chosen, level + 1
    if level == len(_LEVELS) - 1:
        return float(np.int64(prefix).view(np.float64))
    inside = np.concatenate([_inside(piece, prefix, level).numpy() for piece in values()])
    inside.partition(size - k)
    return float(inside[size - k])


def _inside(piece: Tensor, prefix: int, level: int) -> Tensor:
    """Those numbers of `piece` whose leading bits are `prefix`; before the first level, all."""
    return piece if level < 0 else piece[piece.view(torch.int64) >> _LEVELS[level] == prefix]


def _count(values: Passes, prefix: int, level: int) -> tuple[np.ndarray, float, float]:
    """How many numbers of the bin there are in each of its parts, and its smallest and largest number."""
    counts = torch.zeros(1 << _BITS, dtype=torch.int64)
    low, high = float("inf"), float("-inf")
    for piece in values():
        inside = _inside(piece, prefix, level)
        if inside.numel():
            part = inside.view(torch.int64) >> _LEVELS[level + 1] & ((1 << _BITS) - 1)
            counts += torch.bincount(part, minlength=1 << _BITS)
            low, high = min(low, float(inside.min())), max(high, float(inside.max()))
    return counts.numpy(), low, high

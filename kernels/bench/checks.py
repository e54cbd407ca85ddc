"""What `--check` demands. Each function returns a line for every bar that is missed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kernels.bench.linear import Floor
from kernels.bench.measure import Measured

FASTER, SMALLER = 10.0, 20.0
"""`divergence`: times faster than eager torch, times less memory than it."""
LINEAR_FASTER, LINEAR_PEAKS = 1.5, (("ours A", 0.7), ("ours B", 0.1))
"""`linear_divergence`: A that many times faster than eager and Liger; peaks at most that share of theirs."""
LOOSE_MIB = 24.0
"""`memory`: what the allocator of a process may differ from run to run."""
STATES = 4.0
"""`memory`: [T, H] tensors in fp32 that may exist: the sum of dX, its part of a block, dX, the hidden states."""


def _seconds(each: Measured) -> float:
    return statistics.median(each.seconds)


def logits_missed(measured: Sequence[Measured]) -> list[str]:
    """Our fastest against the first, eager torch. Peaks below 1 MiB count as 1."""
    ours = min((each for each in measured if each.name.startswith("ours")), key=_seconds)
    faster, smaller = _seconds(measured[0]) / _seconds(ours), measured[0].peak / max(ours.peak, 1.0)
    found = []
    if not faster >= FASTER:
        found.append(f"{ours.name} is {faster:.1f}x faster than {measured[0].name}, the bar is {FASTER:g}x")
    if not smaller >= SMALLER:
        found.append(f"{ours.name} takes 1/{smaller:.1f} of the memory of {measured[0].name}, the bar is 1/{SMALLER:g}")
    return found


def linear_missed(measured: Sequence[Measured]) -> list[str]:
    """Against eager torch and each of Liger's that ran."""
    peers = [each for each in measured if each.name == "eager" or each.name.startswith("liger")]
    found = []
    for each in measured:
        for prefix, share in LINEAR_PEAKS:
            if not each.name.startswith(prefix):
                continue
            for peer in peers:
                if not each.peak <= share * peer.peak:
                    found.append(f"{each.name}: peak {each.peak:.0f} MiB, the bar is {share:g} of the "
                                 f"{peer.peak:.0f} of {peer.name}")  # fmt: skip
                faster = _seconds(peer) / _seconds(each)
                if prefix == "ours A" and not faster >= LINEAR_FASTER:
                    found.append(f"{each.name} is {faster:.2f}x faster than {peer.name}, the bar is {LINEAR_FASTER:g}x")
    return found


def memory_missed(floors: Sequence[Floor]) -> list[str]:
    """Growth from the first over what `STATES` tensors of [T, H] explain."""
    base, found = floors[0], []
    for each in floors[1:]:
        allowed = base.peak + STATES * (each.states - base.states) + LOOSE_MIB
        if not each.peak <= allowed:
            found.append(f"T={each.tokens}: peak {each.peak:.0f} MiB, the bar is {allowed:.0f}: the {base.peak:.0f} of "
                         f"T={base.tokens} and {STATES:g} more [T, H]")  # fmt: skip
    return found

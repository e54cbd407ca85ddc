"""What the three ways of sending weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from megatron_mopd.rollout.sync.buckets import Weights
from megatron_mopd.rollout.sync.recipients import Recipients

Deliver = Callable[[Recipients], None]
"""Bring the weights to the live servers, which are paused; those that cannot take them drop out."""


class Transport(Protocol):
    @property
    def in_parts(self) -> bool:
        """Whether servers get the weights in several requests, in a session of begin and end."""
        ...

    def stage(self, weights: Weights, num_updates: int) -> Deliver:
        """What can be done before any server is paused. Raises ConfigError where the weights cannot be kept."""
        ...

    def staged(self) -> tuple[Weights, int, Deliver] | None:
        """The last weights once more (and their number of updates), where they are kept outside the student."""
        ...

    def forget(self, recipients: Recipients, restarted: frozenset[str]) -> None:
        """Before an update: these servers were started anew, or left out of the last one."""
        ...

    def close(self) -> None: ...

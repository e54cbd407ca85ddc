"""The contract of an environment: the student's turns in as token ids, what comes back between them out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from megatron_mopd.types import IntArray, Prompt

Failure = Literal["unreachable", "timeout", "refused", "bad_answer", "sandbox"]
"""What went wrong on the environment's side: no connection · no answer in time · an HTTP code · an answer that is not
of the protocol · no sandbox could be made."""


class EnvironmentFailure(Exception):
    """The environment cannot go on with an episode. It ends that episode, is counted, and never ends the run."""

    def __init__(self, reason: Failure, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _no_tokens() -> IntArray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What an environment says to a turn."""

    token_ids: IntArray = field(default_factory=_no_tokens)
    """[E] appended to the conversation as they are; the student goes on from there. Never trained on."""
    done: bool = False
    reward: float | None = None
    """Of the whole episode, in [0, 1], with the last observation; None: the domain's verifier decides."""
    calls: int = 0
    """Tool calls that were run."""
    calls_failed: int = 0
    """Those that ended in an error, at a limit, or could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One answer of the student's."""

    token_ids: IntArray
    """[R] just sampled, the stop token included where there is one."""
    number: int
    """0 for the first."""
    room: int
    """Tokens that the episode has left, for the observation and the student's next turn together."""


class Environment(Protocol):
    """One tool or agent environment; holds no episode in memory that a later step of training depends on.

    All three are called from several threads at once, of one episode from one at a time. They raise
    `EnvironmentFailure` and block for at most `seconds` and what it takes to notice.
    """

    def reset(self, episode: str, prompt: Prompt, sample: int, seed: int, seconds: float) -> Observation:
        """Begin. What is returned is appended to the prompt. `episode` is unique in the run and repeats in none."""
        ...

    def step(self, episode: str, turn: Turn, seconds: float) -> Observation:
        """Answer a turn."""
        ...

    def close(self, episode: str) -> None:
        """The episode is over before the environment said so. Never raises."""
        ...

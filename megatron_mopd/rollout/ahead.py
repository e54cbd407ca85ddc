"""Prompts that are answered while the ranks do something else, and which a step takes.

With `rollout.lag` they are answered ahead of the step that trains on them, with `rollout.waves` while teachers score
those of the step that were answered first.
Every rank draws the same prompts in the same order as without a lag, so many that a fixed number is in play; rank 0 has
them answered while all ranks train. Three ways, with n = `prompts_per_step` and a lag of L steps:

| over_sample | partial | in play while step s waits | step s takes |
|---|---|---|---|
| 1 | | n (1 + L): its own and those of the next L steps | its own: the n that step s has without a lag |
| f > 1 | no | f n + (L - 1) n | those begun L steps ago, and the first answered of the others |
| f > 1 | yes | f n | the same; the others are stopped, and go on from there in step s + 1 |

**Staleness.** A prompt that is begun in step s, with the weights of step s, is trained on in step s + L at the
latest: that step waits for it, and no step takes so many others that more than `prompts_per_step` would be due in a
later one. So no token is of weights older than those of step s - L when step s begins, which `check_staleness` makes
sure of; nothing has to be dropped for its age. (Within a step, `optim.updates_per_step` adds up to that many less
one, as without a lag.)

**No bias towards short answers.** A step that takes the first n of f n answers takes short ones: with independent
lengths of distribution F, the shortest 1/f of them, whose mean E[X | X < F^-1(1/f)] is below E[X] for any f > 1. Were
the rest dropped, every step would be like that. Here they stay in play and are due within L steps, so that the
answers of steps 0..S-1 are those of the first n S prompts drawn, but for at most (f - 1 + L) n that are in play at
the end, whose place was taken by as many others. So the bias of the mean length over S steps is of order (f - 1 + L)
/ S, and nothing is left of it at the end of the run, when nothing is left in play. Within a step short and long
answers are unequally old, which is what `objective.importance` weighs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_mopd.config import RolloutSpec, RunConfig
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.rollout.sglang.engine import SglangEngine
from megatron_mopd.rollout.staleness import check_staleness, staleness_metrics
from megatron_mopd.types import Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A prompt in play: begun, and not trained on yet."""

    prompt: Prompt
    batch: int
    """The step that it would be of without a lag: its share of domains and its seed are of that one."""
    begun: int
    """The step in which it was begun."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """`prompts_per_step` prompts as they were drawn."""

    batch: int
    cursors: dict[str, Any]
    """`DomainMixer.state_dict` before it."""
    ids: tuple[str, ...]


def prompts_in_play(spec: RolloutSpec, prompts_per_step: int, steps_left: int) -> int:
    """How many are begun and not trained on while a step waits; see above. No more than the run still trains on."""
    ahead = 0 if spec.partial else spec.lag if spec.over_sample == 1 else spec.lag - 1
    more = math.ceil(round((spec.over_sample - 1) * prompts_per_step, 6))
    return min((1 + ahead) * prompts_per_step + more, steps_left * prompts_per_step)


def choose(
    in_play: Sequence[Ticket], answered: Sequence[str], step: int, spec: RolloutSpec, prompts_per_step: int, left: int
) -> list[str] | None:
    """Ids of prompts that `step` trains on, in the order they were drawn in; None while it has to wait.

    in_play: in the order drawn. answered: ids, the first answered first. left: how many prompts the step still takes:
    of `prompts_per_step` all, or with `rollout.waves` at least a wave of them.
    """
    taken: list[str] = []
    if spec.over_sample == 1:
        there = set(answered)
        taken = [ticket.prompt.id for ticket in in_play[:left] if ticket.prompt.id in there]
        return taken if len(taken) >= min(left, math.ceil(prompts_per_step / spec.waves)) else None
    for steps in range(spec.lag + 1):
        due = {ticket.prompt.id for ticket in in_play if ticket.begun <= step + steps - spec.lag}
        # The next `steps` steps can take so many of them.
        needed = len(due) - steps * prompts_per_step - len(taken)
        ready = [identity for identity in answered if identity in due and identity not in taken]
        if len(ready) < needed:
            return None
        taken += ready[: max(0, needed)]
    others = [identity for identity in answered if identity not in taken]
    taken += others[: prompts_per_step - len(taken)]
    if len(taken) < prompts_per_step:
        return None
    return [ticket.prompt.id for ticket in in_play if ticket.prompt.id in taken]


class Ahead:
    """What is in play. Every rank has one, and the same."""

    def __init__(self, config: RunConfig, mixer: DomainMixer, engine: SglangEngine, first_step: int):
        """A run that goes on from a checkpoint calls `load_state_dict`."""
        self._config, self._mixer, self._engine = config, mixer, engine
        self._next_batch = first_step
        self._trained: set[str] = set()
        """Of the prompts of `_draws`, and of those to be drawn again after a resume."""
        self._draws: deque[_Draw] = deque()
        self._drawn: deque[tuple[Prompt, int]] = deque()
        """(prompt, batch), not begun yet."""
        self._in_play: dict[str, Ticket] = {}
        self._versions: dict[int, int] = {}
        """Step -> version of the weights it began with, of the last `lag + 1` steps of this process."""
        self.metrics: dict[str, float] = {}
        """Of the last `collect`."""

    def collect(self, step: int) -> Iterator[tuple[list[Prompt], list[Rollout]]]:
        """The prompts that `step` trains on, and this rank's rollouts: of every world-size-th prompt. In up to
        `rollout.waves` parts, each as soon as it is there. Collective."""
        config = self._config
        self._versions = {s: v for s, v in self._versions.items() if s >= step - config.rollout.lag}
        self._versions[step] = self._engine.policy_version
        begun = self._begin(step)
        # As without a lag, where a step's seed is of the step.
        self._engine.begin([t.prompt for t in begun], [config.seed * 1_000_003 + t.batch for t in begun])
        left = config.prompts_per_step
        while left:
            ids, rollouts = self._engine.take(partial(self._choose, step=step, left=left))
            left -= len(ids)
            taken = {identity: self._in_play.pop(identity).prompt for identity in ids}
            self._trained.update(ids)
            self._forget_trained_draws()
            yield list(taken.values()), rollouts

    def _choose(self, answered: Sequence[str], step: int, left: int) -> list[str] | None:
        spec, in_play = self._config.rollout, tuple(self._in_play.values())
        return choose(in_play, answered, step, spec, self._config.prompts_per_step, left)

    def check(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Raise ValueError where a token of `step` is older than `rollout.lag` allows; else set `metrics`."""
        newest, oldest = self._versions[step], min(self._versions.values())
        check_staleness(rollouts, oldest=oldest, newest=newest)
        carried = sum(ticket.begun < step for ticket in self._in_play.values())
        self.metrics = {
            **staleness_metrics(rollouts, newest, self._config.domain_names),
            "prompts_in_play": float(len(self._in_play)),
            "prompts_carried": float(carried),
        }
        if self._config.rollout.partial:
            self.metrics["kept_tokens"] = float(self._engine.kept_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Where a resume draws from, for JSON: what is in play is drawn again, what was trained on is not.

        cursors: `DomainMixer.state_dict` before the first batch with a prompt that is not trained on; batch: which one;
        trained: ids of those that are, of that batch and later ones.
        """
        if not self._draws:
            cursors, batch = self._mixer.state_dict(), self._next_batch
        else:
            cursors, batch = self._draws[0].cursors, self._draws[0].batch
        return {"cursors": cursors, "batch": batch, "trained": sorted(self._trained)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the mixer gets its `cursors` by itself."""
        self._next_batch, self._trained = state["batch"], set(state["trained"])

    def _begin(self, step: int) -> list[Ticket]:
        config = self._config
        wanted = prompts_in_play(config.rollout, config.prompts_per_step, config.steps - step)
        begun = []
        while len(self._in_play) < wanted:
            while not self._drawn:
                self._draw()
            prompt, batch = self._drawn.popleft()
            ticket = Ticket(prompt=prompt, batch=batch, begun=step)
            self._in_play[prompt.id] = ticket
            begun.append(ticket)
        return begun

    def _draw(self) -> None:
        batch, cursors = self._next_batch, self._mixer.state_dict()
        prompts = self._mixer.draw(self._config.prompts_per_step, batch)
        self._draws.append(_Draw(batch, cursors, tuple(prompt.id for prompt in prompts)))
        self._drawn.extend((prompt, batch) for prompt in prompts if prompt.id not in self._trained)
        self._next_batch += 1

    def _forget_trained_draws(self) -> None:
        while self._draws and self._trained.issuperset(self._draws[0].ids):
            self._trained.difference_update(self._draws.popleft().ids)

"""A run's steps in time: who waits for whom when nodes train or answer, strictly on-policy or with a lag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

STEPS = 12
"""That are simulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Of the steps after the first `lag + 1`, which fill the pipe."""

    step_seconds: float
    train_idle: float
    """Share of the time that the training GPUs wait."""
    rollout_idle: float


def simulate(generation: Sequence[float], train: float, sync: float, lag: int, colocated: bool = False) -> Timeline:
    """generation: seconds that each step's answers take; train: scoring, swaps and updates; sync: new weights to the
    engines, which do not answer meanwhile. Answers of step s are made by weights of step s - lag or newer.

    colocated: the same GPUs do both, one after the other, whatever the lag.
    """
    if colocated:
        mean = sum(generation) / len(generation)
        return Timeline(step_seconds=mean + train + sync, train_idle=0.0, rollout_idle=0.0)
    generated = trained = 0.0
    ready = [0.0]  # when the weights of each step are in the engines
    ends, busy = [], []
    for step, seconds in enumerate(generation):
        start = max(generated, ready[max(0, step - lag)])
        generated = start + seconds + (sync if lag else 0.0)  # on-policy, `ready` has it
        trained = max(trained, generated) + train
        ready.append(trained + sync)
        ends.append(trained)
        busy.append(seconds)
    first = min(lag + 1, len(ends) - 2)
    steps, span = len(ends) - 1 - first, ends[-1] - ends[first]
    return Timeline(
        step_seconds=span / steps,
        train_idle=1 - train * steps / span,
        rollout_idle=1 - sum(busy[first + 1 :]) / span,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Nodes that train and nodes that answer."""

    train_nodes: int
    rollout_nodes: int
    timeline: Timeline

    @property
    def gpu_seconds_share(self) -> float:
        """Share of all GPU time in which a GPU has work."""
        total = self.train_nodes + self.rollout_nodes
        idle = self.train_nodes * self.timeline.train_idle + self.rollout_nodes * self.timeline.rollout_idle
        return 1 - idle / total


def splits(
    nodes: int, lag: int, seconds: Callable[[int, int], tuple[Sequence[float], float, float] | None]
) -> list[Split]:
    """Every way to share out `nodes`, fastest first. seconds(train nodes, rollout nodes) gives the three times of
    `simulate`, or None where that split is impossible."""
    found = []
    for train_nodes in range(1, nodes):
        times = seconds(train_nodes, nodes - train_nodes)
        if times is not None:
            generation, train, sync = times
            line = simulate(generation, train, sync, lag)
            found.append(Split(train_nodes=train_nodes, rollout_nodes=nodes - train_nodes, timeline=line))
    return sorted(found, key=lambda split: split.timeline.step_seconds)

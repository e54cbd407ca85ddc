"""The least seconds of a step by stated ceilings: compute, links and memory, each phase as slow as its slowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.compute import PhaseFlops, step_flops
from megatron_mopd.plan.decoding import answer_lengths, engine_of, generation_seconds
from megatron_mopd.plan.memory import Setting
from megatron_mopd.plan.traffic import Flow, flows


@dataclass(frozen=True, slots=True)
class Resource:
    """What a phase waits for."""

    phase: str
    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    flops: PhaseFlops
    flows: tuple[Flow, ...]
    resources: tuple[Resource, ...]
    """Of all phases; within a phase they are taken to overlap perfectly, which no run does."""

    def phase(self, name: str) -> float:
        return max((each.seconds for each in self.resources if each.phase == name), default=0.0)

    @property
    def training(self) -> float:
        """Scoring and updates."""
        return self.phase("teacher") + self.phase("update")

    @property
    def step(self) -> float:
        """One phase after the other."""
        return self.phase("rollout") + self.training + self.phase("sync")

    @property
    def bottleneck(self) -> Resource | None:
        return max(self.resources, key=lambda each: each.seconds, default=None)


def step_time(setting: Setting, cluster: ClusterSpec, efficiency: float = 1.0) -> StepTime:
    """efficiency: share of the ceilings that is reached; 1 is the data sheet itself."""
    flops, moved = step_flops(setting), flows(setting, cluster)
    rate = efficiency * cluster.tflops(setting.config.model.dtype) * 1e12 * setting.ranks
    resources = []
    if rate:
        resources += [
            Resource("teacher", "arithmetic", flops.teacher / rate),
            Resource("update", "arithmetic", flops.update / rate),
        ]
        by_link: dict[tuple[str, str], float] = {}
        for flow in moved:
            key = (flow.phase, flow.link)
            by_link[key] = by_link.get(key, 0.0) + flow.seconds / efficiency
        resources += [Resource(phase, link, seconds) for (phase, link), seconds in by_link.items()]
        generation = generations(setting, cluster, efficiency, [0])
        if generation:
            resources.append(Resource("rollout", "decoding: HBM and arithmetic", generation[0]))
    return StepTime(flops=flops, flows=moved, resources=tuple(r for r in resources if r.seconds > 0))


def generations(setting: Setting, cluster: ClusterSpec, efficiency: float, seeds: Sequence[int]) -> list[float]:
    """Seconds of the answers of a step for each seed of their lengths; [] where nothing answers or no ceiling is
    known."""
    engine = engine_of(setting, cluster, efficiency)
    if engine is None:
        return []
    return [generation_seconds(engine, answer_lengths(setting.workload, seed)) for seed in seeds]

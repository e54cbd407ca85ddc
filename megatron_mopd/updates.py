"""From a step's rollouts to what its optimizer updates train on: packed micro-batches, weighted by domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from megatron_mopd.config import RunConfig
from megatron_mopd.domain_weights import DomainGaps, count_units, domain_factors, weighted
from megatron_mopd.metrics import PhaseTimer
from megatron_mopd.packing import pack_step, plan_step
from megatron_mopd.parallel.runtime import World
from megatron_mopd.rollout.collect import Collector
from megatron_mopd.routing_exchange import deliver_experts
from megatron_mopd.student.student import Student
from megatron_mopd.types import MicroBatch, Rollout


class Updates:
    """On every rank, with the same rollouts; what it hands out is this rank's share."""

    def __init__(self, config: RunConfig, world: World, collector: Collector, student: Student, timer: PhaseTimer):
        self._config, self._world, self._timer = config, world, timer
        self._collector, self._student = collector, student
        self._units: Counter[str] = Counter()
        """Domain -> units of the loss in the update whose turn it is, over all ranks."""
        self._factors: dict[str, float] = {}
        self.gaps = DomainGaps()
        """As measured in the steps done (`objective.domain_weights: gap_aware`); part of a checkpoint."""

    def of_step(self, step: int) -> Iterator[Iterable[list[MicroBatch]]]:
        """The micro-batches of each optimizer update of `step`, in the parts that teachers score one after the other.

        Each is packed when it is its turn, and an update's parts are to be taken before the next update. An update is
        one part, but with `rollout.waves` the step's only update is as many, each there when its answers are.
        """
        self._units = Counter()
        if self._config.rollout.waves > 1:
            yield self._as_answered(step)
            return
        with self._timer("rollout"):
            rollouts = self._collector.collect(step)
        parts = self._parts(rollouts, step)
        for part, batches in zip(parts, self._packed(parts), strict=True):
            self._units = Counter(count_units(part, self._config.objective.aggregation))
            yield [batches]

    def _as_answered(self, step: int) -> Iterator[list[MicroBatch]]:
        waves = self._collector.waves(step)
        while True:
            with self._timer("rollout"):
                rollouts = next(waves, None)
            if rollouts is None:
                return
            self._units.update(count_units(rollouts, self._config.objective.aggregation))
            yield self.pack(rollouts)

    def _packed(self, parts: Sequence[Sequence[Rollout]]) -> Iterator[list[MicroBatch]]:
        """With R2 the later updates' are packed now, and replay what the weights of now choose. The first update has
        just these weights: what it would replay is what its routers choose anyway."""
        if self._config.rollout.routing_replay != "R2" or len(parts) == 1:
            yield from map(self.pack, parts)
            return
        first, *later = [self.pack(part) for part in parts]
        with self._timer("routing"):
            recorded = [self._student.record_routing(batches) for batches in later]
        yield from (first, *recorded)

    def _parts(self, rollouts: Sequence[Rollout], step: int) -> list[Sequence[Rollout]]:
        """The rollouts of each optimizer update of this step; one part, unless `optim.updates_per_step` says more.

        Parts are cut from the shuffled prompts: domains come interleaved, and a stride would sort them apart. The
        samples of a prompt stay together.
        """
        prompts = list(dict.fromkeys(rollout.prompt.id for rollout in rollouts))
        parts = min(self._config.optim.updates_per_step, len(prompts))
        if parts == 1:
            return [rollouts]
        order = np.random.default_rng([self._config.seed, step]).permutation(len(prompts))
        part_of = {prompts[index]: place * parts // len(prompts) for place, index in enumerate(order)}
        return [[r for r in rollouts if part_of[r.prompt.id] == part] for part in range(parts)]

    def pack(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """This rank's share of its data-parallel group's micro-batches; on every rank as many, with the same teachers
        in the same order. Collective."""
        world = self._world
        if self._config.rollout.routing_replay == "R3" and world.size > 1:
            plans = plan_step(rollouts, self._config, data_ranks=world.data.size, context_ranks=world.context.size)
            rollouts = deliver_experts(rollouts, plans, world.all_gather_objects(world.data.rank), world)
        return pack_step(
            rollouts,
            self._config,
            data_rank=self._world.data.rank,
            data_ranks=self._world.data.size,
            multiple_of=self._world.tensor.size * self._config.model.tokens_multiple,
            device=self._world.device,
            context_ranks=self._world.context.size,
            context_rank=self._world.context.rank,
        )

    def weighted(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """All micro-batches of the update whose turn it is, with the weights of their domains in the loss."""
        config = self._config
        weights = {name: domain.weight for name, domain in config.domains.items()}
        self._factors = domain_factors(config.objective.domain_weights, weights, self._units, self.gaps)
        return weighted(batches, self._factors, config.domain_names)

    def learn_gaps(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take in what a step has measured of the gaps. Returns the factors of its last update, to be logged."""
        spec = self._config.objective.domain_weights
        if spec.kind == "prompt_share":
            return {}
        self.gaps = self.gaps.after(metrics, self._config.domain_names, spec.decay)
        return {f"domain_factor/{name}": factor for name, factor in self._factors.items()}

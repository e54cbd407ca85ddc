"""What a comparison of methods found: the data of a `summary.json`, as `mopd reproduce` and `mopd demo` write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mopd.reproduce.statistics import Estimate

COMPUTE = {
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "teacher_tokens": "teacher tokens",
    "seconds": "seconds",
}
"""Key of a compute record in `summary.json` -> how it is called on the page."""


UNKNOWN = Estimate(mean=math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that was evaluated: domain -> accuracy in [0, 1]; what was not measured is not in it."""

    accuracy: Mapping[str, Estimate]
    perplexity: Estimate | None = None
    """Of held-out text, e^(nats per token)."""
    out_of_domain: Mapping[str, Estimate] = field(default_factory=dict)
    """Task that no method trained on -> accuracy in [0, 1]."""
    benchmarks: Mapping[str, Estimate] = field(default_factory=dict)
    """Public benchmark -> accuracy in [0, 1]."""

    def perplexity_over(self, base: Model) -> Estimate | None:
        """Its perplexity over the base's of the same seed: seeds differ in the base far more than a method changes it.

        1 is nothing forgotten. None where either was not measured; the means' ratio where seeds are not given.
        """
        if self.perplexity is None or base.perplexity is None:
            return None
        own, other = self.perplexity.per_seed, base.perplexity.per_seed
        if not own.keys() & other.keys():
            return Estimate(mean=self.perplexity.mean / base.perplexity.mean)
        return Estimate.of({seed: own[seed] / other[seed] for seed in own if seed in other})


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    name: str
    domains: tuple[str, ...]
    """Those that the student learns from it."""
    model: Model
    compute: Mapping[str, float]
    """Key of COMPUTE -> mean over seeds; what is not known is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    name: str
    label: str
    family: str
    """merge | rl | off_policy | mopd: decides the colour."""
    score: Estimate
    """Normalised, mean over the domains: 0 is the base, 1 the teachers."""
    domain_scores: Mapping[str, Estimate]
    model: Model
    compute: Mapping[str, float]
    """Its own cost; the teachers' training is with the teachers."""
    runs: Mapping[int, Path]
    """Seed -> folder of its run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPoint:
    method: str
    label: str
    teachers: int
    score: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    source: str
    """The folder as the user named it."""
    title: str
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    base: Model
    teachers: tuple[Teacher, ...]
    methods: tuple[Method, ...]
    scaling: tuple[ScalingPoint, ...]

    def teacher_accuracy(self, domain: str) -> Estimate:
        """Accuracy of the domain's own teacher on the domain; UNKNOWN without one."""
        for teacher in self.teachers:
            if domain in teacher.domains:
                return teacher.model.accuracy.get(domain, UNKNOWN)
        return UNKNOWN

    def base_accuracy(self, domain: str) -> Estimate:
        return self.base.accuracy.get(domain, UNKNOWN)

"""Mean and 95 % interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_mopd.evaluation.statistics import t_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure over seeds. A seed without the figure (nan) is left out of mean and interval, and shown as null."""

    mean: float
    """nan when no seed has the figure."""
    interval: tuple[float, float] | None = None
    """95 %, mean +- t s / sqrt(n), of the mean of further seeds' distribution; None with fewer than two seeds."""
    per_seed: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, per_seed: Mapping[int, float]) -> Estimate:
        values = [value for value in per_seed.values() if not math.isnan(value)]
        count = len(values)
        mean = math.fsum(values) / count if count else math.nan
        return cls(mean=mean, interval=t_interval(values), per_seed=dict(per_seed))

    @property
    def known(self) -> bool:
        return math.isfinite(self.mean)

    @property
    def half_width(self) -> float | None:
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    def as_json(self) -> dict[str, Any]:
        """nan becomes null."""
        return {
            "mean": _or_none(self.mean),
            "interval": None if self.interval is None else list(self.interval),
            "per_seed": {str(seed): _or_none(value) for seed, value in self.per_seed.items()},
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value

"""Mean and 95 % interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Two-sided 95 % points of Student's t with 1, 2, ... 30 degrees of freedom.
_STUDENT_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_NORMAL = 1.959964


def student_t(degrees: int) -> float:
    """The t with P(|T| > t) = 0.05; beyond 30 degrees by the first two terms of the expansion in 1 / degrees
    (Abramowitz and Stegun 26.7.5), to 4 digits."""
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


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
        interval = None
        if count >= 2:
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
            half = student_t(count - 1) * deviation / math.sqrt(count)
            interval = (mean - half, mean + half)
        return cls(mean=mean, interval=interval, per_seed=dict(per_seed))

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

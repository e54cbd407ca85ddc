"""Which temperature the engine's log-probs are of, judged by the student's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mopd.audit.numbers import differences
from megatron_mopd.types import FloatArray

_POINTS, _PASSES, _WIDEST = 17, 6, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    configured: float
    best: float
    """The temperature of least mean |difference| between its engine's and the student's log-probs."""
    mean_configured: float
    """mean |difference| there, in nats."""
    mean_best: float


def fit_temperature(
    reported: Sequence[FloatArray], student: Callable[[float], Sequence[FloatArray]], configured: float
) -> Fit:
    """The configured temperature, 1 and their ratios first, then finer and finer steps from a quarter to four times.

    student(temperature) -> [T] of each sequence; collective where it is, with equal results on every rank.
    """

    def mean(temperature: float) -> float:
        apart = np.concatenate(differences(reported, student(temperature)))
        return float(np.nanmean(np.abs(apart)))

    tried = {t: mean(t) for t in dict.fromkeys((configured, 1.0, 1.0 / configured, configured**2))}
    span = np.log(_WIDEST)
    for _ in range(_PASSES):
        best = min(tried, key=lambda t: tried[t])
        for step in np.linspace(-span, span, _POINTS):
            temperature = float(best * np.exp(step))
            tried[temperature] = mean(temperature)
        span *= 2 / (_POINTS - 1)
    best = min(tried, key=lambda t: tried[t])
    return Fit(configured=configured, best=best, mean_configured=tried[configured], mean_best=tried[best])

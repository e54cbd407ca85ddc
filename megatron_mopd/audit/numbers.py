"""How far two views are apart: per domain and over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mopd.audit.options import Tolerance
from megatron_mopd.types import FloatArray

OVERALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of log p_left - log p_right, in nats."""

    tokens: int
    largest: float
    """Absolute, like the two that follow."""
    mean: float
    p99: float
    kl: float
    """mean(log mu - log p) over the tokens that the engine sampled, mu being left: unbiased, and noisy."""
    k3: float
    """mean(p / mu - 1 - log(p / mu)) over the same: never negative, less noisy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    left: str
    right: str
    by_domain: Mapping[str, Figures]
    """And `OVERALL`."""

    @property
    def overall(self) -> Figures:
        return self.by_domain[OVERALL]

    @property
    def title(self) -> str:
        return f"{self.left} / {self.right}"

    def is_within(self, tolerance: Tolerance) -> bool:
        # Where max is bounded as tightly as the KL, the KL follows from it and is not looked at.
        kl_holds = tolerance.kl >= tolerance.largest or self.overall.k3 <= tolerance.kl
        return self.overall.largest <= tolerance.largest and kl_holds

    def as_json(self) -> dict[str, Any]:
        return {"left": self.left, "right": self.right, **{name: asdict(f) for name, f in self.by_domain.items()}}


def compare(
    left: tuple[str, Sequence[FloatArray]],
    right: tuple[str, Sequence[FloatArray]],
    domains: Sequence[str],
    responses: Sequence[NDArray[np.bool_]],
) -> Pair:
    """Two named lists of log-probs [T] a sequence, where both are known. domains: of each sequence; responses: [T]."""
    apart = differences(left[1], right[1])
    groups = {name: [i for i, domain in enumerate(domains) if domain == name] for name in dict.fromkeys(domains)}
    groups[OVERALL] = list(range(len(domains)))
    return Pair(
        left=left[0],
        right=right[0],
        by_domain={
            name: _figures(np.concatenate([apart[i] for i in own]), np.concatenate([responses[i] for i in own]))
            for name, own in groups.items()
        },
    )


def differences(left: Sequence[FloatArray], right: Sequence[FloatArray]) -> list[NDArray[np.float64]]:
    """[T] of each sequence, NaN where one side does not know."""
    return [a.astype(np.float64) - b for a, b in zip(left, right, strict=True)]


def _figures(apart: NDArray[np.float64], response: NDArray[np.bool_]) -> Figures:
    known = ~np.isnan(apart)
    values, sampled = np.abs(apart[known]), apart[known & response]
    return Figures(
        tokens=len(values),
        largest=float(values.max()),
        mean=float(values.mean()),
        p99=float(np.quantile(values, 0.99)),
        kl=float(sampled.mean()),
        k3=float((np.exp(-sampled.clip(-20, 20)) - 1 + sampled).mean()),
    )

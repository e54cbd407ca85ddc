"""How much each domain counts in the loss, when that is not simply how often it was drawn.

Domains with long answers, or with a teacher that is far away, take most of a batch's gradient and leave little for the
others: Open-MOPD (arXiv 2608.19098) traces two thirds of the headroom that plain MOPD leaves to it, and names two
remedies, which are here.

A unit is what the loss is a mean of: a token (`aggregation: token`) or an answer (`sequence`). With u_d units of domain
d in an update, U in all, and weight_d the domain's `weight`, every row of domain d is multiplied by

    f_d = target_d U / u_d,    target_d = weight_d g_d / sum over the domains present of the same

so that domain d has the share target_d of the loss, sum_d f_d u_d = U, and the denominator stays what it was.

| kind | g_d |
|---|---|
| prompt_share | f_d = 1: the papers' mean over what was drawn |
| token_share | 1 |
| gap_aware | clip(gap_d / mean gap, low, high), gap_d the running mean of the domain's reverse KL per token |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_mopd.method_config import DomainWeightsSpec
from megatron_mopd.types import MicroBatch, Rollout


@dataclass(frozen=True, slots=True)
class DomainGaps:
    """Running mean of each domain's reverse KL to its teacher, nats per token; the same on every rank."""

    gaps: Mapping[str, float] = field(default_factory=dict)
    """Domains that were not seen yet are not in it."""

    def after(self, metrics: Mapping[str, float], names: Sequence[str], decay: float) -> DomainGaps:
        """With what a step has measured ('reverse_kl/<domain>'); a domain that it had no token of stays as it is."""
        new = {}
        for name in names:
            measured = metrics.get(f"reverse_kl/{name}")
            if measured is not None:
                # The single-sample estimate of a KL may be negative: no gap then.
                measured = max(measured, 0.0)
                old = self.gaps.get(name, measured)
                new[name] = decay * old + (1 - decay) * measured
        return replace(self, gaps={**self.gaps, **new})


def domain_factors(
    spec: DomainWeightsSpec, weights: Mapping[str, float], units: Mapping[str, int], gaps: DomainGaps
) -> dict[str, float]:
    """domain -> f_d, for the domains that have units in this update.

    weights: domain -> its `weight`, in any scale. units: domain -> how many this update has of it, over all ranks.
    """
    present = [name for name, count in units.items() if count > 0]
    if spec.kind == "prompt_share":
        return dict.fromkeys(present, 1.0)
    wanted = {name: weights[name] * _clipped_gap(spec, name, present, gaps) for name in present}
    total_units, total = sum(units[name] for name in present), math.fsum(wanted.values())
    return {name: wanted[name] / total * total_units / units[name] for name in present}


def _clipped_gap(spec: DomainWeightsSpec, name: str, present: Sequence[str], gaps: DomainGaps) -> float:
    known = [gaps.gaps[other] for other in present if other in gaps.gaps]
    mean = math.fsum(known) / len(known) if known else 0.0
    if spec.kind != "gap_aware" or name not in gaps.gaps or mean == 0:
        return 1.0
    return min(max(gaps.gaps[name] / mean, spec.low), spec.high)


def count_units(rollouts: Sequence[Rollout], aggregation: Literal["sequence", "token"]) -> dict[str, int]:
    """domain -> units of the loss in `rollouts`."""
    units: dict[str, int] = {}
    for rollout in rollouts:
        count = int(rollout.loss_mask.sum()) if aggregation == "token" else 1
        units[rollout.domain] = units.get(rollout.domain, 0) + count
    return units


def weighted(batches: Sequence[MicroBatch], factors: Mapping[str, float], names: Sequence[str]) -> list[MicroBatch]:
    """The batches with each row's weight multiplied by its domain's factor. `names`: what `domain_index` counts in."""
    if all(factor == 1 for factor in factors.values()):
        return list(batches)
    return [
        replace(batch, weights=batch.weights * batch.weights.new_tensor(_table(factors, names))[batch.domain_index])
        for batch in batches
    ]


def _table(factors: Mapping[str, float], names: Sequence[str]) -> list[float]:
    return [factors.get(name, 1.0) for name in names]

"""Domain factors by hand, and what they make of the loss's weights, however rollouts are spread over ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mopd.domain_weights import DomainGaps, count_units, domain_factors, weighted
from megatron_mopd.method_config import DomainWeightsSpec
from megatron_mopd.packing import pack_step
from tests import tiny

THIRDS = {"a": 1.0, "b": 1.0, "c": 1.0}
GAP_AWARE = DomainWeightsSpec(kind="gap_aware")


def test_as_drawn_every_factor_is_one() -> None:
    assert domain_factors(DomainWeightsSpec(), THIRDS, {"a": 5, "b": 0, "c": 1}, DomainGaps({"a": 3.0})) == {
        "a": 1.0,
        "c": 1.0,
    }


def test_token_share_by_hand() -> None:
    spec = DomainWeightsSpec(kind="token_share")
    factors = domain_factors(spec, {"a": 0.35, "b": 0.35, "c": 0.3}, {"a": 100, "b": 300, "c": 600}, DomainGaps())
    assert factors == pytest.approx({"a": 3.5, "b": 350 / 300, "c": 0.5})
    # A domain that is not in this update leaves its share to the others.
    assert domain_factors(spec, THIRDS, {"a": 30, "b": 10}, DomainGaps()) == pytest.approx({"a": 2 / 3, "b": 2.0})


def test_gap_aware_by_hand() -> None:
    gaps = DomainGaps({"a": 0.1, "b": 0.2, "c": 0.9})  # mean 0.4: ratios 0.25, 0.5 and 2.25, clipped to 0.5, 0.5, 2
    factors = domain_factors(GAP_AWARE, THIRDS, {"a": 10, "b": 10, "c": 10}, gaps)
    assert factors == pytest.approx({"a": 0.5, "b": 0.5, "c": 2.0})
    # What is not known yet counts as it was drawn.
    unknown = domain_factors(GAP_AWARE, THIRDS, {"a": 10, "b": 10}, DomainGaps())
    assert unknown == pytest.approx({"a": 1.0, "b": 1.0})
    # Gaps of zero everywhere: nothing is left to share out.
    assert domain_factors(GAP_AWARE, THIRDS, {"a": 1, "b": 1}, DomainGaps({"a": 0.0, "b": 0.0})) == {"a": 1.0, "b": 1.0}


def test_gaps_are_a_running_mean_and_survive_what_was_not_measured() -> None:
    gaps = DomainGaps().after({"reverse_kl/a": 0.4, "reverse_kl": 9.0}, ("a", "b"), 0.9)
    assert gaps.gaps == {"a": pytest.approx(0.4)}
    gaps = gaps.after({"reverse_kl/a": 0.2, "reverse_kl/b": -0.1}, ("a", "b"), 0.9)
    assert gaps.gaps == {"a": pytest.approx(0.38), "b": 0.0}
    assert gaps.after({}, ("a", "b"), 0.9) == gaps


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize(("ranks", "max_tokens"), [(1, 4096), (2, 30), (3, 4096)])
def test_the_loss_has_the_shares_and_the_denominator_stays(
    tmp_path: Path, aggregation: Any, ranks: int, max_tokens: int
) -> None:
    config = tiny.run_config(tmp_path, max_tokens=max_tokens)
    config = replace(config, objective=replace(config.objective, aggregation=aggregation))
    rollouts = tiny.rollouts("aaaaaaabbc")
    units = count_units(rollouts, aggregation)
    gaps = DomainGaps({"a": 0.1, "b": 0.3, "c": 0.2})
    factors = domain_factors(GAP_AWARE, THIRDS, units, gaps)
    counted: Counter[str] = Counter()
    total_units = 0
    for rank in range(ranks):
        batches = pack_step(
            rollouts, config, data_rank=rank, data_ranks=ranks, multiple_of=1, device=torch.device("cpu")
        )
        for before, batch in zip(batches, weighted(batches, factors, config.domain_names), strict=True):
            assert batch.num_units == before.num_units
            total_units += batch.num_units
            for index, weight in zip(batch.domain_index.tolist(), batch.weights.double().tolist(), strict=True):
                counted[config.domain_names[index]] += weight
    assert total_units == sum(units.values()) == pytest.approx(sum(counted.values()), rel=1e-6)
    shares = {name: value / total_units for name, value in counted.items()}
    assert shares == pytest.approx({"a": 0.5 / 3, "b": 1.5 / 3, "c": 1.0 / 3}, rel=1e-5)

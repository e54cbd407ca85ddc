"""Importance weights against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mopd.importance import importance_weights
from megatron_mopd.method_config import ImportanceSpec
from megatron_mopd.yaml_config import ConfigError

RATIOS = torch.tensor([0.5, 2.0, 0.25, 3.0, 1.0, 1.0])
SEQUENCE = torch.tensor([0, 0, 1, 1, 1, 2])
"""Products: 1, 0.75, 1. Geometric means: 1, 0.75^(1/3) = 0.9086, 1."""
ROLLOUT = torch.tensor([-1.0, -2.0, -3.0, -0.5, -1.5, -0.1])


def weights(**spec: object) -> list[float]:
    found = importance_weights(ImportanceSpec(**spec), ROLLOUT + RATIOS.log(), ROLLOUT, SEQUENCE, sequences=3)  # type: ignore[arg-type]
    torch.testing.assert_close(found.ratio, RATIOS)
    return found.weights.tolist()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"kind": "none"}, [1, 1, 1, 1, 1, 1]),
        ({"kind": "icepop", "low": 0.4, "high": 2.5}, [0.5, 2, 0, 0, 1, 1]),
        ({"kind": "tis", "low": 0.4, "high": 2.5}, [0.5, 2, 0.4, 2.5, 1, 1]),
        ({"kind": "tis"}, [0.5, 2, 0.25, 2, 1, 1]),
        ({"kind": "sequence_tis", "low": 0.8, "high": 0.9}, [0.9, 0.9, 0.8, 0.8, 0.8, 0.9]),
        ({"kind": "sequence_mis", "low": 0.5, "high": 0.9}, [0, 0, 0.75, 0.75, 0.75, 0]),
        ({"kind": "sequence_mis"}, [1, 1, 0.75, 0.75, 0.75, 1]),
        ({"kind": "geometric"}, [1, 1, 0, 0, 0, 1]),
        ({"kind": "geometric", "low": 0.9, "high": 0.95}, [0, 0, 1, 1, 1, 0]),
    ],
    ids=str,
)
def test_weights(spec: dict, expected: list[float]) -> None:
    assert weights(**spec) == pytest.approx(expected, rel=1e-5)


def test_what_is_reported() -> None:
    found = importance_weights(
        ImportanceSpec(kind="icepop", low=0.4, high=2.5), ROLLOUT + RATIOS.log(), ROLLOUT, SEQUENCE, sequences=3
    )
    rows = {name: values.mean().item() for name, values in found.rows().items()}
    assert rows["importance_kept"] == pytest.approx(4 / 6)
    assert rows["importance_weight"] == pytest.approx(4.5 / 6)
    assert rows["rollout_kl"] == pytest.approx(-math.log(0.75) / 6, rel=1e-5)
    assert rows["rollout_kl_k3"] == pytest.approx((7.75 - 6 - math.log(0.75)) / 6, rel=1e-5)


@pytest.mark.parametrize("kind", ["icepop", "tis", "sequence_tis", "sequence_mis", "geometric"])
def test_the_same_policy_has_weight_one(kind: str) -> None:
    found = importance_weights(ImportanceSpec(kind=kind), ROLLOUT, ROLLOUT, SEQUENCE, sequences=3)  # type: ignore[arg-type]
    assert found.weights.tolist() == [1.0] * 6
    assert not found.weights.requires_grad


def test_weights_are_constants_and_extremes_are_finite() -> None:
    student = torch.tensor([0.0, -1e4, -200.0], requires_grad=True)
    for kind in ("icepop", "tis", "sequence_tis", "sequence_mis", "geometric"):
        found = importance_weights(
            ImportanceSpec(kind=kind),  # type: ignore[arg-type]
            student,
            torch.tensor([-200.0, 0.0, 0.0]),
            torch.tensor([0, 1, 1]),
            sequences=2,
        )
        assert found.weights.isfinite().all()
        assert all(values.isfinite().all() and not values.requires_grad for values in found.rows().values())
    empty = importance_weights(
        ImportanceSpec(kind="geometric"), torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long), sequences=0
    )
    assert empty.weights.shape == (0,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "icepop", "low": 3.0}, r"low and high: must be 0 <= low <= high, got 3\.0 and 2\.0"),
        ({"kind": "tis", "low": -1.0}, r"low and high: must be 0 <= low <= high"),
        ({"kind": "tis", "high": 0.0}, "high: must be > 0"),
        ({"kind": "none", "high": 2.0}, "kind 'none' has no bounds"),
    ],
)
def test_bounds_are_checked(spec: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImportanceSpec(**spec)

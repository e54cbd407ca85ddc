"""Statistics of graded answers against numbers worked out by hand, by enumeration, or printed in tables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_mopd.evaluation.statistics import (
    mean_accuracy,
    pass_at,
    standard_error,
    t_distribution,
    t_interval,
    t_quantile,
)

RIGHT = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=bool)


def test_accuracy_and_its_error_by_hand() -> None:
    # Shares 1/2, 1, 0, 1/4: mean 7/16; squared deviations (1 + 81 + 49 + 9) / 256 = 140/256, over 4 * 3.
    assert mean_accuracy(RIGHT) == 7 / 16
    assert standard_error(RIGHT) == pytest.approx(math.sqrt(140 / 256 / 12), rel=1e-15)
    assert standard_error(RIGHT[:1]) is None


def test_samples_of_one_prompt_are_not_independent() -> None:
    once = np.array([[1], [0], [0], [1], [1]], dtype=bool)
    # p = 3/5: p (1 - p) / (n - 1) = 0.06. Repeating each answer 10 times tells nothing new.
    assert standard_error(once) == pytest.approx(math.sqrt(0.06), rel=1e-15)
    assert standard_error(np.repeat(once, 10, axis=1)) == pytest.approx(math.sqrt(0.06), rel=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(k: int) -> None:
    choices = [RIGHT[:, list(chosen)].any(axis=1) for chosen in itertools.combinations(range(4), k)]
    assert pass_at(RIGHT, k) == pytest.approx(np.mean(choices), rel=1e-15)


def test_pass_at_k_by_hand() -> None:
    assert pass_at(RIGHT, 1) == mean_accuracy(RIGHT)
    assert pass_at(RIGHT, 4) == 3 / 4
    # One right in 200, k = 100: 1 - C(199, 100) / C(200, 100) = 1 - 100/200.
    assert pass_at(np.arange(200)[None] == 7, 100) == pytest.approx(0.5, rel=1e-14)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"pass@{k} needs 1 <= k <= 4"):
            pass_at(RIGHT, k)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [  # Abramowitz and Stegun, table 26.10
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.975, 30, 2.042),
        (0.95, 3, 2.353),
        (0.995, 5, 4.032),
        (0.9995, 1, 636.619),
    ],
)
def test_quantiles_of_students_t(probability: float, freedom: int, expected: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=6e-4)
    assert t_quantile(1 - probability, freedom) == pytest.approx(-expected, abs=6e-4)
    assert t_distribution(t_quantile(probability, freedom), freedom) == pytest.approx(probability, abs=1e-14)


def test_quantiles_that_have_a_closed_form() -> None:
    assert t_quantile(0.75, 1) == pytest.approx(1.0, rel=1e-14)  # Cauchy: tan(pi (p - 1/2))
    assert t_quantile(0.9, 2) == pytest.approx(0.8 / math.sqrt(2 * 0.9 * 0.1), rel=1e-14)
    assert t_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-15)
    assert t_quantile(0.975, 2001) == pytest.approx(1.959964, abs=2e-3)  # the normal distribution's
    for probability, freedom in ((0.0, 3), (1.0, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="t quantile"):
            t_quantile(probability, freedom)


def test_intervals_by_hand() -> None:
    # Five values: mean 3, std sqrt(2.5), t 2.776445 -> 3 +- 1.963243
    low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((3 - 1.963243, 3 + 1.963243), abs=1e-6)
    assert t_interval([0.25, 0.25]) == (0.25, 0.25)
    assert t_interval([1.0]) is None
    wide = t_interval([1.0, 2.0], confidence=0.99) or (0.0, 0.0)
    assert wide[1] - 1.5 == pytest.approx(63.656741 / 2, abs=1e-6)

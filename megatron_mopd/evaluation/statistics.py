"""Figures from graded answers: means, standard errors clustered by prompt, pass@k, Student-t intervals. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]  # not from types.py: that one needs torch, which a report does not


def mean_accuracy(right: BoolArray) -> float:
    """avg@n: the share of right answers. `right` is [prompts, samples], True where the verifier gave its full score."""
    return float(np.mean(right))


def standard_error(right: BoolArray) -> float | None:
    """Of `mean_accuracy`, clustered by prompt: the samples of one prompt are alike and count as one observation.

    sqrt(sum over prompts of (m_p - m)^2 / (P (P - 1))), m_p the share of right answers to prompt p: the clustered
    standard error of Miller, "Adding Error Bars to Evals" (arXiv 2411.00640, Eq. 4) for clusters of one size, with
    the correction P / (P - 1) for few clusters. None for a single prompt, which says nothing about others.
    """
    per_prompt = np.mean(right, axis=1, dtype=np.float64)
    return None if len(per_prompt) < 2 else float(np.std(per_prompt, ddof=1) / math.sqrt(len(per_prompt)))


def pass_at(right: BoolArray, k: int) -> float:
    """Chance that at least one of `k` samples of a prompt is right, averaged over prompts; unbiased.

    1 - C(n - c, k) / C(n, k) with c of n samples right (Chen et al. 2021, arXiv 2107.03374, Eq. 1). ValueError
    unless 1 <= k <= n.
    """
    samples = right.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {samples} samples")
    chosen = math.comb(samples, k)
    wrong = (samples - np.sum(right, axis=1)).tolist()
    return float(np.mean([1 - math.comb(count, k) / chosen for count in wrong]))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student-t interval of the mean of independent repetitions: mean +- t * std / sqrt(n).

    None for fewer than two values. ValueError unless 0 < confidence < 1.
    """
    if len(values) < 2:
        return None
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * spread / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = `probability` for Student's T with `freedom` degrees of freedom. ValueError out of range.

    By bisection on the distribution: a few dozen evaluations, to the last bit but a few.
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"t quantile: 0 < probability < 1 and freedom >= 1, got {probability} and {freedom}")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_distribution(high, freedom) < probability:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_distribution(middle, freedom) < probability else (low, middle)
    return high


def t_distribution(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 (odd freedom) and 26.7.4 (even)."""
    theta = math.atan2(t, math.sqrt(freedom))
    cosine_squared = math.cos(theta) ** 2
    odd = freedom % 2
    term, total = 1.0, 0.0
    for index in range(freedom // 2):
        if index:
            term *= cosine_squared * (2 * index - 1 + odd) / (2 * index + odd)
        total += term
    if odd:
        return 0.5 + (theta + math.sin(theta) * math.cos(theta) * total) / math.pi
    return 0.5 + math.sin(theta) * total / 2

"""The arithmetic of merging, element by element, as pure functions of float64 tensors.

A task vector is tau_t = theta_t - theta_base (arXiv 2212.04089). Shapes: `n` elements in a row of one tensor, `m`
models: values and task vectors are [m, n], weights [m]. Nothing here knows of files.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from torch import Tensor


def weighted_sum(vectors: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t v_t, [n]. With tau it is task arithmetic's sum of task vectors (arXiv 2212.04089, section 2).

    Term by term: a matrix product or a reduction may round an element differently, depending on where in the
    slice it stands.
    """
    total = weights[0] * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total += weight * vector
    return total


def _masked(tau: Tensor, kept: Tensor) -> Tensor:
    """0 where `kept` is False. A product: `where` with a scalar takes ten times as long in float64."""
    return tau * kept.to(tau.dtype)


def average(values: Tensor, weights: Tensor) -> Tensor:
    """sum_t w_t theta_t / sum_t w_t, [n]; with equal weights the uniform soup (arXiv 2203.05482)."""
    return weighted_sum(values, weights) / weights.sum()


def add_task_vector(base: Tensor, merged: Tensor, scaling: float) -> Tensor:
    """theta_base + lambda tau, [n]."""
    return base + scaling * merged


def keep_largest(tau: Tensor, thresholds: Tensor) -> Tensor:
    """TIES' trim (arXiv 2306.01708, section 4.1, step 1): 0 where |tau_t| < its threshold [m].

    Equal magnitudes stay or go together, as in the authors' code: which of them comes first in memory means
    nothing. In bf16 checkpoints many are equal, so more than the wanted share may stay.
    """
    return _masked(tau, tau.abs() >= thresholds[:, None])


def elect_sign(tau: Tensor, weights: Tensor) -> Tensor:
    """TIES' step 2: the sign, [n], of the direction with the larger total movement: sgn(sum_t w_t tau_t).

    0 where both are equally large: the base is kept there. (The equation; the authors' code takes the sign
    that is more frequent in the whole model, others +1, which would push every undecided element upwards.)
    """
    return weighted_sum(tau, weights).sign()


def disjoint_mean(tau: Tensor, sign: Tensor, weights: Tensor) -> Tensor:
    """TIES' step 3: the weighted mean, [n], of the tau_t that have the elected sign; 0 where there is none."""
    agree = (tau * sign > 0).to(tau.dtype)
    total = weighted_sum(agree, weights)
    return weighted_sum(tau * agree, weights) / total.masked_fill_(total == 0, 1.0)


def drop_and_rescale(tau: Tensor, kept: Tensor, density: float) -> Tensor:
    """DARE (arXiv 2311.03099, Eq. 3-4): m tau / (1 - p), where a share p = 1 - density was dropped; `kept` is m."""
    return _masked(tau, kept) / density


def random_mask(seed: int, model: str, tensor: str, begin: int, end: int, density: float) -> Tensor:
    """Elements `begin` to `end` of the mask of DARE for one tensor of one model: True with probability `density`.

    Element i depends on (seed, model, tensor, i) only: not on the files, the order or the slices that a tensor
    is read in. The raw output of PCG64 is used, which numpy promises never to change.
    """
    if density >= 1:
        return torch.ones(end - begin, dtype=torch.bool)
    key = hashlib.sha256(json.dumps([seed, model, tensor]).encode()).digest()
    source = np.random.PCG64(int.from_bytes(key, "little"))
    source.advance(begin)
    return torch.from_numpy(source.random_raw(end - begin) < np.uint64(density * 2.0**64))


def variance(tau: Tensor) -> Tensor:
    """Over the models, not corrected, [n]: what SCE selects by (arXiv 2408.07990, section 3.3, select)."""
    ones = torch.ones(len(tau), dtype=tau.dtype)
    return average((tau - average(tau, ones)).square(), ones)


def select(tau: Tensor, threshold: float) -> Tensor:
    """SCE's first step: 0, in all models alike, where the variance is below the threshold or 0."""
    spread = variance(tau)
    return _masked(tau, (spread >= threshold) & (spread > 0))


def energy(tau: Tensor) -> Tensor:
    """sum_n tau_t^2, [m]: SCE's coefficients are these over the whole tensor, divided by their sum (calculate)."""
    return tau.square().sum(dim=1)


def erase_and_sum(selected: Tensor, coefficients: Tensor) -> Tensor:
    """SCE's last step, [n]: what points against the sign of the plain sum is erased; the weighted mean of the rest.

    Divided by the coefficients that are left, as in both published implementations (fanqiwan/FuseAI and
    arcee-ai/mergekit): otherwise the more models are erased, the shorter the vector.
    """
    return disjoint_mean(selected, elect_sign(selected, torch.ones_like(coefficients)), coefficients)

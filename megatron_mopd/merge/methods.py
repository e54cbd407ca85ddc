"""Each method on one tensor: what it needs to know of the whole tensor first, then slice by slice.

Only a slice of all models is in memory, whatever the tensor's size. A tensor's merged values do not depend on the
slices, apart from the last bit of SCE's sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_mopd.merge import formulas
from megatron_mopd.merge.config import Recipe
from megatron_mopd.merge.slices import Slice, TensorSlices
from megatron_mopd.merge.threshold import kth_largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A slice of the merged tensor."""

    values: Tensor
    """[n], float64."""
    kept: Tensor | None
    """[m], int64: elements of each model's task vector that are not 0 after trimming, dropping or selecting."""


def merge_tensor(recipe: Recipe, slices: TensorSlices) -> Iterator[Merged]:
    """The merged tensor, slice by slice in order. The models are stacked in the order of `recipe.weights`."""
    weights = torch.tensor(list(recipe.weights.values()), dtype=torch.float64)
    match recipe.method:
        case "average":
            # Without a base the task vectors are the models' own values.
            return (Merged(values=formulas.average(s.tau, weights), kept=None) for s in slices)
        case "task_arithmetic":
            return (_added(recipe, s, formulas.weighted_sum(s.tau, weights)) for s in slices)
        case "ties":
            return _ties(recipe, slices, weights)
        case "dare" | "dare_ties":
            return _dare(recipe, slices, weights)
        case "sce":
            return _sce(recipe, slices)


def _added(recipe: Recipe, piece: Slice, merged: Tensor, sparse: Tensor | None = None) -> Merged:
    """`sparse`: the task vectors, [m, n], after trimming, dropping or selecting."""
    kept = None if sparse is None else torch.stack([tau.count_nonzero() for tau in sparse])
    return Merged(values=formulas.add_task_vector(piece.base, merged, recipe.scaling), kept=kept)


def _count(density: float, size: int) -> int:
    """How many of `size` elements are to stay: at least one, also of the smallest tensor."""
    return max(1, round(density * size))


def _ties(recipe: Recipe, slices: TensorSlices, weights: Tensor) -> Iterator[Merged]:
    count = _count(recipe.density, slices.size)

    def rank(nonzero: int) -> int:
        return count

    def magnitudes(model: int) -> Iterator[Tensor]:
        return (tau.abs() for tau in slices.task_vector(model))

    smallest = [kth_largest(partial(magnitudes, model), slices.size, rank) for model in range(len(weights))]
    thresholds = torch.tensor(smallest, dtype=torch.float64)
    for piece in slices:
        tau = formulas.keep_largest(piece.tau, thresholds)
        merged = formulas.disjoint_mean(tau, formulas.elect_sign(tau, weights), weights)
        yield _added(recipe, piece, merged, tau)


def _dare(recipe: Recipe, slices: TensorSlices, weights: Tensor) -> Iterator[Merged]:
    """`dare`: the sum of what is left; `dare_ties`: TIES' election and mean of it, in place of the trim."""
    for piece in slices:
        masks = [
            formulas.random_mask(recipe.seed, model, slices.name, piece.begin, piece.end, recipe.density)
            for model in recipe.weights
        ]
        tau = formulas.drop_and_rescale(piece.tau, torch.stack(masks), recipe.density)
        if recipe.method == "dare":
            merged = formulas.weighted_sum(tau, weights)
        else:
            merged = formulas.disjoint_mean(tau, formulas.elect_sign(tau, weights), weights)
        yield _added(recipe, piece, merged, tau)


def _sce(recipe: Recipe, slices: TensorSlices) -> Iterator[Merged]:
    """Select, calculate, erase (arXiv 2408.07990, section 3.3); a tensor is what the paper calls a matrix.

    What is merged are the selected vectors, as in the paper and in mergekit. (The authors' own code erases and sums
    the unselected ones; the selection then only shapes the coefficients.)
    """
    threshold = _sce_threshold(recipe, slices)
    energies = torch.zeros(len(recipe.weights), dtype=torch.float64)
    for piece in slices:
        energies += formulas.energy(formulas.select(piece.tau, threshold))
    # All zero: nothing was selected, and there is nothing to weigh.
    coefficients = energies / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)
    for piece in slices:
        selected = formulas.select(piece.tau, threshold)
        yield _added(recipe, piece, formulas.erase_and_sum(selected, coefficients), selected)


def _sce_threshold(recipe: Recipe, slices: TensorSlices) -> float:
    """The variance from which on elements are selected: a share of those on which the models differ at all.

    Both published implementations count the share so, and not of all elements.
    """
    if recipe.density >= 1:
        return 0.0
    return kth_largest(
        lambda: (formulas.variance(piece.tau) for piece in slices), slices.size, partial(_count, recipe.density)
    )

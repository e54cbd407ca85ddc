"""Every formula on cases that are computed by hand; the mask of DARE depends on nothing but its key."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megatron_mopd.merge import formulas


def _t(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


ONES = _t(1.0, 1.0, 1.0)


def test_average_and_task_arithmetic() -> None:
    values = _t([1.0, 2.0], [3.0, 6.0])
    assert formulas.average(values, _t(1.0, 1.0)).tolist() == [2.0, 4.0]
    assert formulas.average(values, _t(3.0, 1.0)).tolist() == [1.5, 3.0]
    # base 10, tau = -9 and -7 / -8 and -4, lambda 0.5
    merged = formulas.weighted_sum(values - 10, _t(1.0, 1.0))
    assert formulas.add_task_vector(_t(10.0, 10.0), merged, 0.5).tolist() == [2.0, 4.0]


def test_ties() -> None:
    """Redundant values go, then signs are elected, then those that agree are averaged."""
    tau = _t([4.0, -3.0, 0.5, 2.0], [2.0, 5.0, -0.1, 1.0], [-3.0, -4.0, 0.2, -3.0])
    trimmed = formulas.keep_largest(tau, _t(3.0, 2.0, 3.0))
    assert trimmed.tolist() == [[4, -3, 0, 0], [2, 5, 0, 0], [-3, -4, 0, -3]]
    sign = formulas.elect_sign(trimmed, ONES)
    assert sign.tolist() == [1, -1, 0, -1]  # 4+2-3, -3+5-4, 0, -3
    assert formulas.disjoint_mean(trimmed, sign, ONES).tolist() == [3.0, -3.5, 0.0, -3.0]
    # With weight 3 the second model wins element 1 as well: -3 + 15 - 4; element 0: (4 + 3 * 2) / 4.
    weights = _t(1.0, 3.0, 1.0)
    sign = formulas.elect_sign(trimmed, weights)
    assert sign.tolist() == [1, 1, 0, -1]
    assert formulas.disjoint_mean(trimmed, sign, weights).tolist() == [2.5, 5.0, 0.0, -3.0]


def test_equal_magnitudes_stay_together_and_a_draw_changes_nothing() -> None:
    tau = _t([1.0, -1.0, 0.5, 1.0], [-1.0, -1.0, 0.5, 0.0])
    trimmed = formulas.keep_largest(tau, _t(1.0, 1.0))
    assert trimmed.tolist() == [[1, -1, 0, 1], [-1, -1, 0, 0]]
    sign = formulas.elect_sign(trimmed, _t(1.0, 1.0))
    assert sign.tolist() == [0, -1, 0, 1]
    assert formulas.disjoint_mean(trimmed, sign, _t(1.0, 1.0)).tolist() == [0, -1, 0, 1]


def test_dare() -> None:
    kept = torch.tensor([[True, False, True]])
    assert formulas.drop_and_rescale(_t([1.0, 2.0, -3.0]), kept, 0.25).tolist() == [[4.0, 0.0, -12.0]]


def test_sce() -> None:
    """Variances 1, 4, 0, 16 of two models; the two largest are selected: energies 4 + 4 = 8 and 4 + 36 = 40."""
    tau = _t([1.0, 2.0, 3.0, 2.0], [3.0, -2.0, 3.0, -6.0])
    assert formulas.variance(tau).tolist() == [1.0, 4.0, 0.0, 16.0]
    selected = formulas.select(tau, 4.0)
    assert selected.tolist() == [[0, 2, 0, 2], [0, -2, 0, -6]]
    energy = formulas.energy(selected)
    assert energy.tolist() == [8.0, 40.0]
    # Element 1 is a draw; in element 3 the first model is erased.
    assert formulas.erase_and_sum(selected, energy / energy.sum()).tolist() == [0, 0, 0, -6]
    # All models point upwards: weighted by 1/6 and 5/6. What all have alike is not selected, whatever the share.
    up = _t([6.0, 1.0], [12.0, 1.0])
    selected = formulas.select(up, 0.0)
    assert selected.tolist() == [[6, 0], [12, 0]]
    assert formulas.erase_and_sum(selected, _t(0.25, 0.75)).tolist() == [10.5, 0.0]


def test_a_mask_is_the_same_in_any_slices_and_has_its_density() -> None:
    whole = formulas.random_mask(3, "math", "layer.weight", 0, 100_000, 0.3)
    cuts = [0, 1, 7, 4096, 4097, 99_999, 100_000]
    pieces = [formulas.random_mask(3, "math", "layer.weight", a, b, 0.3) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    # Standard deviation of the share: sqrt(0.3 * 0.7 / 1e5) = 0.00145.
    assert abs(float(whole.double().mean()) - 0.3) < 0.006
    assert formulas.random_mask(3, "math", "layer.weight", 5, 9, 1.0).tolist() == [True] * 4


def test_masks_of_other_seeds_models_and_tensors_are_independent() -> None:
    keys = [(3, "math", "a"), (4, "math", "a"), (3, "code", "a"), (3, "math", "b"), (3, "matha", "")]
    masks = torch.stack([formulas.random_mask(*key, 0, 20_000, 0.5) for key in keys]).double()
    correlation = torch.corrcoef(masks)
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.035  # 5 standard deviations of 1/sqrt(20000)


def test_a_mask_is_what_it_was_when_it_was_published() -> None:
    """A merge of last year must come out the same: these bits may never change."""
    mask = formulas.random_mask(0, "math", "model.norm.weight", 0, 24, 0.5)
    assert "".join("x" if kept else "." for kept in mask.tolist()) == "..x..xx.xx.xxxxxx....x.x"

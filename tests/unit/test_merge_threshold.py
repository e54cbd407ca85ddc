"""The k-th largest of a stream is that of sorting, however little is held at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_mopd.merge.threshold import kth_largest

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(5000, generator=GENERATOR, dtype=torch.float64).abs()
CASES = {
    "normal": NORMAL,
    "nearly equal": 1 + NORMAL * 2.0**-50,
    "bf16 steps, most of them 0": (NORMAL > 1).double() * (NORMAL * 8).round() * 2.0**-14,
    "all equal": torch.full((5000,), 0.1, dtype=torch.float64),
    "all zero": torch.zeros(5000, dtype=torch.float64),
    "every exponent": 10 ** (200 * torch.rand(5000, generator=GENERATOR, dtype=torch.float64) - 300),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("counted", "collected"), [(1, 1), (1, 40), (1, 5000), (5000, 1)])
def test_it_is_that_of_sorting(case: str, counted: int, collected: int) -> None:
    values = CASES[case]
    passes = 0

    def pieces() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        return iter(values.split(999))

    largest_first = values.sort(descending=True).values
    for k in (1, 2, 17, 1000, 2500, 4999, 5000):
        passes = 0
        assert kth_largest(pieces, len(values), lambda _, k=k: k, counted, collected) == float(largest_first[k - 1])
        assert passes <= (1 if counted == 5000 else 2 if collected == 5000 else 5)


@pytest.mark.parametrize("counted", [1, 5000])
def test_the_rank_may_depend_on_how_many_are_not_zero(counted: int) -> None:
    values = CASES["bf16 steps, most of them 0"]
    nonzero = int(values.count_nonzero())
    assert 1000 < nonzero < 2000
    smallest = float(values[values > 0].min())
    seen: list[int] = []

    def rank(count: int) -> int:
        seen.append(count)
        return count

    assert kth_largest(lambda: values.split(999), len(values), rank, counted) == smallest
    assert seen == [nonzero]

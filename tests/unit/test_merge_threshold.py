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
@pytest.mark.parametrize("collected", [1, 40, 5000])
def test_it_is_that_of_sorting(case: str, collected: int) -> None:
    values = CASES[case]
    passes = 0

    def pieces() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        return iter(values.split(999))

    largest_first = values.sort(descending=True).values
    for k in (1, 2, 17, 1000, 2500, 4999, 5000):
        passes = 0
        assert kth_largest(pieces, len(values), k, collected) == float(largest_first[k - 1])
        assert passes <= 5
    if collected == 5000:
        assert passes == 1

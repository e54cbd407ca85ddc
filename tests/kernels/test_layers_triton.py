"""The fused kernels of `linear_divergence` in Triton's interpreter: in a subprocess, as in `test_rows_triton`."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.kernels.test_rows_triton import run_interpreted


def test_interpreted_kernels() -> None:
    run_interpreted("triton_linear_interpreted.py")

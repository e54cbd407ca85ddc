"""The bench runs, and what it says about accuracy and memory holds."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import bench, rows_cpp


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_divergence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench" / "divergence.csv"
    arguments = ["divergence", "--tokens", "8", "--vocab", "20000", "--rounds", "1", "--no-compile", "--csv", str(path)]
    assert bench.main(arguments) == 0
    rows = {row["contender"]: row for row in csv.DictReader(path.open())}
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    assert float(rows["eager log_softmax"]["gradient error"]) < 3e-3  # the gradient is rounded to bf16
    assert float(rows["eager, bf16 log_softmax"]["gradient error"]) > 1e-2
    if rows_cpp.available():
        assert float(rows["ours, cpp"]["gradient error"]) < 3e-3
        assert float(rows["ours, cpp"]["faster"]) > 2.0


def test_peak_is_counted() -> None:
    peak = bench.peak_mib(lambda: torch.ones(48 << 18))
    assert 47.0 < peak < 52.0
    assert bench.peak_mib(lambda: None) < 1.0

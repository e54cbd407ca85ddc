"""The normalised score, the table, summary.json and the PNG."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from megatron_mopd.config import LogSpec
from megatron_mopd.metrics import MetricLog
from megatron_mopd.report import (
    Comparison,
    accuracy_table,
    mean,
    normalised,
    plot_demo,
    read_series,
    write_summary,
)

COMPARISON = Comparison(
    before={"add": 0.5, "sort": 0.6},
    teachers={"adder": {"add": 0.9, "sort": 0.3}, "sorter": {"add": 0.4, "sort": 0.6}},
    after={"add": 0.8, "sort": 0.7},
    routed={"add": "adder", "sort": "sorter"},
)


@pytest.mark.parametrize(
    ("student", "before", "teacher", "score"),
    [
        (0.5, 0.5, 0.9, 0.0),
        (0.9, 0.5, 0.9, 1.0),
        (0.8, 0.5, 0.9, 0.75),
        (1.0, 0.5, 0.75, 2.0),
        (0.4, 0.5, 0.3, 0.5),
    ],
)
def test_normalised_score(student: float, before: float, teacher: float, score: float) -> None:
    assert normalised(student, before, teacher) == pytest.approx(score, abs=1e-12)


def test_a_teacher_without_a_lead_gives_no_score() -> None:
    assert math.isnan(normalised(0.8, 0.5, 0.5 + 1e-10))
    assert math.isnan(mean({"a": math.nan}))
    assert mean({"a": math.nan, "b": 0.5, "c": 1.0}) == 0.75


def test_the_score_is_of_the_domains_own_teacher() -> None:
    assert COMPARISON.normalised["add"] == pytest.approx(0.75)
    assert math.isnan(COMPARISON.normalised["sort"])
    assert COMPARISON.normalised_mean == pytest.approx(0.75)


def test_the_table_has_a_row_per_model_and_the_score() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(accuracy_table(COMPARISON))
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().replace("│", " ").replace("┃", " ").splitlines()]
    assert ["add", "sort", "mean"] in rows
    body = [row for row in rows if row and row[-1].replace(".", "").isdigit()]
    assert body == [
        ["student", "before", "0.500", "0.600", "0.550"],
        ["teacher", "adder", "0.900", "0.300", "0.600"],
        ["teacher", "sorter", "0.400", "0.600", "0.500"],
        ["student", "after", "0.800", "0.700", "0.750"],
        ["normalised", "score", "0.75", "nan", "0.75"],
    ]


def test_summary_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", COMPARISON, {"sft": 12.34567, "mopd": 60})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "accuracy": {
            "student before": {"add": 0.5, "sort": 0.6},
            "teacher adder": {"add": 0.9, "sort": 0.3},
            "teacher sorter": {"add": 0.4, "sort": 0.6},
            "student after": {"add": 0.8, "sort": 0.7},
        },
        "normalised": {"add": pytest.approx(0.75), "sort": None},
        "normalised_mean": pytest.approx(0.75),
        "seconds": {"sft": 12.346, "mopd": 60},
    }


def test_series_are_read_from_a_runs_metrics(tmp_path: Path) -> None:
    with MetricLog(tmp_path, LogSpec(tensorboard=False), rank=0) as log:
        log.step(0, {"accuracy/add": 0.5}, kind="eval")
        for step in range(3):
            log.step(step, {"reverse_kl": 9.0, "reverse_kl/add": 0.1 * step, "reverse_kl/sort": math.nan})
    assert read_series(tmp_path, "reverse_kl") == {"add": [(0, 0.0), (1, 0.1), (2, 0.2)]}
    assert read_series(tmp_path, "accuracy", "eval") == {"add": [(0, 0.5)]}
    assert read_series(tmp_path / "none", "reverse_kl") == {}


@pytest.mark.parametrize("empty", [False, True])
def test_the_plot_is_a_png(tmp_path: Path, empty: bool) -> None:
    kl = {} if empty else {"add": [(0, 0.16), (30, 0.05), (60, 0.02)], "sort": [(0, 0.1), (60, 0.0)]}
    accuracy = {} if empty else {"add": [(0, 0.5), (60, 0.8)], "sort": [(0, 0.6), (60, 0.7)]}
    path = tmp_path / "demo.png"
    plot_demo(path, kl, accuracy, {"add": 0.9, "sort": 0.75}, {"add": 0.5, "sort": 0.6})
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 10_000

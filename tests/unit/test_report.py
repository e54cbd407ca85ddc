"""The normalised score, the table and the demo's summary.json."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from megatron_mopd.compute import Compute
from megatron_mopd.report import Comparison, accuracy_table, mean, normalised, write_summary
from megatron_mopd.report_page.read_summary import read_summary

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
        (0.4, 0.5, 0.9, -0.25),
    ],
)
def test_normalised_score(student: float, before: float, teacher: float, score: float) -> None:
    assert normalised(student, before, teacher) == pytest.approx(score, abs=1e-12)


def test_a_teacher_without_a_lead_gives_no_score() -> None:
    assert math.isnan(normalised(0.8, 0.5, 0.5 + 1e-10))
    assert math.isnan(normalised(0.4, 0.5, 0.3))
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


def test_the_summary_is_a_study_that_the_report_reads(tmp_path: Path) -> None:
    cost = {name: Compute(generated_tokens=7, seconds=size) for size, name in enumerate(("base", "adder", "sorter"), 2)}
    cost["mopd"] = Compute(generated_tokens=8, trained_tokens=9, teacher_tokens=10, seconds=60.5)
    write_summary(
        tmp_path / "summary.json",
        COMPARISON,
        seed=3,
        compute=cost,
        runs={"mopd": "mopd"},
        seconds={"sft": 12.34567},
    )
    (tmp_path / "mopd").mkdir()
    study = read_summary(tmp_path)
    assert (study.domains, study.seeds, study.scaling) == (("add", "sort"), (3,), ())
    assert [study.base_accuracy(domain).mean for domain in study.domains] == [0.5, 0.6]
    assert [study.teacher_accuracy(domain).mean for domain in study.domains] == [0.9, 0.6]
    assert {teacher.name: teacher.domains for teacher in study.teachers} == {"adder": ("add",), "sorter": ("sort",)}
    assert [teacher.compute["seconds"] for teacher in study.teachers] == [3, 4]
    (mopd,) = study.methods
    assert (mopd.score.mean, mopd.score.interval) == (pytest.approx(0.75), None)
    assert mopd.score.per_seed == {3: pytest.approx(0.75)}
    assert mopd.domain_scores["add"].mean == pytest.approx(0.75)
    assert not mopd.domain_scores["sort"].known and mopd.domain_scores["sort"].per_seed == {}
    assert {domain: entry.mean for domain, entry in mopd.model.accuracy.items()} == {"add": 0.8, "sort": 0.7}
    assert mopd.runs == {3: tmp_path / "mopd"}
    assert list(mopd.compute.values()) == [8, 9, 10, 60.5]
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["base"]["compute"]["seconds"] == 2
    assert written["seconds"] == {"sft": 12.346}

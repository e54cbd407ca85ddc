"""docs/objectives.md names what the code has: kinds, options, bounds, metrics and counts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

from megatron_mopd.config import load_config
from megatron_mopd.method_config import (
    IMPORTANCE_BOUNDS,
    KINDS,
    Divergence,
    DomainWeightsSpec,
    ImportanceSpec,
    ObjectiveSpec,
)
from megatron_mopd.plan.compute import LOSS_PRODUCTS, SCORE_PRODUCTS
from megatron_mopd.student.step import IMPORTANCE_METRICS, METRICS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


def row(first: str) -> list[str]:
    """The cells after `first` of the table row that begins with it."""
    found = re.search(rf"^\| {re.escape(first)} \| (.+) \|$", PAGE, flags=re.MULTILINE)
    assert found is not None, first
    return [cell.strip() for cell in found[1].split(" | ")]


def test_every_kind_divergence_option_and_metric_is_there() -> None:
    options = [
        field.name for spec in (ObjectiveSpec, ImportanceSpec, DomainWeightsSpec) for field in dataclasses.fields(spec)
    ]
    metrics = [name for names in METRICS.values() for name in names]
    for name in (*options, *metrics, *IMPORTANCE_METRICS, *get_args(Divergence), *LOSS_PRODUCTS):
        assert f"`{name}" in PAGE, name


@pytest.mark.parametrize("stage", KINDS)
def test_kinds_are_of_their_stage(stage: str) -> None:
    for kind in KINDS[stage]:  # type: ignore[index]
        assert row(f"`{kind}`")[0] == stage


@pytest.mark.parametrize("kind", [kind for kind in IMPORTANCE_BOUNDS if kind != "none"])
def test_bounds_are_the_codes(kind: str) -> None:
    low, high = (float(each) for each in row(f"`{kind}`")[1].split(","))
    assert (low, high) == IMPORTANCE_BOUNDS[kind]


@pytest.mark.parametrize("kind", SCORE_PRODUCTS)
def test_products_are_the_plans(kind: str) -> None:
    costs = PAGE[PAGE.index("### What they cost") :]
    cells = re.search(rf"^\| `{kind}` \| (.+) \|$", costs, flags=re.MULTILINE)
    assert cells is not None
    assert [int(cell) for cell in cells[1].split(" | ")[2:4]] == [SCORE_PRODUCTS[kind], LOSS_PRODUCTS[kind]]


def test_bytes_kept_are_the_plans() -> None:
    from megatron_mopd.plan.memory import _score_bytes
    from tests.unit.test_plan import H100, setting_of

    file = H100 / "mopd.yaml"
    assert load_config(file).model.dtype == "bfloat16"
    for kind, text in (("sampled", "4 B"), ("teacher_topk", "768 B at k = 64"), ("full_vocab", "4,096 B")):
        assert _score_bytes(setting_of(file, f"objective.kind={kind}", ranks=64), 2048) == int(
            text.split(" B")[0].replace(",", "")
        )
        assert f"| {text} |" in PAGE

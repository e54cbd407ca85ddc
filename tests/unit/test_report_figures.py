"""What the report's figures are drawn from and what they show."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.report_page import curve_figures, study_figures
from megatron_mopd.report_page.axes import spread
from megatron_mopd.report_page.curves import Curve, Point, read_log
from megatron_mopd.report_page.published import ABLATIONS, TABLE
from megatron_mopd.report_page.read_summary import read_summary
from megatron_mopd.report_page.sources import Sources, read_sources
from megatron_mopd.report_page.study import Study
from megatron_mopd.report_page.style import ink, looks, luminance, styled
from tests.unit.report_study import summary, write_metrics, write_study


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return read_sources([write_study(tmp_path_factory.mktemp("study"))])


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with styled():
        yield


@pytest.fixture
def study(sources: Sources) -> Study:
    return sources.studies[0]


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("average", 0.3280),
        ("task_arithmetic", 0.8574),
        ("mix_rl", 0.8818),
        ("cascade_rl", 0.7752),
        ("off_policy", 0.8241),
        ("mopd_sampled", 0.9373),
    ],
)
def test_the_published_scores_follow_from_the_published_accuracies(name: str, score: float) -> None:
    assert TABLE[name].score() == pytest.approx(score, abs=5e-5)


def test_the_published_top_k_and_the_spread_of_mopd() -> None:
    assert ABLATIONS["mopd_topk"].score() == pytest.approx(0.9093, abs=5e-5)
    scores = TABLE["mopd_sampled"].domain_scores()
    assert scores == pytest.approx({"Math": 0.910, "IF": 0.954, "SWE": 0.948}, abs=5e-4)


def test_a_summary_is_read_as_it_is_written(study: Study) -> None:
    assert (study.title, study.domains, study.seeds) == ("Made up", ("add", "sort"), (0, 1))
    assert study.teacher_accuracy("sort").mean == 0.8 and study.teacher_accuracy("add").interval == (0.89, 0.91)
    assert not study.teacher_accuracy("none").known
    mopd = study.methods[2]
    assert (mopd.name, mopd.label, mopd.family, mopd.score.mean) == ("mopd", "MOPD full", "mopd", 0.956)
    assert mopd.score.per_seed == {0: pytest.approx(0.934), 1: pytest.approx(0.978)}
    assert mopd.compute == {"generated_tokens": 7300, "trained_tokens": 7400, "teacher_tokens": 7500, "seconds": 66}
    assert [path.name for path in mopd.runs.values()] == ["mopd0", "mopd1"]
    assert mopd.model.perplexity is not None and mopd.model.perplexity.mean == pytest.approx(21.456)
    assert [(point.teachers, point.score.mean) for point in study.scaling] == [(1, 0.981), (8, 0.872), (8, 0.743)]


def test_a_study_can_be_moved(sources: Sources, tmp_path: Path) -> None:
    content = summary()
    for entry in content["methods"].values():
        entry["runs"] = {seed: f"runs/tiny/reproduce/{path}" for seed, path in entry["runs"].items()}
    moved = read_sources([write_study(tmp_path, content)])
    assert [curve.name for curve in moved.curve_sets[0].curves] == ["mix_rl", "mopd"]
    assert moved.curve_sets[0].curves == sources.curve_sets[0].curves


def test_a_teacher_may_have_several_domains_or_none(tmp_path: Path) -> None:
    content = summary()
    content["teachers"]["adder"]["domain"] = ["add", "sort"]
    content["teachers"]["sorter"]["domain"] = None
    (tmp_path / "summary.json").write_text(json.dumps(content))
    study = read_summary(tmp_path)
    assert study.teacher_accuracy("sort").mean == 0.31
    assert study.teachers[1].domains == ()


def _values(points: list[Point]) -> list[tuple[float, ...]]:
    return [tuple(round(value, 9) for value in (p.x, p.value.mean, *(p.value.interval or ()))) for p in points]


def _curve(sources: Sources, name: str) -> Curve:
    return next(curve for curve in sources.curve_sets[0].curves if curve.name == name)


def test_curves_are_means_and_intervals_of_the_seeds_over_their_tokens(sources: Sources) -> None:
    mopd = _curve(sources, "mopd")
    # 100 + 140 + 160 = 400 tokens in seed 0, 460 in seed 1. Two seeds, 0.1 apart: t s / sqrt(2) = 12.7062047 * 0.05.
    half = 0.635310237
    start, end = (0, 0.55, 0.55 - half, 0.55 + half), (0.85, 0.85 - half, 0.85 + half)
    for tokens, last in ((True, 430), (False, 3)):
        points = _values(mopd.points("accuracy", "add", over_tokens=tokens))
        assert points == [pytest.approx(start), pytest.approx((last, *end))]
    means = [point.value.mean for point in mopd.mean_points("accuracy", over_tokens=True)]
    assert means == pytest.approx([0.425, 0.725])
    # A train line's value is that of the step's start: before it 0, 110 and 260 tokens.
    divergence = mopd.points("reverse_kl", "add", over_tokens=True)
    assert _values(divergence) == [(0, *[0.4] * 3), (110, *[0.2] * 3), (260, *[round(0.4 / 3, 9)] * 3)]
    assert mopd.points("reverse_kl", "none", over_tokens=True) == []


def test_only_steps_that_every_seed_has_are_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path / "a")
    lines = (tmp_path / "a/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/metrics.jsonl").write_text("".join(lines[:3]) + '{"half')
    logs = (read_log(tmp_path / "a"), read_log(tmp_path / "b"))
    curve = Curve(name="m", label="m", family="mopd", logs=logs)
    assert [point.x for point in curve.points("reverse_kl", "add", over_tokens=True)] == [0, 100]
    assert [point.x for point in curve.points("accuracy", "add", over_tokens=True)] == [0]


def test_a_run_without_generated_tokens_is_drawn_over_trained_ones(tmp_path: Path) -> None:
    write_metrics(tmp_path / "counted")
    write_metrics(tmp_path / "dataset", tokens=(0, 0, 0))
    write_metrics(tmp_path / "old", tokens=None)
    counted, dataset, old = (read_log(tmp_path / name) for name in ("counted", "dataset", "old"))
    assert counted.tokens == {0: 0, 1: 100, 2: 240, 3: 400} and not counted.trained
    assert dataset.tokens == {0: 0, 1: 200, 2: 400, 3: 600} and dataset.trained
    assert old.tokens is None


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/mopd", "b/mopd", "b/sampled")]
    for folder in folders:
        write_metrics(folder)
    (group,) = read_sources(folders).curve_sets
    assert [curve.label for curve in group.curves] == ["a/mopd", "b/mopd", "b/sampled"]
    (group,) = read_sources(folders[1:]).curve_sets
    assert [curve.label for curve in group.curves] == ["mopd", "sampled"]


def test_a_null_in_the_metrics_is_no_point(tmp_path: Path) -> None:
    line = {"step": 0, "kind": "train", "reverse_kl/add": None, "reverse_kl/sort": 0.5, "reverse_kl": 3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_log(tmp_path).series["reverse_kl"] == {"sort": {0: 0.5}}


def test_labels_move_apart_and_no_further() -> None:
    assert spread([0.1, 0.9], 0.2, 0, 1) == pytest.approx([0.1, 0.9])
    assert spread([0.5, 0.5], 0.2, 0, 1) == pytest.approx([0.4, 0.6])
    assert spread([0.9, 0.88, 0.1], 0.2, 0, 1) == pytest.approx([0.99, 0.79, 0.1])
    assert spread([1.0, 1.0, 1.0], 0.3, 0, 1) == pytest.approx([0.4, 0.7, 1.0])
    assert spread([], 0.2, 0, 1) == []
    crowded = spread([0.5] * 6, 0.3, 0, 1)  # they do not fit: still apart, from the bottom
    assert crowded == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.2, 1.5])


def _lines(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [([*map(float, line.get_xdata())], [*map(float, line.get_ydata())]) for line in axes.lines]


def _texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_score_figure_shows_mean_interval_seeds_and_the_published_score(study: Study, sources: Sources) -> None:
    (axes,) = study_figures.score_figure(study, looks(sources.families)).axes
    lines = _lines(axes)
    for place, score in enumerate((0.612, 0.734, 0.956)):
        assert ([score], [place]) in lines
        assert ([pytest.approx(score - 0.022), pytest.approx(score + 0.022)], [place, place]) in lines
    seeds = [pytest.approx(0.712), pytest.approx(0.756)]
    assert (seeds, [1.3, 1.3]) in lines
    assert ([pytest.approx(0.8818, abs=5e-5)], [1]) in lines
    assert [label.get_text() for label in axes.get_yticklabels()] == ["TIES", "Mix-RL", "MOPD full"]


def test_the_accuracy_figure_has_a_bar_per_method_and_the_lines(study: Study, sources: Sources) -> None:
    add, sort = study_figures.accuracy_figure(study, looks(sources.families)).axes
    assert [bar.get_width() for bar in add.patches[:3]] == pytest.approx([0.7448, 0.7936, 0.8824])
    assert [bar.get_width() for bar in sort.patches[:3]] == pytest.approx([0.606, 0.667, 0.778])
    assert ([0.9, 0.9], [0, 1]) in _lines(add) and ([0.3, 0.3], [0, 1]) in _lines(sort)
    assert {"0.74", "0.79", "0.88", "base", "teacher"} == set(_texts(add))


def test_the_scaling_figure_has_a_line_per_method(study: Study, sources: Sources) -> None:
    (axes,) = study_figures.scaling_figure(study, looks(sources.families)).axes
    assert ([1, 8], [0.981, 0.872]) in _lines(axes)
    assert ([8, 8], [0.7, 0.78]) in _lines(axes)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "8"]
    assert _texts(axes) == ["MOPD full", "MOPD sampled", "teachers"]


def test_the_compute_figure_ends_with_the_teachers(study: Study, sources: Sources) -> None:
    generated, trained, teacher, seconds = study_figures.compute_figure(study, looks(sources.families)).axes
    assert [bar.get_width() for bar in generated.patches] == [0, 7100, 7300, 11000]
    assert [bar.get_width() for bar in trained.patches] == [0, 7200, 7400, 11200]
    assert _texts(teacher) == ["0", "0", "7.5k", "0"]
    assert _texts(seconds) == ["1.25", "55", "66", "77"]


def test_the_forgetting_figure_has_the_base(study: Study, sources: Sources) -> None:
    text, jumble = study_figures.forgetting_figure(study, looks(sources.families)).axes
    assert ([1.0, 1.0], [0, 1]) in _lines(text)
    assert ([pytest.approx((20.956 / 20.1 + 21.956 / 20.3) / 2)], [2]) in _lines(text)
    assert ([pytest.approx(0.10612)], [0]) in _lines(jumble)


def test_learning_curves_have_the_mean_and_each_domain(sources: Sources) -> None:
    (group,) = sources.curve_sets
    mean, add, sort = curve_figures.learning_figure(group, looks(sources.families)).axes
    assert [axes.get_title(loc="left") for axes in (mean, add, sort)] == ["mean of the domains", "add", "sort"]
    assert ([0, 430], [pytest.approx(0.55), pytest.approx(0.85)]) in _lines(add)
    assert ([0, 430], [0.3, 0.6]) in _lines(sort)
    assert ([0, 1], [pytest.approx(0.85)] * 2) in _lines(mean)  # teachers: (0.9 + 0.8) / 2
    assert _texts(add) == ["Mix-RL", "MOPD full", "base", "teacher"]


def test_only_runs_with_a_teacher_have_a_divergence(sources: Sources) -> None:
    (group,) = sources.curve_sets
    figure = curve_figures.divergence_figure(group, looks(sources.families))
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]
    assert _texts(figure.axes[-1]) == ["MOPD full"]


def test_token_shares_are_stacked_to_one(sources: Sources) -> None:
    (group,) = sources.curve_sets
    figure = curve_figures.share_figure(group)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Mix-RL", "MOPD full"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in figure.axes[0].collections]
    assert tops == pytest.approx([0.25, 1.0])


def test_a_method_looks_the_same_in_every_study_and_like_no_other() -> None:
    families = {"average": "merge", "mopd": "mopd", "mix_rl": "rl", "cascade_rl": "rl", "mopd_topk": "mopd"}
    table = looks(families)
    assert table["mopd"].colour == "#0072B2" and table["mix_rl"].colour == "#D55E00"
    assert len({(look.colour, look.line) for look in table.values()}) == len(families)
    runs = looks({f"run{index}": "run" for index in range(14)})
    assert len({(look.colour, look.line) for look in runs.values()}) == 14
    for first, second in itertools.pairwise(looks({str(i): "merge" for i in range(5)}).values()):
        assert abs(luminance(first.colour) - luminance(second.colour)) > 0.1


def test_text_in_a_light_colour_is_darkened() -> None:
    assert ink("#0072B2") == "#0072B2"
    assert luminance(ink("#FFF0F0")) <= 0.48
    assert luminance("#FFFFFF") == pytest.approx(1) and luminance("#000000") == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1.25, "1.25"), (999.4, "999"), (999.6, "1k"), (25_600, "25.6k"), (3_070_000, "3.07M"), (2e9, "2G")],
)
def test_counts_have_three_digits(value: float, shown: str) -> None:
    assert study_figures.compact(value) == shown

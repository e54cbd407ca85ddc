"""Sources -> the sections of the report, with their tables and figures, in the order of reading."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mopd.report_page import curve_figures, study_figures, tables
from megatron_mopd.report_page.sources import CurveSet, Sources
from megatron_mopd.report_page.study import Study
from megatron_mopd.report_page.style import Look, as_pdf, as_png, looks, styled
from megatron_mopd.report_page.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    name: str
    """File name without its ending."""
    caption: str
    alt: str
    inches: float
    """Width."""
    png: bytes
    pdf: bytes


@dataclass(frozen=True, slots=True)
class Heading:
    """Which folder the next blocks are of, where there are several."""

    text: str


Block = Table | Drawing | Heading


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    name: str
    title: str
    blocks: tuple[Block, ...]
    missing: str
    """Said where there are no blocks: what is missing."""


def sections(sources: Sources) -> list[Section]:
    """Every section, also the ones without data. Draws all figures."""
    build = _Builder(sources, looks(sources.families))
    with styled():
        return [
            build.of_studies("scores", "Methods", "a study (`mopd reproduce` or `mopd demo`) with methods", _scores),
            build.of_studies("accuracy", "Accuracy per domain", "accuracies of methods", _accuracy),
            build.of_studies("benchmarks", "Benchmarks", "`evaluation.benchmarks`", _benchmarks),
            build.of_studies("scaling", "Retention against number of teachers", "a study with `scaling`", _scaling),
            build.of_curves("learning", "Learning curves", "evaluations during training", "accuracy", _learning),
            build.of_curves("divergence", "KL to the teachers", "a run of stage mopd", "reverse_kl", _divergence),
            build.of_curves("share", "Tokens per domain", "a run's metrics", "token_share", _share),
            build.of_studies("compute", "Compute per method", "methods with their compute", _compute),
            build.of_studies("forgetting", "Forgetting", "perplexities or out-of-domain tasks", _forgetting),
            Section(name="published", title="Published results", blocks=(tables.published_table(),), missing=""),
        ]


def _scores(study: Study, draw: _Draw) -> list[Block]:
    if not study.methods:
        return []
    spread = _spread(study, "; small dots: seeds")
    caption = f"Mean normalised score{spread}; diamonds: published (arXiv 2606.30406)."
    figure = study_figures.score_figure(study, draw.looks)
    blocks: list[Block] = [tables.score_table(study), draw("scores", figure, caption, tables.headline(study.methods))]
    return blocks


def _accuracy(study: Study, draw: _Draw) -> list[Block]:
    if not any(method.model.accuracy for method in study.methods) or not study.domains:
        return []
    caption = "Accuracy on held-out prompts" + _spread(study) + ". Dotted: the base. Dashed: the domain's teacher."
    return [draw("accuracy", study_figures.accuracy_figure(study, draw.looks), caption), tables.accuracy_table(study)]


def _benchmarks(study: Study, draw: _Draw) -> list[Block]:
    models = [study.base, *(teacher.model for teacher in study.teachers), *(method.model for method in study.methods)]
    return [tables.benchmark_table(study)] if any(model.benchmarks for model in models) else []


def _scaling(study: Study, draw: _Draw) -> list[Block]:
    if not any(point.score.known for point in study.scaling):
        return []
    caption = "What the student recovers of its teachers' headroom, over their number" + _spread(study) + "."
    return [draw("scaling", study_figures.scaling_figure(study, draw.looks), caption), tables.scaling_table(study)]


def _compute(study: Study, draw: _Draw) -> list[Block]:
    if not any(method.compute for method in study.methods):
        return []
    caption = "Cost of each method, and (grey) of training the teachers, which merging and distillation need first."
    return [draw("compute", study_figures.compute_figure(study, draw.looks), caption), tables.compute_table(study)]


def _forgetting(study: Study, draw: _Draw) -> list[Block]:
    outside = any(method.model.out_of_domain for method in study.methods)
    if not outside and not study_figures.has_perplexity(study.methods):
        return []
    caption = "Held-out text (lower is better) and tasks that nothing was trained on" + _spread(study) + "."
    figure = study_figures.forgetting_figure(study, draw.looks)
    return [draw("forgetting", figure, caption), tables.forgetting_table(study)]


def _learning(group: CurveSet, draw: _Draw) -> list[Block]:
    lines = " Dotted: the base. Dashed: the domain's teacher." if group.study else ""
    caption = "Accuracy on held-out prompts during training" + _over(group, "accuracy") + lines
    return [draw("learning", curve_figures.learning_figure(group, draw.looks), caption)]


def _divergence(group: CurveSet, draw: _Draw) -> list[Block]:
    caption = "Reverse KL of the student to the teacher of each domain, on its own answers" + _over(group, "reverse_kl")
    return [draw("divergence", curve_figures.divergence_figure(group, draw.looks), caption)]


def _share(group: CurveSet, draw: _Draw) -> list[Block]:
    caption = "Share of the trained tokens that each domain has" + _over(group, "token_share", spread=False)
    return [draw("share", curve_figures.share_figure(group), caption)]


def _spread(study: Study, more: str = "") -> str:
    return f", {len(study.seeds)} seeds with 95% intervals{more}" if len(study.seeds) > 1 else ", one seed"


def _over(group: CurveSet, metric: str, *, spread: bool = True) -> str:
    curves = curve_figures.with_metric(group, metric)
    tokens = curve_figures.over_tokens(curves)
    seeds = max(len(curve.logs) for curve in curves)
    text = " over generated tokens" if tokens else " over steps (not every run counted its tokens)"
    if seeds > 1:
        text += f", mean of {seeds} seeds" + (" with 95% intervals" if spread else "")
    trained = [curve.label for curve in curves if curve.is_trained_only]
    if tokens and trained:
        text += f"; {', '.join(trained)}: over the tokens of their data set"
    return text + "."


@dataclass(frozen=True, slots=True)
class _Draw:
    """Makes a drawing of a figure; `suffix` keeps the names of several sources apart."""

    looks: Mapping[str, Look]
    suffix: str

    def __call__(self, name: str, figure: Any, caption: str, alt: str = "") -> Drawing:
        return Drawing(
            name=name + self.suffix,
            caption=caption,
            alt=alt or caption,
            inches=float(figure.get_figwidth()),
            png=as_png(figure),
            pdf=as_pdf(figure),
        )


@dataclass(frozen=True, slots=True)
class _Builder:
    sources: Sources
    looks: Mapping[str, Look]

    def of_studies(self, name: str, title: str, needs: str, blocks: Callable[[Study, _Draw], list[Block]]) -> Section:
        titles = [study.title for study in self.sources.studies]
        parts = [
            (title, blocks(study, _Draw(self.looks, suffix)))
            for study, title, suffix in zip(self.sources.studies, titles, _suffixes(titles), strict=True)
        ]
        return _section(name, title, needs, parts)

    def of_curves(
        self, name: str, title: str, needs: str, metric: str, blocks: Callable[[CurveSet, _Draw], list[Block]]
    ) -> Section:
        titles = [group.title for group in self.sources.curve_sets]
        parts = [
            (title, blocks(group, _Draw(self.looks, suffix)) if curve_figures.with_metric(group, metric) else [])
            for group, title, suffix in zip(self.sources.curve_sets, titles, _suffixes(titles), strict=True)
        ]
        return _section(name, title, needs, parts)


def _section(name: str, title: str, needs: str, parts: list[tuple[str, list[Block]]]) -> Section:
    filled = [(heading, blocks) for heading, blocks in parts if blocks]
    blocks: list[Block] = []
    for heading, own in filled:
        blocks += [Heading(heading), *own] if len(parts) > 1 else own
    return Section(name=name, title=title, blocks=tuple(blocks), missing=f"No data: needs {needs}.")


def _suffixes(titles: list[str]) -> list[str]:
    """'' for one; otherwise '-<title in plain letters>', numbered where that is no difference."""
    if len(titles) == 1:
        return [""]
    words = [re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "study" for title in titles]
    return [
        f"-{word}" if words.count(word) == 1 else f"-{word}-{words[: place + 1].count(word)}"
        for place, word in enumerate(words)
    ]

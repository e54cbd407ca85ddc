"""Figures of a study: scores, accuracy per domain, retention against teachers, compute, forgetting."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mopd.report_page.axes import EndLabel, Row, bars, dots, label_ends, name_line, panels, reference
from megatron_mopd.report_page.published import ABLATIONS, TABLE
from megatron_mopd.report_page.study import COMPUTE, UNKNOWN, Method, Study
from megatron_mopd.report_page.style import BASE, COLUMN, PAGE, TEACHER, TEXT, Look
from megatron_mopd.reproduce.statistics import Estimate

_ROW, _MARGIN = 0.185, 0.62
"""Inches: the height of a bar's row, and of title and axis."""
_TITLE_PAD = 13
"""Points: room for the names of lines below a title."""
_LEAST_WIDTH = 0.02
"""Of an axis of accuracies or ratios."""
_TEACHERS_COLOUR = "#8C8C8C"

Looks = Mapping[str, Look]


def score_figure(study: Study, looks: Looks) -> Any:
    """Mean normalised score with interval and every seed, and the paper's number as a diamond."""
    methods = study.methods
    figure, (axes,) = panels(1, 1, COLUMN, _height(methods))
    dots(axes, [Row(method.label, method.score, looks[method.name].colour) for method in methods])
    for place, method in enumerate(methods):
        seeds = list(method.score.per_seed.values())
        colour = looks[method.name].colour
        axes.plot(seeds, [place + 0.3] * len(seeds), "o", color=colour, markersize=2, alpha=0.7, markeredgewidth=0)
        published = TABLE.get(method.name) or ABLATIONS.get(method.name)
        if published:
            axes.plot(published.score(), place, "D", markersize=4, markerfacecolor="white", color=TEXT, zorder=2.8)
    reference(axes, Estimate(mean=1.0), teacher=True, vertical=True)
    reference(axes, Estimate(mean=0.0), teacher=False, vertical=True)
    name_line(axes, Estimate(mean=1.0), "teachers", TEACHER)
    name_line(axes, Estimate(mean=0.0), "base", BASE)
    axes.set_xlabel("mean normalised score")
    return figure


def accuracy_figure(study: Study, looks: Looks) -> Any:
    """A panel per domain: a bar per method; the lines are the base and the domain's teacher."""
    columns = min(3, len(study.domains)) if len(study.domains) != 4 else 2
    figure, grid = panels(len(study.domains), columns, PAGE, _height(study.methods), sharey=True)
    for index, (axes, domain) in enumerate(zip(grid, study.domains, strict=True)):
        rows = [
            Row(method.label, method.model.accuracy.get(domain, UNKNOWN), looks[method.name].colour)
            for method in study.methods
        ]
        bars(axes, rows, "{:.2f}".format, inside_from=0.15)
        lines = ((study.base_accuracy(domain), "base", BASE), (study.teacher_accuracy(domain), "teacher", TEACHER))
        for estimate, name, colour in lines:
            reference(axes, estimate, teacher=name == "teacher", vertical=True)
            name_line(axes, estimate, name, colour, "right" if name == "base" else "left")
        axes.set_title(domain, pad=_TITLE_PAD)
        axes.set_xlim(0, 1.0)
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "", "0.5", "", "1"))
        axes.set_xlabel("accuracy")
        axes.tick_params(axis="y", labelleft=index % columns == 0)
    return figure


def scaling_figure(study: Study, looks: Looks) -> Any:
    """Headroom recovered over the number of teachers, a line per method."""
    figure, (axes,) = panels(1, 1, COLUMN, 2.4)
    axes.set_xscale("log", base=2)
    counts = sorted({point.teachers for point in study.scaling})
    labels = []
    for name in dict.fromkeys(point.method for point in study.scaling):
        points = sorted((p for p in study.scaling if p.method == name and p.score.known), key=lambda p: p.teachers)
        if not points:
            continue
        look = looks[name]
        x, y = [point.teachers for point in points], [point.score.mean for point in points]
        axes.plot(x, y, color=look.colour, linestyle=look.line, marker=look.marker, markersize=3.8)
        for point in points:
            if point.score.interval is not None:
                axes.plot((point.teachers,) * 2, point.score.interval, color=look.colour, linewidth=1.0)
        labels.append(EndLabel(y[-1], textwrap.fill(points[0].label, 18), look.colour))
    reference(axes, Estimate(mean=1.0), teacher=True, vertical=False)
    labels.append(EndLabel(1.0, "teachers", TEACHER))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.set(xlabel="teachers", ylabel="headroom recovered")
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, 1.0 + 0.08 * (1.0 - low)))
    label_ends(axes, labels)
    return figure


def compute_figure(study: Study, looks: Looks) -> Any:
    """A panel per kind of cost; the last bar is the training of all teachers together."""
    keys = [key for key in COMPUTE if any(key in method.compute for method in study.methods)]
    figure, grid = panels(len(keys), len(keys), PAGE, _height(study.methods) + _ROW, sharey=True)
    teachers = {key: [t.compute[key] for t in study.teachers if key in t.compute] for key in keys}
    for axes, key in zip(grid, keys, strict=True):
        rows = [
            Row(method.label, Estimate(mean=method.compute.get(key, float("nan"))), looks[method.name].colour)
            for method in study.methods
        ]
        total = sum(teachers[key]) if teachers[key] else float("nan")
        rows.append(Row("training the teachers", Estimate(mean=total), _TEACHERS_COLOUR))
        bars(axes, rows, compact)
        axes.set_title(COMPUTE[key])
        axes.xaxis.set_major_locator(_locator(3))
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        axes.set_xlim(0, axes.get_xlim()[1] * 1.22 or 1)
    return figure


def forgetting_figure(study: Study, looks: Looks) -> Any:
    """Perplexity and accuracy on tasks that nothing trained on; the line is the base."""
    tasks = list(dict.fromkeys(name for method in study.methods for name in method.model.out_of_domain))
    columns: list[tuple[str, str, Estimate, list[Estimate]]] = []
    if has_perplexity(study.methods):
        values = [method.model.perplexity_over(study.base) or UNKNOWN for method in study.methods]
        columns.append(("held-out text", "perplexity over the base's", Estimate(mean=1.0), values))
    for task in tasks:
        values = [method.model.out_of_domain.get(task, UNKNOWN) for method in study.methods]
        columns.append((task, "accuracy", study.base.out_of_domain.get(task, UNKNOWN), values))
    per_row = min(3, len(columns))
    width = PAGE if per_row > 1 else COLUMN
    figure, grid = panels(len(columns), per_row, width, _height(study.methods), sharey=True)
    for index, (axes, (title, label, base, values)) in enumerate(zip(grid, columns, strict=True)):
        rows = zip(study.methods, values, strict=True)
        dots(axes, [Row(method.label, value, looks[method.name].colour) for method, value in rows])
        reference(axes, base, teacher=False, vertical=True)
        name_line(axes, base, "base", BASE)
        _widen(axes)
        axes.set_title(title, pad=_TITLE_PAD)
        axes.set_xlabel(label)
        axes.tick_params(axis="y", labelleft=index % per_row == 0)
    return figure


def _widen(axes: Any) -> None:
    """Where all values are the same, the axis would show their rounding."""
    low, high = axes.get_xlim()
    if high - low < _LEAST_WIDTH:
        middle = (low + high) / 2
        axes.set_xlim(middle - _LEAST_WIDTH / 2, middle + _LEAST_WIDTH / 2)


def has_perplexity(methods: Sequence[Method]) -> bool:
    return any(method.model.perplexity is not None for method in methods)


def compact(value: float) -> str:
    """Three digits: 0, 41.2, 312, 1.2k, 25.6k, 3.07M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _height(methods: Sequence[Method]) -> float:
    return _MARGIN + _ROW * max(3, len(methods))


def _locator(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)

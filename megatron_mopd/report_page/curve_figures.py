"""Figures over the course of training: accuracy, reverse KL and token share of each domain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_mopd.report_page.axes import EndLabel, label_ends, panels, reference
from megatron_mopd.report_page.curves import Curve, Point
from megatron_mopd.report_page.sources import CurveSet
from megatron_mopd.report_page.study import Study
from megatron_mopd.report_page.study_figures import compact
from megatron_mopd.report_page.style import BASE, COLUMN, PAGE, TEACHER, Look, domain_colours
from megatron_mopd.reproduce.statistics import Estimate

Looks = Mapping[str, Look]


def with_metric(group: CurveSet, metric: str) -> list[Curve]:
    """The curves of the group that have the metric, for one domain or more, more than once."""
    return [
        curve
        for curve in group.curves
        if any(len(curve.points(metric, domain, over_tokens=False)) > 1 for domain in curve.domains(metric))
    ]


def over_tokens(curves: Sequence[Curve]) -> bool:
    """Whether all of them counted tokens; otherwise their common axis is steps."""
    return all(curve.counts_tokens for curve in curves)


def learning_figure(group: CurveSet, looks: Looks) -> Any:
    """Held-out accuracy: the mean over domains, then each domain, with the lines of base and teacher."""
    curves = with_metric(group, "accuracy")
    tokens = over_tokens(curves)
    domains = _domains(curves, "accuracy")
    names = ["mean of the domains", *domains] if len(domains) > 1 else domains
    columns = 1 if len(names) == 1 else 2 if len(names) <= 4 else 3
    height = max(1.9, 0.7 + 0.125 * (len(curves) + 2))  # inches: room for every curve's label
    figure, grid = panels(len(names), columns, COLUMN if columns == 1 else PAGE, height)
    ends = []
    for axes, name in zip(grid, names, strict=True):
        drawn = {
            curve.name: curve.points("accuracy", name, over_tokens=tokens)
            if name in domains
            else curve.mean_points("accuracy", over_tokens=tokens)
            for curve in curves
        }
        labels = _lines(axes, curves, drawn, looks)
        if group.study is not None:
            labels += _reference_lines(axes, group.study, [name] if name in domains else domains)
        _finish(axes, name, tokens, "accuracy")
        ends.append(labels)
    _label_panels(grid, ends, 1 if columns < 3 else columns)
    return figure


def divergence_figure(group: CurveSet, looks: Looks) -> Any:
    """Reverse KL to the domain's teacher, a panel per domain."""
    curves = with_metric(group, "reverse_kl")
    tokens = over_tokens(curves)
    domains = _domains(curves, "reverse_kl")
    columns = min(3, len(domains))
    figure, grid = panels(len(domains), columns, COLUMN if columns == 1 else PAGE, 1.9, sharey=True)
    ends = []
    for index, (axes, domain) in enumerate(zip(grid, domains, strict=True)):
        drawn = {curve.name: curve.points("reverse_kl", domain, over_tokens=tokens) for curve in curves}
        ends.append(_lines(axes, curves, drawn, looks))
        _finish(axes, domain, tokens, "reverse KL (nats per token)" if index % columns == 0 else "")
        if all(point.value.mean > 0 for points in drawn.values() for point in points):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
    _label_panels(grid, ends, columns)
    return figure


def share_figure(group: CurveSet) -> Any:
    """Share of the trained tokens of each domain, stacked; a panel per method."""
    curves = with_metric(group, "token_share")
    tokens = over_tokens(curves)
    domains = _domains(curves, "token_share")
    colours = domain_colours(domains)
    columns = min(4, len(curves))
    width = COLUMN if columns == 1 else PAGE
    figure, grid = panels(len(curves), columns, width, max(1.75, 0.65 + 0.115 * len(domains)), sharey=True)
    ends = []
    for index, (axes, curve) in enumerate(zip(grid, curves, strict=True)):
        series = {domain: curve.points("token_share", domain, over_tokens=tokens) for domain in domains}
        x = sorted({point.x for points in series.values() for point in points})
        by_domain = {domain: {point.x: point.value.mean for point in points} for domain, points in series.items()}
        heights = [[by_domain[domain].get(place, 0.0) for place in x] for domain in domains]
        axes.stackplot(x, heights, colors=[colours[domain] for domain in domains], edgecolor="white", linewidth=0.4)
        axes.set(xlim=(x[0], x[-1]), ylim=(0, 1))
        _finish(axes, curve.label, tokens, "share of tokens" if index % columns == 0 else "")
        tops = itertools.accumulate(row[-1] for row in heights)
        ends.append(
            [
                EndLabel(top - row[-1] / 2, domain, colours[domain])
                for domain, row, top in zip(domains, heights, tops, strict=True)
            ]
        )
    _label_panels(grid, ends, columns)
    return figure


def _reference_lines(axes: Any, study: Study, domains: Sequence[str]) -> list[EndLabel]:
    """Base and teachers, each on the mean of the domains."""
    labels = []
    for accuracy, text, colour in ((study.base_accuracy, "base", BASE), (study.teacher_accuracy, "teacher", TEACHER)):
        mean = sum(accuracy(domain).mean for domain in domains) / len(domains)
        if math.isfinite(mean):
            reference(axes, Estimate(mean=mean), teacher=text == "teacher", vertical=False)
            labels.append(EndLabel(mean, text, colour))
    return labels


def _domains(curves: Sequence[Curve], metric: str) -> list[str]:
    return list(dict.fromkeys(domain for curve in curves for domain in curve.domains(metric)))


def _label_panels(grid: Sequence[Any], ends: Sequence[Sequence[EndLabel]], every: int) -> None:
    """Label the lines of every panel that ends a row of `every`; the same colours hold for the rest."""
    for index, (axes, labels) in enumerate(zip(grid, ends, strict=True)):
        if index % every == every - 1:
            label_ends(axes, labels, 7.5)


def _lines(axes: Any, curves: Sequence[Curve], drawn: Mapping[str, Sequence[Point]], looks: Looks) -> list[EndLabel]:
    """Draw the curves with their intervals; returns the labels of their ends."""
    from matplotlib.collections import FillBetweenPolyCollection

    labels = []
    for curve in curves:
        points, look = drawn[curve.name], looks[curve.name]
        if not points:
            continue
        x = [point.x for point in points]
        axes.plot(x, [point.value.mean for point in points], color=look.colour, linestyle=look.line, zorder=2.5)
        bounds = [point.value.interval for point in points if point.value.interval]
        if len(bounds) == len(points):
            low, high = np.array(bounds).T
            band = FillBetweenPolyCollection("x", np.array(x), low, high, color=look.colour, alpha=0.13, linewidth=0)
            axes.add_collection(band, autolim=False)  # the means decide what is shown: two seeds' intervals are wide
        labels.append(EndLabel(points[-1].value.mean, curve.label, look.colour))
    return labels


def _finish(axes: Any, title: str, tokens: bool, ylabel: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("generated tokens" if tokens else "steps")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    if tokens:
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
    axes.margins(x=0.0)

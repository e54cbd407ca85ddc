"""What several figures are made of: a grid of panels, labels at the ends of lines, rows of estimates."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mopd.report_page.style import BASE, TEACHER, TEXT, ink, luminance, new_figure
from megatron_mopd.reproduce.statistics import Estimate

_POINTS_PER_INCH = 72


@dataclass(frozen=True, slots=True)
class EndLabel:
    y: float
    """In data coordinates."""
    text: str
    colour: str


@dataclass(frozen=True, slots=True)
class Row:
    """One bar or dot, with its name at the left."""

    label: str
    estimate: Estimate
    colour: str


def panels(count: int, columns: int, width: float, height: float, **share: Any) -> tuple[Any, list[Any]]:
    """A figure of `width` inches and `count` axes in rows of `columns`, each row `height` inches; the rest is empty."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(width, rows * height)
    figure.get_layout_engine().set(w_pad=0.08)  # inches: the last number of an axis and the first of the next
    grid = figure.subplots(rows, columns, squeeze=False, **share).ravel().tolist()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, in the order of `wanted` and near it, inside [low, high] if they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    # Least squares under the order is the running mean of blocks (pool adjacent violators).
    blocks: list[tuple[float, int]] = []
    for place, index in enumerate(order):
        blocks.append((wanted[index] - place * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, count), (second, more) = blocks[-2:]
            blocks[-2:] = [((first * count + second * more) / (count + more), count + more)]
    offsets = [offset for offset, count in blocks for _ in range(count)]
    top = high - (len(wanted) - 1) * gap
    places = [0.0] * len(wanted)
    for place, index in enumerate(order):
        places[index] = max(low, min(offsets[place], max(low, top))) + place * gap
    return places


def label_ends(axes: Any, labels: Sequence[EndLabel], size: float = 8) -> None:
    """Write the labels right of the axes at their heights, moved apart where they would overlap."""
    figure = axes.figure
    figure.draw_without_rendering()  # the height that the layout gives the axes
    height = axes.get_window_extent().height / figure.dpi * _POINTS_PER_INCH
    to_fraction = axes.transAxes.inverted()
    at = [to_fraction.transform(axes.transData.transform((axes.get_xlim()[0], label.y)))[1] for label in labels]
    at = [min(1.0, max(0.0, value)) for value in at]
    lines = max((label.text.count("\n") + 1 for label in labels), default=1)
    places = spread(at, 1.1 * lines * size / height, 0.0, 1.0)
    for label, true, place in zip(labels, at, places, strict=True):
        axes.annotate(
            label.text,
            xy=(1.0, true),
            xycoords="axes fraction",
            xytext=(1.0 + 12 / (axes.get_window_extent().width / figure.dpi * _POINTS_PER_INCH), place),
            textcoords="axes fraction",
            color=ink(label.colour),
            fontsize=size,
            linespacing=0.95,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )


def reference(axes: Any, estimate: Estimate, *, teacher: bool, vertical: bool) -> None:
    """The line of the teacher (dashed) or of the base (dotted), with its interval as a band."""
    if not estimate.known:
        return
    line, span = (axes.axvline, axes.axvspan) if vertical else (axes.axhline, axes.axhspan)
    colour = TEACHER if teacher else BASE
    line(estimate.mean, color=colour, linestyle="--" if teacher else ":", linewidth=0.9, zorder=1.5)
    if estimate.interval is not None:
        span(*estimate.interval, color=colour, alpha=0.08, linewidth=0, zorder=0.5)


def bars(axes: Any, rows: Sequence[Row], show: Callable[[float], str], *, inside_from: float = math.inf) -> None:
    """Horizontal bars from 0, the first on top, with intervals.

    What `show` makes of the mean stands at the bar's end; from a mean of `inside_from` on at its start, inside.
    """
    for place, row in enumerate(rows):
        if not row.estimate.known:
            axes.annotate("not measured", (0, place), (3, 0), textcoords="offset points", va="center", color=BASE)
            continue
        axes.barh(place, row.estimate.mean, height=0.7, color=row.colour)
        _whisker(axes, row.estimate, place, TEXT)
        inside = row.estimate.mean >= inside_from
        top = row.estimate.interval[1] if row.estimate.interval else row.estimate.mean
        end = 0.0 if inside else max(row.estimate.mean, top, 0.0)
        colour = "white" if inside and luminance(row.colour) < 0.55 else TEXT
        axes.annotate(
            show(row.estimate.mean),
            (end, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=colour,
        )
    name_rows(axes, [row.label for row in rows])


def dots(axes: Any, rows: Sequence[Row]) -> None:
    """Means with intervals, the first on top."""
    for place, row in enumerate(rows):
        if row.estimate.known:
            _whisker(axes, row.estimate, place, row.colour, 1.3)
            axes.plot(row.estimate.mean, place, "o", color=row.colour, markersize=4.5, zorder=3)
        else:
            axes.annotate("not measured", (0.5, place), xycoords=("axes fraction", "data"), va="center", color=BASE)
    name_rows(axes, [row.label for row in rows])


def name_line(axes: Any, estimate: Estimate, text: str, colour: str, side: str = "center") -> None:
    """Write a vertical line's name above the axes; `side`: where the line is in the text."""
    if estimate.known:
        at = {"textcoords": "offset points", "xycoords": axes.get_xaxis_transform()}
        axes.annotate(text, (estimate.mean, 1), (0, 1.5), **at, ha=side, fontsize=7.5, color=colour)


def name_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 30) for label in labels])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x")


def _whisker(axes: Any, estimate: Estimate, place: float, colour: str, width: float = 0.9) -> None:
    if estimate.interval is not None:
        axes.plot(estimate.interval, (place, place), color=colour, linewidth=width, solid_capstyle="butt", zorder=2.5)

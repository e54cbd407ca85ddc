"""The measured table: on the terminal, as CSV, as bars."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.bench.ceilings import Work
from kernels.bench.linear import Floor
from kernels.bench.measure import Measured

OURS, THEIRS, INK, GRID = "#0072B2", "#B8BDC4", "#222222", "#E6E8EB"


@dataclass(frozen=True, slots=True)
class Unit:
    label: str
    per_second: float
    digits: int


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def timings(
    title: str, measured: Sequence[Measured], unit: Unit, work: Work, ceiling: float, errors: Sequence[str]
) -> Table:
    """Ratios are to the first contender, eager torch. Peaks below 1 MiB count as 1: Linux counts pages loosely."""
    header = ("contender", unit.label, "min", "wall", "faster", "peak MiB", "smaller", *errors, work.unit,
              f"% of {work.ceiling}", "first s")  # fmt: skip
    base, base_peak = statistics.median(measured[0].seconds), measured[0].peak
    rows = []
    for each in measured:
        seconds = statistics.median(each.seconds)
        times = (seconds, min(each.seconds), statistics.median(each.wall))
        rate = work.rate(seconds)
        rows.append((
            each.name, *(f"{time * unit.per_second:.{unit.digits}f}" for time in times), f"{base / seconds:.2f}",
            f"{each.peak:.1f}", f"{base_peak / max(each.peak, 1.0):.2f}", *(f"{error:.1e}" for error in each.errors),
            f"{rate:.3g}", f"{100 * rate / ceiling:.0f}", f"{each.first:.1f}",
        ))  # fmt: skip
    return Table(title, header, tuple(rows))


def show(table: Table) -> None:
    print(table.title)
    lines = (table.header, *table.rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    for line in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join((f"{line[0]:<{widths[0]}}", *cells)))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows((header, *rows))


def write_bars(path: Path, title: str, measured: Sequence[Measured], unit: Unit) -> None:
    """Time and peak memory of every contender, ours in blue."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 0.42 * len(measured) + 1.3), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    names = [each.name for each in measured]
    colours = [OURS if name.startswith("ours") else THEIRS for name in names]
    columns = (
        (unit.label, unit.digits, [statistics.median(each.seconds) * unit.per_second for each in measured]),
        ("peak memory over the inputs, MiB", 0, [each.peak for each in measured]),
    )
    for axes, (label, digits, values) in zip(figure.subplots(1, 2, sharey=True), columns, strict=True):
        bars = axes.barh(names, values, color=colours, height=0.68)
        axes.bar_label(bars, [f"{value:,.{digits}f}" for value in values], padding=4, fontsize=9, color=INK)
        axes.set_title(label, loc="left", fontsize=10, color=INK)
        axes.set_xlim(0, 1.18 * max(values))
        axes.set_xticks([])
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def write_floors(path: Path, title: str, floors: Sequence[Floor]) -> None:
    """Peak over the tokens, beside what [T, V] and [T, H] in fp32 would take."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = [each.tokens for each in floors]
    lines = (
        ("one [T, V] in fp32", THEIRS, [each.logits for each in floors]),
        ("linear_divergence, recompute", OURS, [each.peak for each in floors]),
        ("one [T, H] in fp32", THEIRS, [each.states for each in floors]),
    )
    for name, colour, values in lines:
        axes.plot(tokens, values, color=colour, marker="o", markersize=4, linewidth=2)
        axes.annotate(f"{name}: {values[-1]:,.0f} MiB", (tokens[-1], values[-1]), (0, 7), fontsize=9, ha="right",
                      color=INK, textcoords="offset points")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens", xticks=tokens, xticklabels=[str(each) for each in tokens])
    axes.set_title("Peak memory over the inputs, MiB", loc="left", fontsize=10, color=INK)
    axes.minorticks_off()
    axes.grid(color=GRID)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=8, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)

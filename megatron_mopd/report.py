"""How much of its teachers a student has: the normalised score, the table, the plots, summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_mopd.metrics import Kind, read_records

Series = Sequence[tuple[int, float]]
"""(step, value) in order of steps."""

# Okabe and Ito's colours: told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def normalised(student: float, before: float, teacher: float) -> float:
    """Share of the teacher's lead that the student has: (s - s_sft) / (s_teacher - s_sft).

    0 is the model it started from, 1 its teacher, more is better than the teacher; nan where the two do not
    differ (|s_teacher - s_sft| < 1e-9).
    """
    lead = teacher - before
    return math.nan if abs(lead) < 1e-9 else (student - before) / lead


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Accuracies in [0, 1] of the models of one MOPD run: domain -> accuracy, the same domains for each."""

    before: Mapping[str, float]
    """The student's start, from which the teachers were trained."""
    teachers: Mapping[str, Mapping[str, float]]
    after: Mapping[str, float]
    routed: Mapping[str, str]
    """domain -> the teacher that the student learned it from; KeyError later if one is missing."""

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """model -> domain -> accuracy, the student's start first and its end last."""
        teachers = {f"teacher {name}": dict(row) for name, row in self.teachers.items()}
        return {"student before": dict(self.before)} | teachers | {"student after": dict(self.after)}

    @property
    def normalised(self) -> dict[str, float]:
        """domain -> normalised score."""
        return {
            domain: normalised(self.after[domain], self.before[domain], self.teachers[teacher][domain])
            for domain, teacher in self.routed.items()
        }

    @property
    def normalised_mean(self) -> float:
        """Mean over the domains that have a score; nan if none has."""
        return mean(self.normalised)


def mean(values: Mapping[str, float]) -> float:
    """Mean of the values that are not nan; nan if there is none."""
    finite = [value for value in values.values() if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def accuracy_table(comparison: Comparison) -> Table:
    """A row per model, a column per domain and their mean; the last row is the normalised score."""
    domains = list(comparison.routed)
    table = Table(title="Accuracy on held-out prompts", title_justify="left")
    table.add_column("")
    for name in (*domains, "mean"):
        table.add_column(name, justify="right")
    for model, row in comparison.accuracy.items():
        shown = {domain: row[domain] for domain in domains}
        cells = [
            f"[bold]{value:.3f}[/]" if model == f"teacher {comparison.routed[domain]}" else f"{value:.3f}"
            for domain, value in shown.items()
        ]
        table.add_row(model, *cells, f"{mean(shown):.3f}", end_section=model == "student after")
    scores = [f"{comparison.normalised[domain]:.2f}" for domain in domains]
    table.add_row("normalised score", *scores, f"{comparison.normalised_mean:.2f}", style="bold")
    table.caption = "normalised: 0 is the student before, 1 the domain's teacher (bold)"
    table.caption_justify = "left"
    return table


def write_summary(path: Path, comparison: Comparison, seconds: Mapping[str, float]) -> None:
    """Write summary.json: accuracy, normalised, normalised_mean, seconds of each stage. nan becomes null."""
    summary = {
        "accuracy": comparison.accuracy,
        "normalised": comparison.normalised,
        "normalised_mean": comparison.normalised_mean,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }
    path.write_text(json.dumps(_null_for_nan(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def read_series(run_dir: Path, metric: str, kind: Kind = "train") -> dict[str, list[tuple[int, float]]]:
    """domain -> (step, value) of '<metric>/<domain>' in a run's metrics.jsonl; 'accuracy' is kind 'eval'."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(run_dir / "metrics.jsonl", kind):
        for key, value in record.items():
            if key.startswith(f"{metric}/") and value is not None:
                series.setdefault(key.removeprefix(f"{metric}/"), []).append((record["step"], value))
    return series


def plot_demo(
    path: Path,
    kl_series: Mapping[str, Series],
    accuracy: Mapping[str, Series],
    teacher_lines: Mapping[str, float],
    base_lines: Mapping[str, float],
) -> None:
    """Write a PNG: per-token reverse KL and accuracy of each domain over the steps of the MOPD stage.

    Args:
        kl_series: domain -> reverse KL to its teacher, nats per token.
        accuracy: domain -> held-out accuracy of the student.
        teacher_lines: domain -> its teacher's accuracy, drawn dashed in the domain's colour.
        base_lines: domain -> accuracy of the student before, drawn dotted.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it looks for a display and keeps figures alive.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    domains = list(dict.fromkeys((*kl_series, *accuracy)))
    colours = {domain: COLOURS[index % len(COLOURS)] for index, domain in enumerate(domains)}
    for domain, points in kl_series.items():
        left.plot(*_columns(points), color=colours[domain], label=domain)
    if any(value > 0 for points in kl_series.values() for _, value in points):
        left.set_yscale("log")
    left.set(title="Distance to the teacher", xlabel="MOPD step", ylabel="reverse KL per token (nats)")
    for domain, points in accuracy.items():
        right.plot(*_columns(points), color=colours[domain], marker="o", markersize=4, label=domain)
    for lines, style in ((teacher_lines, "--"), (base_lines, ":")):
        for domain, value in lines.items():
            right.axhline(value, color=colours.get(domain, COLOURS[-1]), linestyle=style, linewidth=1)
    right.plot([], [], color="grey", linestyle="--", label="teacher")
    right.plot([], [], color="grey", linestyle=":", label="student before")
    right.set(title="Accuracy on held-out prompts", xlabel="MOPD step", ylabel="accuracy", ylim=(-0.02, 1.02))
    for axes, place in ((left, "upper right"), (right, "lower right")):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=9, loc=place)
    figure.savefig(path, dpi=130)


def _columns(points: Series) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]

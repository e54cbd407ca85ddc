"""The tables that `mopd reproduce` prints, from summary.json's tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

Figure = Mapping[str, Any]
"""{"mean", "interval", "per_seed"}."""


def shown(figure: Figure, digits: int = 3) -> str:
    """mean ± half the 95 % interval; the mean alone for one seed."""
    if figure["mean"] is None:
        return "-"
    if figure["interval"] is None:
        return f"{figure['mean']:.{digits}f}"
    low, high = figure["interval"]
    return f"{figure['mean']:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def score_table(summary: Mapping[str, Any]) -> Table:
    """A row per method in the file's order: normalised score and accuracy per domain, with intervals over seeds."""
    seeds = len(summary["seeds"])
    what = f"{seeds} seeds, mean ± 95 % interval (Student t)" if seeds > 1 else "one seed, so no intervals"
    table = Table(title=f"{summary['title']}: {what}", title_justify="left")
    table.add_column("")
    table.add_column("normalised score", justify="right")
    for domain in summary["domains"]:
        table.add_column(domain, justify="right")
    best = max(
        (method["score"]["mean"] for method in summary["methods"].values() if method["score"]["mean"] is not None),
        default=None,
    )
    table.add_row("base", "0", *_accuracies(summary["base"], summary))
    owners = _teacher_of_domain(summary)
    cells = [
        shown(owners[domain]["domains"][domain]["accuracy"]) if domain in owners else "-"
        for domain in summary["domains"]
    ]
    table.add_row("teacher of the domain", "1", *cells, end_section=True)
    for method in summary["methods"].values():
        score = shown(method["score"])
        if best is not None and method["score"]["mean"] == best:
            score = f"[bold]{score}[/]"
        table.add_row(method["label"], score, *_accuracies(method, summary))
    table.caption = "right: accuracy on held-out prompts"
    table.caption_justify = "left"
    return table


def _teacher_of_domain(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    owners: dict[str, Mapping[str, Any]] = {}
    for teacher in summary["teachers"].values():
        taught = teacher["domain"] or []
        owners |= dict.fromkeys([taught] if isinstance(taught, str) else taught, teacher)
    return owners


def _accuracies(entry: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    return [shown(entry["domains"][domain]["accuracy"]) for domain in summary["domains"]]


def compute_table(summary: Mapping[str, Any]) -> Table:
    """What each method has used, mean over seeds; the training of base and teachers is in no row."""
    table = Table(title="Used by each method, mean over seeds", title_justify="left")
    table.add_column("")
    for name in ("rollouts", "generated tokens", "trained tokens", "teacher tokens", "seconds"):
        table.add_column(name, justify="right")
    for method in summary["methods"].values():
        compute = method["compute"]
        tokens = [f"{compute[key]:,.0f}" for key in ("generated_tokens", "trained_tokens", "teacher_tokens")]
        table.add_row(method["label"], f"{method['rollouts']:,}", *tokens, f"{compute['seconds']:.0f}")
    return table


def scaling_table(summary: Mapping[str, Any]) -> Table:
    """Headroom recovered, a row per method, a column per number of teachers."""
    points = {(point["label"], point["teachers"]): point["score"] for point in summary["scaling"]}
    counts = sorted({count for _, count in points})
    table = Table(title="Headroom recovered, by number of teachers", title_justify="left")
    table.add_column("")
    for count in counts:
        table.add_column(str(count), justify="right")
    for label in dict.fromkeys(label for label, _ in points):
        table.add_row(label, *(shown(points[label, count]) if (label, count) in points else "-" for count in counts))
    return table

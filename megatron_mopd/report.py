"""How much of its teachers a student has: the normalised score, its table, and the demo's summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megatron_mopd.reproduce.statistics import Estimate

if TYPE_CHECKING:  # it imports torch, which a report does not need
    from megatron_mopd.compute import Compute


def normalised(student: float, before: float, teacher: float) -> float:
    """Share of the teacher's lead that the student has: (s - s_sft) / (s_teacher - s_sft).

    0 is the model it started from, 1 its teacher, more is better than the teacher; nan where the teacher has no lead:
    the share of a loss says nothing, and that of next to nothing can be any number.
    """
    lead = teacher - before
    return math.nan if lead < 1e-9 else (student - before) / lead


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


def write_summary(
    path: Path,
    comparison: Comparison,
    *,
    seed: int,
    compute: Mapping[str, Compute],
    runs: Mapping[str, str],
    seconds: Mapping[str, float],
) -> None:
    """Write summary.json: a study, as `mopd reproduce` writes it, of one method with one seed. nan becomes null.

    Args:
        compute: "base", "mopd" and every teacher's name -> what its training cost.
        runs: "mopd" -> folder of its run, relative to the summary.
        seconds: stage -> seconds that it took, with starting and saving.
    """

    def one(value: float) -> dict[str, Any]:
        return Estimate.of({seed: value}).as_json()

    def domains(row: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        return {domain: {"accuracy": one(row[domain])} for domain in comparison.routed}

    own = domains(comparison.after)
    summary = {
        "version": 1,
        "title": "MOPD demo",
        "domains": list(comparison.routed),
        "seeds": [seed],
        "base": {"domains": domains(comparison.before), "compute": compute["base"].as_json()},
        "teachers": {
            name: {
                "domain": [domain for domain, teacher in comparison.routed.items() if teacher == name],
                "domains": domains(row),
                "compute": compute[name].as_json(),
            }
            for name, row in comparison.teachers.items()
        },
        "methods": {
            "mopd": {
                "label": "MOPD",
                "family": "mopd",
                "score": one(comparison.normalised_mean),
                "domains": {name: entry | {"score": one(comparison.normalised[name])} for name, entry in own.items()},
                "perplexity": None,
                "out_of_domain": None,
                "compute": compute["mopd"].as_json(),
                "runs": {str(seed): runs["mopd"]},
            }
        },
        "scaling": None,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }
    path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")

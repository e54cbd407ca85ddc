"""`--tune`: what each trial scored on the validation split, and which one each method would take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megatron_mopd.reproduce.config import ReproduceConfig
from megatron_mopd.reproduce.plan import trial_name
from megatron_mopd.reproduce.summary import Figures


def trial_scores(config: ReproduceConfig, figures: Figures) -> dict[str, Any]:
    """The tree of tuning.json: method -> its trials with score (normalised, mean over domains) and which is best.

    A score is null where no teacher leads the base; best is null where no trial has a score.
    """
    assert config.tune is not None
    seed, methods = config.tune.seed, {}
    for method, trials in config.tune.trials.items():
        scores = [
            figures.mean_score(seed, trial_name(method, index), figures.domains) for index in range(1, len(trials) + 1)
        ]
        listed = [
            {"overrides": list(trial), "score": None if math.isnan(score) else score}
            for trial, score in zip(trials, scores, strict=True)
        ]
        known = [index for index, score in enumerate(scores) if not math.isnan(score)]
        methods[method] = {"trials": listed, "best": max(known, key=lambda index: scores[index], default=None)}
    return {"seed": seed, "split": "validation", "methods": methods}


def tuning_table(config: ReproduceConfig, tuning: Mapping[str, Any]) -> Table:
    table = Table(title=f"Validation split, seed {tuning['seed']}: normalised score", title_justify="left")
    for column in ("method", "trial"):
        table.add_column(column)
    table.add_column("score", justify="right")
    for method, entry in tuning["methods"].items():
        for index, trial in enumerate(entry["trials"]):
            style = "bold" if index == entry["best"] else None
            last = index == len(entry["trials"]) - 1
            table.add_row(
                config.label(method) if index == 0 else "",
                " ".join(trial["overrides"]) or "as it is",
                "-" if trial["score"] is None else f"{trial['score']:.3f}",
                style=style,
                end_section=last,
            )
    return table

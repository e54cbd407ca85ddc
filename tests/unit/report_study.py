"""A small made-up study: two domains, three methods, two seeds; every number is chosen, none follows from another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEEDS = (0, 1)
TOKENS = (100, 140, 160)
"""Generated in each step of a run of seed 0; seed 1 generates 20 more in each."""


def estimate(low: float, mean: float, high: float) -> dict[str, Any]:
    return {"mean": mean, "interval": [low, high], "per_seed": {"0": low, "1": high}}


def accuracies(add: float, sort: float) -> dict[str, Any]:
    return {
        "add": {"accuracy": estimate(add - 0.01, add, add + 0.01)},
        "sort": {"accuracy": estimate(sort - 0.02, sort, sort + 0.02)},
    }


def compute(generated: float, trained: float, teacher: float, seconds: float) -> dict[str, float]:
    return {
        "generated_tokens": generated,
        "trained_tokens": trained,
        "teacher_tokens": teacher,
        "seconds": seconds,
    }


def method(label: str, family: str, score: float, cost: Mapping[str, float], runs: Mapping[str, str]) -> dict[str, Any]:
    domains = accuracies(0.5 + 0.4 * score, 0.3 + 0.5 * score)
    domains["add"]["score"] = estimate(score - 0.031, score + 0.003, score + 0.037)
    domains["sort"]["score"] = estimate(score - 0.041, score - 0.003, score + 0.035)
    return {
        "label": label,
        "family": family,
        "score": estimate(score - 0.022, score, score + 0.022),
        "domains": domains,
        "perplexity": estimate(20 + score, 20.5 + score, 21 + score),
        "out_of_domain": {"jumble": estimate(0.1, 0.1 + score / 100, 0.12)},
        "benchmarks": {"aime25": estimate(score / 2 - 0.05, score / 2, score / 2 + 0.05)},
        "compute": dict(cost),
        "runs": dict(runs),
    }


def summary(title: str = "Made up") -> dict[str, Any]:
    own_runs = {name: {str(seed): f"runs/{name}{seed}" for seed in SEEDS} for name in ("mopd", "mix_rl")}
    return {
        "version": 1,
        "title": title,
        "domains": ["add", "sort"],
        "seeds": list(SEEDS),
        "base": {
            "domains": accuracies(0.5, 0.3),
            "perplexity": estimate(20.1, 20.2, 20.3),
            "out_of_domain": {"jumble": estimate(0.11, 0.12, 0.13)},
            "benchmarks": {"aime25": estimate(0.2, 0.21, 0.22)},
        },
        "teachers": {
            "adder": {"domain": "add", "domains": accuracies(0.9, 0.31), "compute": compute(5000, 5100, 0, 33)},
            "sorter": {"domain": "sort", "domains": accuracies(0.51, 0.8), "compute": compute(6000, 6100, 0, 44)},
        },
        "methods": {
            "ties": method("TIES", "merge", 0.612, compute(0, 0, 0, 1.25), {"0": "runs/ties0"}),
            "mix_rl": method("Mix-RL", "rl", 0.734, compute(7100, 7200, 0, 55), own_runs["mix_rl"]),
            "mopd": method("MOPD full", "mopd", 0.956, compute(7300, 7400, 7500, 66), own_runs["mopd"]),
        },
        "scaling": [
            {"method": "mopd", "label": "MOPD full", "teachers": 1, "score": estimate(0.96, 0.981, 1.0)},
            {"method": "mopd", "label": "MOPD full", "teachers": 8, "score": estimate(0.84, 0.872, 0.9)},
            {"method": "mopd_sampled", "label": "MOPD sampled", "teachers": 8, "score": estimate(0.7, 0.743, 0.78)},
        ],
    }


def write_metrics(folder: Path, seed: int = 0, *, kl: bool = True, tokens: Sequence[float] | None = TOKENS) -> None:
    """Three steps, and evaluations before the first and after the last."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for step in range(3):
        if step == 0:
            lines.append({"step": 0, "kind": "eval", "accuracy/add": 0.5 + 0.1 * seed, "accuracy/sort": 0.3})
        line: dict[str, Any] = {"step": step, "kind": "train", "loss": 1.0}
        line |= {"token_share/add": 0.25, "token_share/sort": 0.75}
        if tokens is not None:
            line |= {"tokens/generated": tokens[step] + 20 * seed, "tokens/trained": 200}
        if kl:
            line |= {"reverse_kl": 9, "reverse_kl/add": 0.4 / (step + 1), "reverse_kl/sort": 0.2 / (step + 1)}
        lines.append(line)
    lines.append({"step": 3, "kind": "eval", "accuracy/add": 0.8 + 0.1 * seed, "accuracy/sort": 0.6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"time": 0}) + "\n" for line in lines))


def write_study(folder: Path, content: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(content or summary()))
    for seed in SEEDS:
        write_metrics(folder / f"runs/mopd{seed}", seed)
        write_metrics(folder / f"runs/mix_rl{seed}", seed, kl=False)
    (folder / "runs/ties0").mkdir()
    return folder

"""`metrics.jsonl` of runs -> curves over tokens, one run per seed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.metrics import Kind, read_records
from megatron_mopd.reproduce.statistics import Estimate
from megatron_mopd.yaml_config import ConfigError

METRICS: dict[str, Kind] = {"accuracy": "eval", "reverse_kl": "train", "token_share": "train"}
"""Metric that is drawn per domain -> the kind of line that has it."""


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    """Tokens or steps done, mean over seeds."""
    value: Estimate


@dataclass(frozen=True, slots=True)
class RunLog:
    """One run's metrics."""

    tokens: Mapping[int, float] | None
    """Steps done -> tokens so far; None where the run did not count them."""
    trained: bool
    """Whether `tokens` are those trained on: of a run that generates nothing and learns from a dataset."""
    series: Mapping[str, Mapping[str, Mapping[int, float]]]
    """Metric -> domain -> steps done -> value. A train line's value is that of the step's start."""

    def domains(self, metric: str) -> list[str]:
        return list(self.series[metric])


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One method's, or one run's: the same thing once per seed."""

    name: str
    label: str
    family: str
    logs: tuple[RunLog, ...]

    def domains(self, metric: str) -> list[str]:
        return list(dict.fromkeys(domain for log in self.logs for domain in log.domains(metric)))

    def points(self, metric: str, domain: str, *, over_tokens: bool) -> list[Point]:
        """At every step that all seeds have."""
        return _points([(log, log.series[metric].get(domain, {})) for log in self.logs], over_tokens)

    def mean_points(self, metric: str, *, over_tokens: bool) -> list[Point]:
        """Of the unweighted mean over the domains, where all have a value."""
        pairs = []
        for log in self.logs:
            columns = list(log.series[metric].values())
            steps = set.intersection(*(set(column) for column in columns)) if columns else set()
            pairs.append((log, {step: sum(column[step] for column in columns) / len(columns) for step in steps}))
        return _points(pairs, over_tokens)

    @property
    def counts_tokens(self) -> bool:
        return all(log.tokens is not None for log in self.logs)

    @property
    def is_trained_only(self) -> bool:
        return any(log.trained for log in self.logs)


def _points(pairs: Sequence[tuple[RunLog, Mapping[int, float]]], over_tokens: bool) -> list[Point]:
    steps = set.intersection(*(set(series) for _, series in pairs)) if pairs else set()
    points = []
    for step in sorted(steps):
        value = Estimate.of({index: series[step] for index, (_, series) in enumerate(pairs)})
        done = [float((log.tokens or {}).get(step, step)) if over_tokens else float(step) for log, _ in pairs]
        points.append(Point(sum(done) / len(done), value))
    return points


def read_log(folder: Path) -> RunLog:
    """The run in `folder`; a metric that it does not have is an empty series. Raises ConfigError: not our lines."""
    path = folder / "metrics.jsonl"
    try:
        lines = {kind: read_records(path, kind) for kind in dict.fromkeys(METRICS.values())}
        tokens, trained = _tokens_done(lines["train"])
        series = {metric: _per_domain(lines[kind], metric) for metric, kind in METRICS.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not the metrics of a run ({error}); name the folder of one") from None
    return RunLog(tokens, trained, series)


def _tokens_done(lines: Sequence[Mapping[str, Any]]) -> tuple[dict[int, float] | None, bool]:
    for key, trained in (("tokens/generated", False), ("tokens/trained", True)):
        counts = [line.get(key) for line in lines]
        if all(count is not None for count in counts) and sum(counts) > 0:  # type: ignore[arg-type]
            total = itertools.accumulate((float(count) for count in counts if count is not None), initial=0.0)
            first = int(lines[0]["step"])
            return dict(enumerate(total, start=first)), trained
    return None, False


def _per_domain(lines: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[int, float]]:
    series: dict[str, dict[int, float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith(f"{metric}/") and value is not None:
                series.setdefault(key.removeprefix(f"{metric}/"), {})[int(line["step"])] = float(value)
    return series

"""What an evaluation found, and its JSON. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_mopd.config import Split
from megatron_mopd.evaluation.statistics import BoolArray, mean_accuracy, pass_at, standard_error
from megatron_mopd.yaml_config import build, to_tree

_DERIVED = ("mean", "mean_standard_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One domain or benchmark. Accuracies, errors and rates are shares in [0, 1]."""

    accuracy: float
    """avg@samples."""
    standard_error: float | None
    """Of the accuracy, clustered by prompt; None for a single prompt."""
    prompts: int
    samples: int
    """Answers per prompt."""
    pass_at: dict[str, float] = field(default_factory=dict)
    """'k' -> chance that at least one of k answers is right."""
    truncation_rate: float = 0.0
    """Answers that reached `max_response_tokens`; they were graded as they are."""
    too_long: int = 0
    """Prompts beyond `max_prompt_tokens`, left out."""

    @classmethod
    def of(cls, right: BoolArray, *, ks: Sequence[int], truncation_rate: float, too_long: int) -> Score:
        """From the graded answers `right` [prompts, samples]; of `ks` those that `samples` allows."""
        prompts, samples = right.shape
        return cls(
            accuracy=mean_accuracy(right),
            standard_error=standard_error(right),
            prompts=prompts,
            samples=samples,
            pass_at={str(k): pass_at(right, k) for k in ks if k <= samples},
            truncation_rate=truncation_rate,
            too_long=too_long,
        )


def score_metrics(scores: Mapping[str, Score]) -> dict[str, float]:
    """'<metric>/<domain>' -> value, for a run's log: accuracy, its standard error, and pass@k."""
    metrics = {}
    for name, score in scores.items():
        metrics[f"accuracy/{name}"] = score.accuracy
        if score.standard_error is not None:
            metrics[f"standard_error/{name}"] = score.standard_error
        metrics |= {f"pass_at_{k}/{name}": value for k, value in score.pass_at.items()}
    return metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One checkpoint, on everything that a configuration evaluates."""

    split: Split
    domains: dict[str, Score]
    perplexity: float | None = None
    """exp of the mean negative log-likelihood per token; None when no file was named."""
    perplexity_tokens: int = 0
    """Tokens that it is the mean of."""
    out_of_domain: dict[str, Score] = field(default_factory=dict)
    benchmarks: dict[str, Score] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, float]:
        """domain -> share of right answers."""
        return {name: score.accuracy for name, score in self.domains.items()}

    @property
    def mean(self) -> float:
        """Of the domains' accuracies, each of the same weight."""
        return float(np.mean(list(self.accuracy.values())))

    @property
    def mean_standard_error(self) -> float | None:
        """Of `mean`: the domains' prompts are drawn independently. None where a domain has none."""
        errors = [score.standard_error for score in self.domains.values()]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(errors) if len(known) == len(errors) else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, the two derived ones among them; `from_json` reads them back."""
        return {**to_tree(self), **{name: getattr(self, name) for name in _DERIVED}}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> EvalResult:
        """Raises ConfigError, naming the key, for a tree that `as_json` did not make."""
        return build(cls, {key: value for key, value in tree.items() if key not in _DERIVED})

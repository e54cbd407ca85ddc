"""How good a model is: accuracy per domain and benchmark with standard errors, pass@k, perplexity.

Importing this loads neither torch nor Megatron, so that a report can read results.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_mopd.config import RunConfig, Split
from megatron_mopd.evaluation.results import EvalResult, Score

__all__ = ["EvalResult", "Score", "evaluate_checkpoints"]


def evaluate_checkpoints(
    config: RunConfig, checkpoints: Mapping[str, str], split: Split = "held_out", seed: int | None = None
) -> dict[str, EvalResult]:
    """name -> everything that `config.evaluation` asks for, of checkpoints or Hugging Face folders. On every rank.

    `seed` is of the answers, by default `evaluation.seed`. The prompts depend on the latter only: training has been
    kept away from these and no others.
    """
    from megatron_mopd.evaluation import evaluate

    return evaluate.evaluate_checkpoints(config, checkpoints, split, seed)

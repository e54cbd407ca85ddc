"""How a step's episodes went, as figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mopd.types import Rollout


def episode_means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the episodes of several turns among `rollouts`; {} where there are none."""
    episodes = [rollout.episode for rollout in rollouts if rollout.episode is not None]
    if not episodes:
        return {}
    return {
        "turns": float(np.mean([episode.turns for episode in episodes])),
        "tool_calls": float(np.mean([episode.calls for episode in episodes])),
        "tool_calls_failed": float(np.mean([episode.calls_failed for episode in episodes])),
        "environment_failures": float(np.mean([episode.failed for episode in episodes])),
        "environment_limit_rate": float(np.mean([episode.ended in ("turns", "time", "room") for episode in episodes])),
        "environment_seconds": float(np.mean([episode.seconds for episode in episodes])),
        "environment_tokens": float(np.mean([_between(r) for r in rollouts if r.episode is not None])),
    }


def _between(rollout: Rollout) -> int:
    """Tokens after the prompt that are not the student's."""
    return len(rollout.token_ids) - len(rollout.prompt.token_ids) - int(rollout.loss_mask.sum())

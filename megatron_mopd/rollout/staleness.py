"""How old the weights are that a rollout's tokens were sampled with: in optimizer updates, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_mopd.types import IntArray, Rollout


def token_versions(rollout: Rollout) -> IntArray:
    """[R] the `policy_version` of each token that is trained on."""
    versions = np.full(len(rollout.token_ids), rollout.policy_version, dtype=np.int64)
    for span in rollout.weight_versions:
        versions[span.start : span.end] = span.version
    return versions[rollout.loss_mask]


def check_staleness(rollouts: Sequence[Rollout], *, oldest: int, newest: int) -> None:
    """Raise ValueError for a token of weights other than those of versions `oldest`..`newest`."""
    for rollout in rollouts:
        versions = token_versions(rollout)
        if versions.min() < oldest or versions.max() > newest:
            raise ValueError(
                f"rollout of {rollout.prompt.id}: has tokens of weights {versions.min()}..{versions.max()}; this step "
                f"may train on {oldest}..{newest} (rollout.lag)"
            )


def staleness_metrics(rollouts: Sequence[Rollout], version: int, domain_names: Sequence[str]) -> Mapping[str, float]:
    """Of a step that begins with the weights of `version`: 'staleness[/<domain>]', updates since a token was sampled,
    its mean over tokens, and 'staleness_max'."""
    ages: dict[str, list[IntArray]] = {name: [] for name in domain_names}
    for rollout in rollouts:
        ages[rollout.domain].append(version - token_versions(rollout))
    report = {f"staleness/{name}": float(np.concatenate(own).mean()) for name, own in ages.items() if own}
    together = np.concatenate([age for own in ages.values() for age in own])
    return report | {"staleness": float(together.mean()), "staleness_max": float(together.max())}

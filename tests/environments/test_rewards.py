"""Who judges an episode, and that a failure of the environment is held against nobody."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_mopd.domains.verifiers import group_advantages, verify
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.environments.protocol import Observation
from megatron_mopd.types import Rollout
from tests.environments.games import (
    TOKENIZER,
    Recorder,
    Scripted,
    domain,
    failing,
    play_alone,
    prompt,
    python_spec,
    said,
)


def episodes() -> list[Rollout]:
    """Four samples of one prompt: two turns each, the last of which says its number; the third one is broken off."""

    def step(turn: object) -> Observation:
        text = TOKENIZER.decode(turn.token_ids)  # type: ignore[attr-defined]
        if text == "ask 2":
            return failing("timeout")
        return said("x", reward=0.5) if text.startswith("ask") else Observation(done=True, reward=float(text) / 10)

    engine = Recorder(
        lambda asked, sample: f"ask {sample}" if "@" not in asked.id else asked.id.partition("#")[2].partition("@")[0]
    )
    asked = replace(prompt(0), answer="3")
    return play_alone(engine, [asked], Scripted(step), python_spec(), samples=4)


def test_the_environment_or_the_verifier_judges() -> None:
    http = EnvironmentSpec(kind="http", url="http://localhost")
    given = episodes()
    assert [r.reward for r in verify(given, {"tool": domain(http, verifier="environment")}, TOKENIZER)] == [
        0.0,
        0.1,
        0.0,
        0.3,
    ]
    # The last turn alone: "3", not "ask 33".
    assert [r.reward for r in verify(given, {"tool": domain(http, verifier="exact")}, TOKENIZER)] == [0, 0, 0, 1]
    assert [r.reward for r in verify(given, {"tool": domain(http, verifier="none")}, TOKENIZER)] == [0] * 4


def test_a_failed_episode_is_in_no_groups_mean() -> None:
    judged = [replace(r, reward=reward) for r, reward in zip(episodes(), (1.0, 0.0, 0.0, 0.5), strict=True)]
    assert [r.episode.failed for r in judged if r.episode] == [False, False, True, False]
    advantages = [r.outcome_advantage for r in group_advantages(judged, normalise_by_std=True)]
    std = float(np.std([1.0, 0.0, 0.5]))
    assert advantages == pytest.approx([0.5 / std, -0.5 / std, 0.0, 0.0], abs=1e-5)
    centred = [r.outcome_advantage for r in group_advantages(judged, normalise_by_std=False)]
    assert centred == [0.5, -0.5, 0.0, 0.0]
    all_right = [replace(r, reward=float(r.sample != 2)) for r in judged]
    assert [r.outcome_advantage for r in group_advantages(all_right, normalise_by_std=True)] == [0.0] * 4

"""The sft stage's engine: reference answers as rollouts."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mopd.rollout.answers import ReferenceAnswers
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.types import IntArray, Prompt, Rollout


class DigitTokenizer:
    stop_ids = (11, 12)

    def encode(self, text: str) -> IntArray:
        return np.array([int(character) for character in text], dtype=np.int64)


def answers(*prompts: Prompt, samples: int = 1) -> list[Rollout]:
    engine = ReferenceAnswers(DigitTokenizer())
    engine.load_weights(iter([]), version=3)
    return engine.generate(prompts, samples=samples, sampling=Sampling(temperature=1.0), seed=0)


def prompt(answer: str, limit: int) -> Prompt:
    ids = np.array([7, 8], dtype=np.int64)
    return Prompt(id="d/0", domain="d", token_ids=ids, answer=answer, max_response_tokens=limit)


def test_the_answer_and_the_end_token_are_the_response() -> None:
    (rollout,) = answers(prompt("123", limit=4))
    assert rollout.token_ids.tolist() == [7, 8, 1, 2, 3, 11]
    assert rollout.loss_mask.tolist() == [False, False, True, True, True, True]
    assert rollout.rollout_logprobs.tolist() == [0.0] * 6 and rollout.rollout_logprobs.dtype == np.float32
    assert (rollout.finish_reason, rollout.sample, rollout.policy_version) == ("stop", 0, 0)


def test_an_answer_that_does_not_fit_is_cut() -> None:
    (no_end, shorter) = answers(prompt("123", limit=3), prompt("123", limit=2))
    assert no_end.response_ids.tolist() == [1, 2, 3] and no_end.finish_reason == "length"
    assert shorter.response_ids.tolist() == [1, 2] and shorter.finish_reason == "length"


def test_several_samples_are_refused() -> None:
    assert answers() == []
    with pytest.raises(ValueError, match="samples"):
        answers(prompt("1", limit=3), samples=2)

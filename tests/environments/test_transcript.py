"""What an engine may not do to a transcript, and how turns with several weights and missing rows are joined."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_mopd.environments.transcript import Transcript, join_experts, join_versions
from megatron_mopd.types import Episode, ExpertArray, Rollout, WeightSpan
from tests.environments.games import PLAIN, Recorder, prompt, tokens

START = Transcript.begin(prompt(0), 0)


def answered(transcript: Transcript) -> Rollout:
    return Recorder(lambda asked, sample: "four").generate(
        [transcript.question("q")], samples=1, sampling=PLAIN, seed=0
    )[0]


def test_an_engine_that_saw_other_tokens_is_found_out() -> None:
    answer = answered(START)
    ids = answer.token_ids.copy()
    ids[2] += 1
    with pytest.raises(ValueError, match="tool/0: the rollout engine was not at the tokens that it was given"):
        START.with_turn(replace(answer, token_ids=ids))
    longer = START.with_observation(tokens("more"))
    with pytest.raises(ValueError, match="not at the tokens"):
        longer.with_turn(answer)


@pytest.mark.parametrize("shift", [-1, 1, 99])
def test_an_engine_that_calls_other_tokens_its_own_is_found_out(shift: int) -> None:
    answer = answered(START)
    mask = np.arange(len(answer.token_ids)) >= len(START.token_ids) + shift
    with pytest.raises(ValueError, match="mask is not that of its own tokens"):
        START.with_turn(replace(answer, loss_mask=mask))


def test_what_came_after_the_last_turn_is_dropped() -> None:
    whole = START.with_turn(answered(START))
    first = whole.finish(Episode(turns=1), "stop", 0.5)
    again = whole.with_observation(tokens("unanswered")).finish(Episode(turns=1), "stop", 0.5)
    np.testing.assert_array_equal(first.token_ids, again.token_ids)
    assert len(again.rollout_logprobs) == len(again.loss_mask) == len(first.token_ids)


def turn(
    before: int, length: int, version: int, *spans: tuple[int, int, int], rows: ExpertArray | None = None
) -> Rollout:
    return Rollout(
        prompt=prompt(0),
        sample=0,
        token_ids=np.zeros(length, np.int64),
        loss_mask=np.arange(length) >= before,
        rollout_logprobs=np.zeros(length, np.float32),
        policy_version=version,
        finish_reason="stop",
        weight_versions=tuple(WeightSpan(version=v, start=a, end=b) for v, a, b in spans),
        routed_experts=rows,
    )


def test_versions_within_and_between_turns() -> None:
    turns = [turn(10, 20, 3, (3, 10, 14), (4, 14, 20)), turn(25, 30, 4), turn(30, 33, 4, (4, 30, 31), (5, 31, 33))]
    assert [(s.version, s.start, s.end) for s in join_versions(turns)] == [
        (3, 10, 14),
        (4, 14, 20),
        (4, 25, 30),
        (4, 30, 31),
        (5, 31, 33),
    ]
    assert join_versions([turn(10, 20, 3), turn(25, 30, 3)]) == ()


def test_rows_that_one_turn_lacks_come_from_the_next() -> None:
    def rows(length: int, value: int, *missing: int) -> ExpertArray:
        experts = np.full((length, 2, 3), value, np.int16)
        experts[list(missing)] = -1
        return experts

    turns = [turn(2, 4, 0, rows=rows(4, 7, 3)), turn(6, 8, 0), turn(9, 10, 0, rows=rows(10, 8, 5, 9))]
    joined = join_experts(turns, 10)
    assert joined is not None
    assert joined[:, 1, 2].tolist() == [7, 7, 7, 8, 8, -1, 8, 8, 8, -1]
    assert join_experts([turn(2, 4, 0)], 4) is None
    other = turn(6, 8, 0, rows=np.zeros((8, 2, 4), np.int16))
    with pytest.raises(ValueError, match="have shapes"):
        join_experts([turns[0], other], 8)

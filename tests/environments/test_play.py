"""Episodes: exactly the tokens that the engine saw and sampled, within turns, tokens and time, whatever fails."""

from __future__ import annotations

import threading
import time
from typing import get_args

import numpy as np
import pytest

from megatron_mopd.environments.metrics import episode_means
from megatron_mopd.environments.protocol import Failure, Observation, Turn
from megatron_mopd.types import Prompt, Rollout, WeightSpan
from tests.environments.games import (
    EXPERTS,
    STOP,
    TOKENIZER,
    Recorder,
    Scripted,
    failing,
    play_alone,
    prompt,
    python_spec,
    said,
    tokens,
    waiting,
)

SPEC = python_spec()
MORE, DONE = said("<|user|>result<|assistant|>"), Observation(done=True)


def turns_of(asked: Prompt) -> int:
    """Which turn of its episode a question is for."""
    return int(asked.id.rpartition("@")[2]) if "@" in asked.id else 0


def ends_after(count: int) -> Scripted:
    return Scripted(lambda turn: DONE if turn.number == count - 1 else MORE)


def one(rollouts: list[Rollout]) -> Rollout:
    (rollout,) = rollouts
    return rollout


def test_a_transcript_is_what_the_engine_saw_and_said() -> None:
    engine = Recorder(lambda asked, sample: f"turn {turns_of(asked)}", experts=True)
    asked = prompt(3)
    rollout = one(play_alone(engine, [asked], ends_after(3), SPEC))

    answers = [np.append(tokens(f"turn {turn}"), STOP) for turn in range(3)]
    between = tokens("<|user|>result<|assistant|>")
    parts = [asked.token_ids, answers[0], between, answers[1], between, answers[2]]
    np.testing.assert_array_equal(rollout.token_ids, np.concatenate(parts))
    own = np.concatenate([np.full(len(part), place % 2 == 1) for place, part in enumerate(parts)])
    assert rollout.loss_mask.tolist() == own.tolist()
    # Every question is the beginning of the rollout, and what came back its continuation.
    assert len(engine.asked) == 3
    for seen in engine.asked:
        before, after = len(seen.prompt.token_ids), len(seen.rollout.token_ids)
        np.testing.assert_array_equal(seen.prompt.token_ids, rollout.token_ids[:before])
        np.testing.assert_array_equal(seen.rollout.token_ids, rollout.token_ids[:after])
        np.testing.assert_array_equal(rollout.rollout_logprobs[before:after], seen.rollout.rollout_logprobs[before:])
        assert rollout.loss_mask[before:after].all()
    assert (rollout.rollout_logprobs[~rollout.loss_mask] == 0).all()
    assert (rollout.rollout_logprobs[rollout.loss_mask] < 0).all()
    assert engine.identities == ["tool/3", "tool/3#0@1", "tool/3#0@2"]
    assert {seen.seed for seen in engine.asked} == {5}
    assert rollout.prompt is asked
    assert (rollout.episode.turns, rollout.episode.ended, rollout.finish_reason) == (3, "answered", "stop")  # type: ignore[union-attr]


def test_experts_and_versions_are_those_of_the_turn_that_sampled() -> None:
    engine = Recorder(lambda asked, sample: f"turn {turns_of(asked)}", experts=True)
    rollout = one(play_alone(engine, [prompt(0)], ends_after(3), SPEC))
    starts = [len(seen.prompt.token_ids) for seen in engine.asked]
    ends = [len(seen.rollout.token_ids) for seen in engine.asked]
    # The engine's versions are its calls, 0, 1, 2.
    assert rollout.policy_version == 0
    assert rollout.weight_versions == tuple(
        WeightSpan(version=turn, start=start, end=end)
        for turn, (start, end) in enumerate(zip(starts, ends, strict=True))
    )
    experts = rollout.routed_experts
    assert experts is not None and experts.shape == (len(rollout.token_ids), *EXPERTS)
    # Row t says 100 * call + t: of a turn's last token and the observation, that of the next turn, which read them.
    bounds = [0, ends[0] - 1, ends[1] - 1, ends[2] - 1]
    for call in range(3):
        rows = np.arange(bounds[call], bounds[call + 1])
        np.testing.assert_array_equal(experts[rows, 0, 0], 100 * call + rows)
    assert (experts[-1] == -1).all()
    assert (experts[:-1] >= 0).all()


def test_prompts_with_and_without_an_environment_share_a_batch() -> None:
    engine = Recorder(lambda asked, sample: f"{asked.id}#{sample}")
    asked = [prompt(0, name="plain"), prompt(1), prompt(2, name="plain"), prompt(3)]
    rollouts = play_alone(engine, asked, ends_after(2), SPEC, samples=2)
    assert [(r.prompt.id, r.sample) for r in rollouts] == [(p.id, s) for p in asked for s in range(2)]
    assert [r.episode.turns if r.episode else None for r in rollouts] == [None, None, 2, 2] * 2
    assert [seen.call for seen in engine.asked] == [0] * 8 + [1] * 4
    for rollout in rollouts:
        text = f"{rollout.prompt.id}#{rollout.sample}"
        again = f"{text}@1#0" if rollout.episode else text
        assert TOKENIZER.decode(rollout.response_ids[: len(text)]) == text
        assert TOKENIZER.decode(rollout.response_ids).endswith(again)


def test_what_an_environment_says_first_stands_before_the_first_turn() -> None:
    def first(asked: Prompt, sample: int) -> Observation:
        return said(f"seen by {sample}. ") if asked.id == "tool/1" else Observation()

    engine = Recorder(lambda asked, sample: "ok")
    environment = Scripted(lambda turn: DONE, first)
    rollouts = play_alone(engine, [prompt(0), prompt(1)], environment, SPEC, samples=2)
    assert [(seen.call, seen.prompt.id) for seen in engine.asked] == [
        (0, "tool/0"),
        (0, "tool/0"),
        (1, "tool/1#0@0"),
        (1, "tool/1#1@0"),
    ]
    for rollout in rollouts[2:]:
        shown = tokens(f"seen by {rollout.sample}. ")
        before = len(rollout.prompt.token_ids)
        np.testing.assert_array_equal(rollout.token_ids[before : before + len(shown)], shown)
        assert rollout.loss_mask.tolist() == [False] * (before + len(shown)) + [True] * 3
    assert [len(r.token_ids) - len(r.prompt.token_ids) for r in rollouts[:2]] == [3, 3]


def test_the_last_turn_is_shown_and_its_answer_dropped_at_max_turns() -> None:
    engine, environment = Recorder(lambda asked, sample: "go on"), Scripted(lambda turn: MORE)
    spec = python_spec(max_turns=3)
    rollout = one(play_alone(engine, [prompt(0, room=500)], environment, spec))
    assert rollout.episode is not None
    assert (rollout.episode.turns, rollout.episode.ended, rollout.episode.failed) == (3, "turns", False)
    assert [number for _, number in environment.stepped] == [0, 1, 2]
    assert environment.closed == environment.begun
    assert rollout.token_ids[-1] == STOP and rollout.loss_mask[-1]
    assert rollout.finish_reason == "stop"


@pytest.mark.parametrize("room", range(1, 40))
def test_an_episode_stays_within_its_tokens(room: int) -> None:
    engine, environment = Recorder(lambda asked, sample: "abcde"), Scripted(lambda turn: said("12345678"))
    rollout = one(play_alone(engine, [prompt(0, room=room)], environment, SPEC))
    before = len(rollout.prompt.token_ids)
    # 6 tokens of the student, then 8 that it is told: a turn needs one token at least.
    turns = 1 + (room - 1) // 14
    length = min(room, 14 * (turns - 1) + 6)
    assert len(rollout.token_ids) - before == length
    assert rollout.episode is not None
    assert (rollout.episode.turns, rollout.episode.ended, rollout.finish_reason) == (turns, "room", "length")
    assert environment.closed == environment.begun
    assert all(seen.prompt.max_response_tokens + len(seen.prompt.token_ids) == before + room for seen in engine.asked)
    # A turn that was cut off is not shown.
    assert len(environment.stepped) == turns - (length < 14 * (turns - 1) + 6)


def test_a_beginning_without_room_for_an_answer_is_left_out_and_counted() -> None:
    engine = Recorder(lambda asked, sample: "ok")
    environment = Scripted(lambda turn: DONE, lambda asked, sample: said("x" * 60))
    rollout = one(play_alone(engine, [prompt(0, room=60)], environment, SPEC))
    assert len(rollout.token_ids) == len(rollout.prompt.token_ids) + 3
    assert rollout.episode is not None and rollout.episode.ended == "room"
    assert environment.stepped == [] and environment.closed == environment.begun
    assert episode_means([rollout])["environment_limit_rate"] == 1


def test_time_is_that_of_the_environment_alone_and_bounded() -> None:
    def slow_student(asked: Prompt, sample: int) -> str:
        time.sleep(0.2)
        return "ok"

    environment = Scripted(lambda turn: waiting(0.1, MORE))
    spec = python_spec(turn_seconds=0.25, episode_seconds=0.35, max_turns=100)
    rollout = one(play_alone(Recorder(slow_student), [prompt(0, room=500)], environment, spec))
    assert rollout.episode is not None
    assert (rollout.episode.ended, rollout.episode.failed) == ("time", False)
    assert rollout.episode.turns == 4  # 0.1, 0.2, 0.3, 0.4 s; the student's 0.8 s do not count
    assert 0.4 <= rollout.episode.seconds < 0.6
    assert environment.closed == environment.begun
    # A step gets what a turn may take, or what is left of the episode.
    assert environment.allowed[0] == 0.25
    assert environment.allowed[3] == pytest.approx(0.05, abs=0.02)


def test_a_beginning_that_takes_all_time_leaves_one_answer() -> None:
    environment = Scripted(lambda turn: MORE, lambda asked, sample: waiting(0.1, Observation()))
    spec = python_spec(episode_seconds=0.05)
    rollout = one(play_alone(Recorder(lambda asked, sample: "ok"), [prompt(0)], environment, spec))
    assert rollout.episode is not None
    assert (rollout.episode.turns, rollout.episode.ended, rollout.episode.failed) == (1, "time", False)
    assert environment.stepped == [] and environment.closed == environment.begun


@pytest.mark.parametrize("reason", get_args(Failure))
def test_a_failure_ends_its_episode_and_no_other(reason: Failure) -> None:
    def first(asked: Prompt, sample: int) -> Observation:
        return failing(reason) if asked.id == "tool/0" else Observation()

    def step(turn: Turn) -> Observation:
        text = TOKENIZER.decode(turn.token_ids)
        if text == "tool/1":
            return failing(reason)
        return DONE if turn.number == 1 else said("x", reward=0.5, calls=2, calls_failed=1)

    engine = Recorder(lambda asked, sample: asked.id.partition("#")[0])
    environment = Scripted(step, first)
    rollouts = play_alone(engine, [prompt(number) for number in range(3)], environment, SPEC)
    episodes = [rollout.episode for rollout in rollouts]
    assert [(e.turns, e.ended, e.failed) for e in episodes if e] == [
        (1, reason, True),
        (1, reason, True),
        (2, "answered", False),
    ]
    assert [TOKENIZER.decode(rollout.response_ids) for rollout in rollouts[:2]] == ["tool/0", "tool/1"]
    assert [rollout.reward for rollout in rollouts] == [0, 0, 0.5]
    failed = {identity for identity in environment.begun if not identity.startswith("tool/2")}
    assert set(environment.closed) == (set() if reason == "unreachable" else failed)
    means = episode_means(rollouts)
    assert means["environment_failures"] == pytest.approx(2 / 3)
    assert means["environment_limit_rate"] == 0
    assert means["turns"] == pytest.approx(4 / 3)
    assert means["tool_calls"] == pytest.approx(2 / 3)
    assert means["tool_calls_failed"] == pytest.approx(1 / 3)
    assert means["environment_tokens"] == pytest.approx(1 / 3)


def test_the_last_reward_counts() -> None:
    def step(turn: Turn) -> Observation:
        return Observation(done=True, reward=0.75) if turn.number == 2 else said("x", reward=[0.25, None][turn.number])

    rollout = one(play_alone(Recorder(lambda asked, sample: "ok"), [prompt(0)], Scripted(step), SPEC))
    assert rollout.reward == 0.75
    kept = Scripted(lambda turn: said("x", reward=0.25) if turn.number == 0 else Observation(done=True))
    assert one(play_alone(Recorder(lambda asked, sample: "ok"), [prompt(0)], kept, SPEC)).reward == 0.25


def test_every_attempt_is_an_episode_of_its_own() -> None:
    environment = ends_after(1)
    for _ in range(2):
        play_alone(Recorder(lambda asked, sample: "ok"), [prompt(0), prompt(1)], environment, SPEC, samples=3)
    assert len(set(environment.begun)) == len(environment.begun) == 12


def test_no_more_calls_are_under_way_than_workers() -> None:
    now, most, lock = [0], [0], threading.Lock()

    def step(turn: Turn) -> Observation:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return DONE

    spec = python_spec(workers=3)
    play_alone(Recorder(lambda asked, sample: "ok"), [prompt(n) for n in range(12)], Scripted(step), spec)
    assert most[0] == 3

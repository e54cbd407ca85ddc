"""Answers under way: taken as they come, stopped on their way, gone on with, held during an update, and lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from megatron_mopd.rollout.engine import RolloutFailure, Sampling
from megatron_mopd.rollout.sglang import client
from megatron_mopd.rollout.sglang.client import Dispatcher, Limits, Request
from megatron_mopd.rollout.sglang.flight import Flight
from megatron_mopd.rollout.sglang.protocol import BadAnswer, Contract, Part, read_answer, request_body
from megatron_mopd.types import Prompt, Rollout
from tests.unit.sglang_stub import StubServer, serving
from tests.unit.test_sglang_client import pool_of

TICK = 0.01
LIMIT = 60
SAMPLING = Sampling(temperature=1.0)


@dataclass
class Counting:
    """A server that counts up from the last token of its input, one a tick, until its answer has as many tokens as the
    first token of the prompt says, or until all are told to stop."""

    version: int = 1
    asked: list[list[int]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    deaf_seconds: float = 0.0
    running: int = 0
    most: int = 0

    def reply(self, path: str, body: Any) -> tuple[int, Any] | None:
        if path == "/abort_request":
            time.sleep(self.deaf_seconds)
            self.stopped.set()
            return 200, None
        if path != "/generate":
            return 200, {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]}
        self.stopped.clear()
        given, params = body["input_ids"], body["sampling_params"]
        self.asked.append(given)
        self.running += 1
        self.most = max(self.most, self.running)
        wanted = given[0] - (len(given) - 2)
        assert params["max_new_tokens"] == LIMIT - (len(given) - 2)
        tokens: list[int] = []
        while len(tokens) < wanted and not self.stopped.is_set():
            time.sleep(TICK)
            tokens.append(given[-1] + len(tokens) + 1)
        self.running -= 1
        kind = "stop" if len(tokens) == wanted else "abort"
        if kind == "stop":
            tokens[-1] = 1
        return 200, {
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": kind},
                "output_token_logprobs": [[-float(token), token, None] for token in tokens],
                "weight_version": f"r:{self.version}",
            },
        }


@dataclass
class Trainer:
    server: Counting
    stub: StubServer
    dispatcher: Dispatcher
    flight: Flight
    oldest: int = 1

    def begin(self, lengths: list[int]) -> None:
        for number, length in enumerate(lengths):
            prompt = Prompt(
                id=f"a/{number}",
                domain="a",
                token_ids=np.array([length, 100]),
                answer="",
                max_response_tokens=LIMIT,
            )
            self.flight.begin(prompt, seed=number)


@contextmanager
def trainer(*, samples: int = 1, concurrency: int = 64, may_stop: bool = True) -> Iterator[Trainer]:
    server = Counting()
    with serving(server.reply) as stub:
        limits = Limits(concurrency=concurrency, answer_seconds=20.0, retries=0)
        with closing(Dispatcher(pool_of(stub), limits)) as dispatcher:

            def contract() -> Contract:
                newest = server.version
                return Contract(
                    run_id="r",
                    policy_version=newest,
                    oldest_version=1,
                    vocab_size=999,
                    stop_ids=(1,),
                    may_stop=may_stop,
                )

            def request(prompt: Prompt, sample: int, seed: int, kept: Part | None) -> Request:
                return Request(
                    body=request_body(prompt, sample, SAMPLING, seed, contract(), kept),
                    read=lambda url, answer: read_answer(url, answer, prompt, sample, contract(), kept),
                )

            yield Trainer(server, stub, dispatcher, Flight(dispatcher, request, samples))


def first(count: int) -> Any:
    return lambda answered: list(answered[:count]) if len(answered) >= count else None


def names(rollouts: list[Rollout]) -> list[str]:
    return [rollout.prompt.id for rollout in rollouts]


def test_the_first_that_are_answered_can_be_taken_and_the_rest_goes_on() -> None:
    with trainer() as t:
        t.begin([40, 5, 30, 10])
        assert names(t.flight.wait(first(2))) == ["a/1", "a/3"]
        t.server.version = 2
        late = t.flight.wait(first(2))
        assert names(late) == ["a/2", "a/0"]
        assert [len(rollout.response_ids) for rollout in late] == [30, 40]
        assert len(t.server.asked) == 4


def test_a_prompt_is_answered_when_all_its_samples_are() -> None:
    with trainer(samples=3, concurrency=2) as t:
        t.begin([3, 4])
        rollouts = t.flight.wait(first(2))
        assert [(rollout.prompt.id, rollout.sample) for rollout in rollouts] == [
            (f"a/{n}", sample) for n in range(2) for sample in range(3)
        ]
        assert t.server.most == 2


def test_what_is_stopped_goes_on_from_there_with_its_tokens_and_versions() -> None:
    with trainer(concurrency=3) as t:
        t.begin([50, 5, 45, 40, 30])  # three at a time: one of them has not begun when they are stopped
        early = t.flight.wait(first(1))
        t.flight.stop()
        assert names(early) == ["a/1"]
        assert (t.flight._running, t.server.running) == (0, 0)
        kept = t.flight.kept_tokens
        assert 0 < kept < 50 + 45 + 40
        asked = len(t.server.asked)
        time.sleep(5 * TICK)
        assert len(t.server.asked) == asked

        t.server.version = 2
        t.flight.resume()
        late = {rollout.prompt.id: rollout for rollout in t.flight.wait(first(4))}
        lengths = {"a/0": 50, "a/2": 45, "a/3": 40, "a/4": 30}
        assert {name: len(rollout.response_ids) for name, rollout in late.items()} == lengths
        for name, rollout in late.items():
            expected = [*range(101, 100 + lengths[name]), 1]
            assert rollout.response_ids.tolist() == expected
            assert rollout.rollout_logprobs[2:].tolist() == [-float(token) for token in expected]
        spans = {name: [(s.version, s.end - s.start) for s in r.weight_versions] for name, r in late.items()}
        both = {name: value for name, value in spans.items() if value}
        assert 2 <= len(both) < 4
        assert all([version for version, _ in value] == [1, 2] for value in both.values())
        assert sum(value[0][1] for value in both.values()) == kept
        assert all(late[name].policy_version == (1 if name in both else 2) for name in late)
        # What is kept goes to the server as input, and is not sampled again.
        assert sum(len(given) - 2 for given in t.server.asked[asked:]) == kept


def test_answers_that_end_while_they_are_told_to_stop_are_whole() -> None:
    with trainer() as t:
        t.server.deaf_seconds = 0.5
        t.begin([5, 8])
        while t.server.running < 2:
            time.sleep(TICK / 10)
        t.flight.stop()
        assert t.stub.seen["/abort_request"] == 1
        assert t.flight.kept_tokens == 0
        assert names(t.flight.wait(first(2))) == ["a/0", "a/1"]
        t.flight.stop()
        assert t.stub.seen["/abort_request"] == 1


def test_nothing_is_sent_while_an_update_holds_what_is_under_way() -> None:
    with trainer(concurrency=2) as t:
        t.begin([20, 25, 5, 5])
        while t.server.running < 2:
            time.sleep(TICK)
        t.dispatcher.hold()
        assert (t.server.running, len(t.server.asked)) == (0, 2)
        t.server.version = 2
        t.dispatcher.release()
        rollouts = t.flight.wait(first(4))
        assert {rollout.prompt.id: rollout.policy_version for rollout in rollouts} == {
            "a/0": 1,
            "a/1": 1,
            "a/2": 2,
            "a/3": 2,
        }
        assert all(rollout.weight_versions == () for rollout in rollouts)


@pytest.mark.parametrize("may_stop", [False, True])
def test_an_answer_that_somebody_else_stopped_is_a_fault(may_stop: bool) -> None:
    with trainer(may_stop=may_stop) as t:
        t.begin([50])
        while not t.server.running:
            time.sleep(TICK)
        t.server.stopped.set()
        with pytest.raises((BadAnswer, RolloutFailure), match="ended early"):
            t.flight.wait(first(1))


def test_who_waits_for_a_server_that_took_no_weights_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_STILL_LIVE_SECONDS", 0.05)
    with trainer() as t:
        t.begin([60, 60])
        while t.server.running < 2:
            time.sleep(TICK)
        pool = t.dispatcher._pool
        pool.ready_for_weights()
        pool.weights_sent([], {t.stub.url: "took no weights"})
        with pytest.raises(RolloutFailure, match=r"no server is left: .* took no weights"):
            t.flight.wait(first(2))


def test_news_of_a_server_that_was_lost_during_the_update_are_of_the_past() -> None:
    with trainer() as t:
        pool = t.dispatcher._pool
        pool.ready_for_weights()
        pool.lose(pool.members[0], "died during the update")
        pool.weights_sent([t.stub.url], {})
        assert pool.live == []
        pool.ready_for_weights()
        pool.weights_sent([t.stub.url], {})
        assert [member.url for member in pool.live] == [t.stub.url]


def test_closing_stops_what_is_under_way() -> None:
    with trainer() as t:
        t.begin([60])
        while not t.server.running:
            time.sleep(TICK)
        t.dispatcher.close()
        assert t.server.stopped.is_set()
        assert t.stub.seen["/abort_request"] == 1

"""Requests over several servers: who gets them, what is asked again, and what ends a batch."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from megatron_mopd.rollout.engine import RolloutFailure
from megatron_mopd.rollout.sglang.client import Limits, Request, generate_all
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerRefused, ServerUnreachable
from megatron_mopd.rollout.sglang.pool import ServerPool
from megatron_mopd.types import Prompt, Rollout
from tests.unit.sglang_stub import Reply, StubServer, serving

LIMITS = Limits(concurrency=4, answer_seconds=20.0, retries=1)


def rollout(number: int) -> Rollout:
    prompt = Prompt(id=f"a/{number}", domain="a", token_ids=np.array([1]), answer="", max_response_tokens=1)
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=np.array([1, number]),
        loss_mask=np.array([False, True]),
        rollout_logprobs=np.zeros(2, np.float32),
        policy_version=0,
        finish_reason="length",
    )


def requests(count: int) -> list[Request]:
    return [Request(body={"number": n}, read=lambda url, answer: rollout(answer["number"])) for n in range(count)]


def numbers(rollouts: list[Rollout]) -> list[int]:
    return [int(r.token_ids[1]) for r in rollouts]


def echo(path: str, body: Any) -> tuple[int, Any]:
    if path == "/generate":
        time.sleep(0.005)
        return 200, body
    return 200, {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]} if "loads" in path else {}


def pool_of(*servers: StubServer, said: list[str] | None = None) -> ServerPool:
    connections = [ServerConnection(url=server.url, api_key=server.api_key) for server in servers]
    pool = ServerPool(
        connections, start=None, check=lambda server: None, say=said.append if said is not None else lambda line: None
    )
    pool.weights_sent([server.url for server in servers], {})
    return pool


def test_answers_are_in_order_and_servers_share_the_work() -> None:
    with serving(echo, "key") as a, serving(echo, "key") as b:
        got = generate_all(pool_of(a, b), requests(60), LIMITS)

        assert numbers(got) == list(range(60))
        assert a.seen["/generate"] + b.seen["/generate"] == 60
        assert min(a.seen["/generate"], b.seen["/generate"]) >= 15


def test_a_server_never_has_more_than_its_share_of_requests_at_once() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def counting(path: str, body: Any) -> tuple[int, Any]:
        nonlocal now, most
        if path != "/generate":
            return echo(path, body)
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return 200, body

    with serving(counting) as server:
        generate_all(pool_of(server), requests(40), LIMITS)

    assert most == LIMITS.concurrency


def test_a_server_that_is_busy_with_others_gets_less() -> None:
    def busy(path: str, body: Any) -> tuple[int, Any]:
        if "loads" in path:
            return 200, {"loads": [{"num_running_reqs": 60, "num_waiting_reqs": 40}]}
        return echo(path, body)

    with serving(busy) as a, serving(echo) as b:
        pool = pool_of(a, b)
        pool.members[0].elsewhere = 100
        generate_all(pool, requests(4), LIMITS)

        assert (a.seen["/generate"], b.seen["/generate"]) == (0, 4)


def test_a_broken_connection_is_tried_again_and_nothing_is_lost_or_doubled() -> None:
    broken: set[int] = set()

    def flaky(path: str, body: Any) -> tuple[int, Any] | None:
        if path == "/generate" and body["number"] % 3 == 0 and body["number"] not in broken:
            broken.add(body["number"])
            return None
        return echo(path, body)

    said: list[str] = []
    with serving(flaky) as server:
        got = generate_all(pool_of(server, said=said), requests(12), LIMITS)

        assert numbers(got) == list(range(12))
        assert server.seen["/generate"] == 16
        assert said == []


def test_a_dead_servers_requests_go_to_the_others() -> None:
    said: list[str] = []
    with ExitStack() as stack:
        a = stack.enter_context(serving(echo))
        with serving(echo) as b:
            pool = pool_of(a, b, said=said)
        got = generate_all(pool, requests(20), LIMITS)

        assert numbers(got) == list(range(20))
        assert a.seen["/generate"] == 20
    assert [member.is_live for member in pool.members] == [True, False]
    assert len(said) == 1
    assert said[0].startswith(f"rollout server {b.url} is taken out: cannot be reached: ")


def test_a_server_that_answers_looks_and_breaks_requests_is_taken_out_after_bounded_retries() -> None:
    def useless(path: str, body: Any) -> tuple[int, Any] | None:
        return None if path == "/generate" else echo(path, body)

    with serving(useless) as server, pytest.raises(RolloutFailure, match=r"no server is left: .* times"):
        generate_all(pool_of(server), requests(1), LIMITS)
    assert server.seen["/generate"] == LIMITS.retries + 1


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_a_server_refuses_is_asked_once(status: int) -> None:
    def refuse(path: str, body: Any) -> tuple[int, Any]:
        return (status, {"error": {"message": "too\nlong"}}) if path == "/generate" else echo(path, body)

    with serving(refuse) as server:
        with pytest.raises(ServerRefused, match=f"HTTP {status}: /generate: too long"):
            generate_all(pool_of(server), requests(1), LIMITS)
        assert server.seen["/generate"] == 1


def test_a_batch_that_fails_leaves_nothing_running_on_the_servers() -> None:
    def refuse(url: str, answer: Any) -> Rollout:
        raise ValueError("not this one")

    with serving(echo) as a, serving(echo) as b:
        with pytest.raises(ValueError, match="not this one"):
            generate_all(pool_of(a, b), [*requests(3), Request(body={"number": 3}, read=refuse)], LIMITS)
        assert (a.seen["/abort_request"], b.seen["/abort_request"]) == (1, 1)


def test_a_server_that_takes_too_long_counts_as_dead() -> None:
    def slow(path: str, body: Any) -> tuple[int, Any]:
        if path == "/generate":
            time.sleep(0.5)
        return echo(path, body)

    limits = Limits(concurrency=4, answer_seconds=0.05, retries=3)
    with serving(slow) as server:
        with pytest.raises(RolloutFailure, match=r"no answer within 0.05 s \(rollout.sglang.answer_seconds\)"):
            generate_all(pool_of(server), requests(1), limits)
        assert server.seen["/generate"] == 1


def test_no_server_left_names_every_one_and_its_reason() -> None:
    with serving(echo) as a, serving(echo) as b:
        pool = pool_of(a, b)
    with pytest.raises(RolloutFailure, match="no server is left") as caught:
        generate_all(pool, requests(3), LIMITS)

    assert a.url in str(caught.value)
    assert b.url in str(caught.value)


def test_an_api_key_is_sent_and_not_shown() -> None:
    with serving(echo, "s3cret") as server:
        good = ServerConnection(url=server.url, api_key="s3cret")
        assert good.get("/model_info") == {}
        assert good.post("/x", {"a": 1}) == {}
        assert "s3cret" not in repr(good)
        for connection in (ServerConnection(url=server.url), ServerConnection(url=server.url, api_key="other")):
            with pytest.raises(ServerRefused, match="HTTP 401: /model_info: Unauthorized") as caught:
                connection.get("/model_info")
            assert caught.value.status == 401


def test_an_answer_of_no_success_is_a_refusal_whatever_its_status() -> None:
    refusing = serving(lambda path, body: (200, {"success": False, "message": "not now"}))
    with refusing as server, pytest.raises(ServerRefused, match="HTTP 200: /pause: not now"):
        ServerConnection(url=server.url).post("/pause", {})


def test_nobody_there_is_unreachable() -> None:
    with serving(echo) as server:
        connection = ServerConnection(url=server.url)
    with pytest.raises(ServerUnreachable, match=f"{server.url}: GET /model_info: Connection refused"):
        connection.get("/model_info")


def test_a_server_that_answers_again_gets_the_next_weights_and_lives() -> None:
    alive: Reply = echo
    with serving(lambda path, body: alive(path, body)) as server:
        pool = pool_of(server)
        pool.lose(pool.members[0], "was lost")
        assert pool.live == []
        back = pool.ready_for_weights()
        assert [connection.url for connection in back] == [server.url]
        assert pool.live == []
        pool.weights_sent([server.url], {})
        assert [member.url for member in pool.live] == [server.url]
        pool.weights_sent([], {server.url: "took too long"})
        assert pool.live == []
        with pytest.raises(RolloutFailure, match="took too long"):
            pool.require_live()

"""The HTTP adapter against a real server: the protocol, and every way in which the other side can fail."""

from __future__ import annotations

import json
import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest

from megatron_mopd.environments import request
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.environments.http_environment import HttpEnvironment
from megatron_mopd.environments.opening import check_environment
from megatron_mopd.environments.protocol import EnvironmentFailure, Turn
from megatron_mopd.types import Prompt
from megatron_mopd.yaml_config import ConfigError
from tests.environments.agent_server import AgentServer, Reply, break_off, counting_game, serving
from tests.environments.games import STOP, TOKENIZER, Recorder, play_alone, prompt, tokens

PROMPT = Prompt(
    id="tool/0",
    domain="tool",
    token_ids=TOKENIZER.render([{"role": "user", "content": "go"}]),
    answer="",
    max_response_tokens=60,
    record={"metadata": {3: "three", (1, 2): {4}}, "n": np.int64(5)},
)
TURN = Turn(token_ids=np.append(tokens("hello"), STOP), number=0, room=40)


def spec(url: str, **options: object) -> EnvironmentSpec:
    return EnvironmentSpec(**{"kind": "http", "url": url, "role": "user"} | options)  # type: ignore[arg-type]


def opened(server: AgentServer, **options: object) -> HttpEnvironment:
    return HttpEnvironment(spec(server.url, **options), TOKENIZER)


def fails(server: AgentServer, seconds: float = 5.0, **options: object) -> tuple[str, str]:
    """(reason, message) of a step's failure."""
    with pytest.raises(EnvironmentFailure) as caught:
        opened(server, **options).step("e", TURN, seconds)
    return caught.value.reason, str(caught.value)


def test_an_episode_as_the_server_and_the_student_see_it() -> None:
    with serving(counting_game(turns=3)) as server:
        environment = opened(server)
        engine = Recorder(lambda asked, sample: "my move")
        asked = prompt(7, room=200)
        (rollout,) = play_alone(engine, [asked], environment, spec(server.url))
    (reset,), steps = server.bodies("/reset"), server.bodies("/step")
    identity = reset["episode"]
    assert identity.startswith("tool/7#0-")
    assert reset == {
        "protocol": 1,
        "episode": identity,
        "prompt_id": "tool/7",
        "sample": 0,
        "seed": 5,
        "record": {},
        "prompt": "question 7",
    }
    spent, said = 8, len("turn 1") + 3  # the observation and the marks of the user's and the student's turns, but one
    assert said == len(TOKENIZER.encode("<|user|>turn 1<|assistant|>")) + 1
    rooms = [200 - spent * (n + 1) - (said - 1) * n for n in range(3)]
    assert steps == [
        {"protocol": 1, "episode": identity, "turn": n, "room": rooms[n], "response": "my move"} for n in range(3)
    ]
    assert server.bodies("/close") == []
    assert rollout.reward == 0.75
    assert rollout.episode is not None
    assert (rollout.episode.turns, rollout.episode.calls, rollout.episode.ended) == (3, 2, "answered")
    messages = [{"role": "user", "content": "question 7"}]
    for number in (1, 2):
        messages += [{"role": "assistant", "content": "my move"}, {"role": "user", "content": f"turn {number}"}]
    np.testing.assert_array_equal(
        rollout.token_ids, np.concatenate((TOKENIZER.render(messages), np.append(tokens("my move"), STOP)))
    )
    assert TOKENIZER.decode(rollout.response_ids) == "my move" * 3


def test_an_environment_of_token_ids() -> None:
    start, between = tokens("begin. ").tolist(), tokens("<|user|>?<|assistant|>").tolist()

    def reply(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/reset":
            return {"observation_ids": start}
        return {"done": True, "reward": 1} if body["turn"] else {"observation_ids": between}

    with serving(reply) as server:
        environment = opened(server, send="token_ids")
        engine = Recorder(lambda asked, sample: "ok")
        (rollout,) = play_alone(engine, [PROMPT], environment, spec(server.url, send="token_ids"))
    (reset,) = server.bodies("/reset")
    assert reset["prompt_ids"] == PROMPT.token_ids.tolist()
    assert reset["record"] == {"metadata": {"3": "three", "(1, 2)": "{4}"}, "n": "5"}
    ok = [*tokens("ok").tolist(), STOP]
    assert [body["response_ids"] for body in server.bodies("/step")] == [ok, ok]
    assert rollout.token_ids.tolist() == [*PROMPT.token_ids.tolist(), *start, *ok, *between, *ok]
    assert (rollout.reward, rollout.episode.calls) == (1.0, 1)  # type: ignore[union-attr]


def test_an_episode_that_is_stopped_here_is_closed_there() -> None:
    with serving(counting_game(turns=100)) as server:
        play_alone(
            Recorder(lambda asked, sample: "x"), [prompt(0)], opened(server), spec(server.url, max_turns=2), samples=2
        )
    assert len(server.bodies("/step")) == 4
    begun = [body["episode"] for body in server.bodies("/reset")]
    assert sorted(server.bodies("/close"), key=str) == [{"protocol": 1, "episode": e} for e in sorted(begun)]


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ((200, b"<html>oops</html>"), "not JSON: <html>oops</html>"),
    "deep JSON": ((200, b"[" * 200_000), "not JSON"),
    "a list": ([], "not a JSON object"),
    "nothing said": ({}, "observation must be a text, as the episode is not done"),
    "a number said": ({"observation": 4}, "observation must be a text"),
    "both": ({"observation": "a", "observation_ids": [1]}, "observation and observation_ids are both there"),
    "done is a word": ({"done": "yes"}, "done must be true or false"),
    "too much reward": ({"done": True, "reward": 1.5}, "reward must be a number from 0 to 1, or null"),
    "reward NaN": ((200, b'{"done": true, "reward": NaN}'), "reward must be a number from 0 to 1"),
    "reward true": ({"done": True, "reward": True}, "reward must be a number from 0 to 1"),
    "ids outside": ({"observation_ids": [1, 114]}, "observation_ids must be a list of token ids below 114"),
    "ids below": ({"observation_ids": [-1]}, "observation_ids must be a list"),
    "ids huge": ({"observation_ids": [1 << 70]}, "observation_ids must be a list"),
    "ids are words": ({"observation_ids": "12"}, "observation_ids must be a list"),
    "ids are not whole": ({"observation_ids": [1.0]}, "observation_ids must be a list"),
    "ids are truths": ({"observation_ids": [True]}, "observation_ids must be a list"),
    "no ids": ({"observation_ids": []}, "observation_ids is empty, and the episode is not done"),
    "too big": ((200, b" " * (17 << 20)), "an answer of more than 16 MiB"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_not_of_the_protocol(name: str) -> None:
    answer, message = WRONG[name]
    with serving(lambda path, body: answer) as server:
        reason, told = fails(server)
    assert reason == "bad_answer"
    assert message in told and "\n" not in told
    assert len(server.seen) == 1  # asking again would not help


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"done": True}, "the episode is done before the first turn"),
        ({"observation": "text"}, "an observation before the first turn must be observation_ids"),
        ({"observation_ids": [114]}, "must be a list of token ids below 114"),
    ],
)
def test_a_wrong_beginning(answer: Any, message: str) -> None:
    with serving(lambda path, body: answer) as server, pytest.raises(EnvironmentFailure, match=message):
        opened(server).reset("e", PROMPT, 0, 1, 5.0)


@pytest.mark.parametrize(
    ("code", "times"), [(500, 1), (404, 1), (401, 1), (301, 1), (204, 1), (429, 3), (502, 3), (503, 3), (504, 3)]
)
def test_codes_and_retries(code: int, times: int) -> None:
    with serving(lambda path, body: (code, b"" if code == 204 else b"no " * 400)) as server:
        reason, told = fails(server, retries=2)
    assert (reason, len(server.seen)) == ("refused", times)
    assert f"/step: HTTP {code}: " in told and len(told) < 300


def flaky(times: int, fault: Any) -> Reply:
    """`fault` so many times, then a good answer."""
    left = [times]

    def reply(path: str, body: dict[str, Any]) -> Any:
        left[0] -= 1
        return fault if left[0] >= 0 else {"done": True}

    return reply


def half(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{")
    handler.connection.close()


@pytest.mark.parametrize("fault", [break_off, half, (503, b"busy")], ids=["broken off", "half", "busy"])
def test_what_passes_is_asked_again(fault: Any) -> None:
    with serving(flaky(2, fault)) as server:
        started = time.monotonic()
        assert opened(server, retries=2).step("e", TURN, 5.0).done
        assert 0.3 <= time.monotonic() - started < 1.5  # pauses of 0.1 and 0.2 s
    assert len(server.seen) == 3 and all(seen == server.seen[0] for seen in server.seen)
    with serving(flaky(2, fault)) as server:
        reason, _ = fails(server, retries=1)
    assert (reason, len(server.seen)) == ("refused" if isinstance(fault, tuple) else "unreachable", 2)


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(3)


def trickling(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(30):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def trickling_head(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for number in range(30):
        handler.wfile.write(f"X-{number}: x\r\n".encode())
        time.sleep(0.1)


@pytest.mark.parametrize("way", [silent, trickling, trickling_head], ids=lambda way: way.__name__)
def test_a_slow_server_is_waited_for_as_long_as_allowed(way: Any) -> None:
    with serving(lambda path, body: way) as server:
        started = time.monotonic()
        reason, told = fails(server, seconds=0.4)
        assert 0.35 <= time.monotonic() - started < 1.0
    assert (reason, len(server.seen)) == ("timeout", 1)
    assert "no answer within 0.4 s" in told


def test_retries_end_with_the_time() -> None:
    with serving(lambda path, body: (503, b"busy")) as server:
        started = time.monotonic()
        reason, _ = fails(server, seconds=0.6, retries=50)
        assert time.monotonic() - started < 1.0
    assert reason == "timeout"
    assert 2 <= len(server.seen) <= 3  # after 0, 0.1 and 0.3 s


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    environment = HttpEnvironment(spec(url, retries=1), TOKENIZER)
    with pytest.raises(EnvironmentFailure, match="Connection refused") as caught:
        environment.step("e", TURN, 5.0)
    assert caught.value.reason == "unreachable"
    environment.close("e")  # never raises
    rollouts = play_alone(Recorder(lambda asked, sample: "alone"), [prompt(0), prompt(1)], environment, spec(url))
    assert [(r.episode.turns, r.episode.ended, r.episode.failed) for r in rollouts if r.episode] == [
        (1, "unreachable", True)
    ] * 2
    with pytest.raises(ConfigError, match=r"^domains.a.environment.url: .*Connection refused; start the environment"):
        check_environment("domains.a", spec(url, retries=0), TOKENIZER)


def test_the_check_before_a_run() -> None:
    with serving(counting_game()) as server:
        check_environment("domains.a", spec(server.url), TOKENIZER)
    assert server.seen == [("/check", {"protocol": 1})]
    other = pytest.raises(ConfigError, match=r"^domains.a.environment.url: http://.* speaks protocol 2, this program 1")
    with serving(lambda path, body: {"protocol": 2}) as server, other:
        check_environment("domains.a", spec(server.url), TOKENIZER)


def test_a_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_KEY", "s3cret")
    with serving(lambda path, body: (403, b"no")) as server:
        _, told = fails(server, api_key_env="AGENT_KEY")
    assert server.keys == {"Bearer s3cret"}
    assert "s3cret" not in told
    monkeypatch.setenv("AGENT_KEY", "s3cret\n")
    with pytest.raises(ConfigError, match="api_key_env: AGENT_KEY holds a character that no key has") as caught:
        HttpEnvironment(spec("http://localhost", api_key_env="AGENT_KEY"), TOKENIZER)
    assert "s3cret" not in str(caught.value)
    monkeypatch.delenv("AGENT_KEY")
    with pytest.raises(ConfigError, match="the environment has no variable AGENT_KEY; set it to the key"):
        HttpEnvironment(spec("http://localhost", api_key_env="AGENT_KEY"), TOKENIZER)


def test_a_url_with_a_path() -> None:
    with serving(lambda path, body: {"done": True}) as server:
        HttpEnvironment(spec(f"{server.url}/agents/swe/"), TOKENIZER).step("e", TURN, 5.0)
    assert [path for path, _ in server.seen] == ["/agents/swe/step"]


def test_the_largest_answer_is_read() -> None:
    body = json.dumps({"observation": "x" * (request.MAX_ANSWER_BYTES - 100)}).encode()
    with serving(lambda path, _: (200, body)) as server:
        observation = opened(server, max_result_tokens=20).step("e", TURN, 20.0)
    assert TOKENIZER.decode(observation.token_ids) == "x" * 14 + "\n[cut]"

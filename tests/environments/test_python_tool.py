"""The Python tool over a real sandbox: results, exceptions, limits, and what is counted of them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from megatron_mopd.environments.chat import CUT
from megatron_mopd.environments.protocol import EnvironmentFailure, Observation, Turn
from megatron_mopd.environments.python_tool import PythonTool
from megatron_mopd.environments.sandbox import Sandbox
from megatron_mopd.environments.sandbox.isolation import Place
from tests.environments.games import STOP, TOKENIZER, Recorder, play_alone, prompt, python_spec, tokens


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox.open("auto")


def step(sandbox: Sandbox, text: str, seconds: float = 20.0, **options: object) -> Observation:
    tool = PythonTool(python_spec(**{"open": "{{", "close": "}}"} | options), TOKENIZER, sandbox)
    turn = Turn(token_ids=np.append(tokens(text), STOP), number=0, room=1000)
    return tool.step("e", turn, seconds)


def shown(observation: Observation) -> str:
    """The results, between what the template puts around them."""
    text = TOKENIZER.decode(observation.token_ids, keep_special=True)
    assert text.startswith("<|user|>") and text.endswith("<|assistant|>")
    return text.removeprefix("<|user|>").removesuffix("<|assistant|>").replace("<|user|>", "|")


def test_a_turn_without_a_call_is_the_answer(sandbox: Sandbox) -> None:
    observation = step(sandbox, "It is 4.")
    assert observation.done and not len(observation.token_ids) and observation.calls == 0


def test_results_and_exceptions_come_back_in_order(sandbox: Sandbox) -> None:
    observation = step(sandbox, "{{2+2}} and {{1/0}} and {{x = 3\nprint(x * 'ab')}} and {{x}}")
    results = shown(observation).split("|")
    assert results[0] == "4"
    assert results[1] == 'Traceback (most recent call last):\n  File "<snippet>", line 1, in <module>\n' + (
        "ZeroDivisionError: division by zero"
    )
    assert results[2] == "ababab"
    assert results[3].endswith("NameError: name 'x' is not defined")  # every call is a program of its own
    assert (observation.calls, observation.calls_failed, observation.done) == (4, 2, False)


def test_a_broken_call_is_answered_and_counted(sandbox: Sandbox) -> None:
    observation = step(sandbox, '{{{"name": "python"}}}', call="json")
    assert shown(observation).startswith("[error: the call ")
    assert (observation.calls, observation.calls_failed) == (0, 1)


def test_endless_loops_are_cut_and_the_turn_has_one_limit_for_all_calls(sandbox: Sandbox) -> None:
    started = time.monotonic()
    observation = step(sandbox, "{{print('on', flush=True)\nwhile True: pass}} {{2+2}}", seconds=1.0)
    assert time.monotonic() - started < 8.0  # the limit, and making the sandbox on a busy machine
    assert shown(observation) == "on\n[ended: it took too long]|[not run: no time is left]"
    assert (observation.calls, observation.calls_failed) == (2, 2)


def test_a_flood_of_output_is_cut_and_says_so(sandbox: Sandbox) -> None:
    observation = step(sandbox, "{{while True: print('x' * 100)}} {{print('y' * 31)}}", max_result_tokens=30)
    flood, long = shown(observation).split("|")
    assert flood == "x" * 24 + CUT
    assert long == "y" * 24 + CUT
    assert (observation.calls, observation.calls_failed) == (2, 1)


def test_memory_and_scratch_are_those_of_the_configuration(sandbox: Sandbox) -> None:
    observation = step(sandbox, "{{len(bytearray(100 << 20))}}{{len(bytearray(300 << 20))}}", memory_mb=256)
    small, large = shown(observation).split("|")
    assert small == str(100 << 20)
    assert large.endswith("MemoryError")


def test_a_sandbox_that_breaks_is_a_failure_of_the_environment_not_of_the_run() -> None:
    broken = Sandbox("none", Place(interpreter="/nonexistent", packages=(), folders=(), files=(), links={}))
    with pytest.raises(EnvironmentFailure, match="/nonexistent: No such file") as caught:
        step(broken, "{{2+2}}")
    assert caught.value.reason == "sandbox"
    tool = PythonTool(python_spec(), TOKENIZER, broken)
    engine = Recorder(lambda asked, sample: "[2+2]" if asked.id == "tool/0" else "no call")
    rollouts = play_alone(engine, [prompt(0), prompt(1)], tool, python_spec())
    assert [(r.episode.turns, r.episode.ended, r.episode.failed) for r in rollouts if r.episode] == [
        (1, "sandbox", True),
        (1, "answered", False),
    ]


def test_an_episode_with_the_tool(sandbox: Sandbox) -> None:
    def student(asked: object, sample: int) -> str:
        return "[6*7]" if "@" not in asked.id else "42"  # type: ignore[attr-defined]

    rollouts = play_alone(
        Recorder(student), [prompt(0)], PythonTool(python_spec(), TOKENIZER, sandbox), python_spec(), samples=2
    )
    expected = "<|user|>question 0<|assistant|>[6*7]<|end|><|user|>42<|assistant|>42<|end|>"
    for rollout in rollouts:
        assert TOKENIZER.decode(rollout.token_ids, keep_special=True) == expected
        assert TOKENIZER.decode(rollout.response_ids, keep_special=True) == "[6*7]<|end|>42<|end|>"
        assert rollout.episode is not None
        assert (rollout.episode.turns, rollout.episode.calls, rollout.episode.calls_failed) == (2, 1, 0)

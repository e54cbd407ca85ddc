"""Tool calls in what a student wrote: well-formed, broken, nested, many and huge. None of them raises."""

from __future__ import annotations

import json
import time

import pytest

from megatron_mopd.environments.calls import MAX_CALLS, Call, find_calls

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def found(text: str, form: str = "json") -> list[Call]:
    return find_calls(text, opening=OPEN, closing=CLOSE, form=form)  # type: ignore[arg-type]


def written(code: object, name: str = "python") -> str:
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': {'code': code}})}\n{CLOSE}"


def test_calls_come_in_order_and_what_was_only_thought_is_none() -> None:
    text = f"<think>{written('thought')}</think>First {written('a = 1')} then {written('print(2)')} done.<|im_end|>"
    assert found(text) == [Call(code="a = 1"), Call(code="print(2)")]
    assert found(f"<think>{written('still thinking')}") == []
    assert found("42") == found("") == []


def test_code_between_the_marks_is_taken_as_it_is() -> None:
    assert found(f"{OPEN}\nprint('{{')\n{CLOSE}{OPEN}{CLOSE}", "code") == [Call(code="\nprint('{')\n"), Call(code="")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"name": "python", "arguments": {"code": "x"', "the call is not JSON (Expecting ',' delimiter)"),
        ("print(2)", "the call is not JSON (Expecting value)"),
        ("", "the call is not JSON (Expecting value)"),
        ("[1, 2]", "the call is not an object"),
        ("NaN", "the call is not an object"),
        ('{"name": "bash", "arguments": {"code": "ls"}}', "there is no tool 'bash'; the only one is 'python'"),
        ('{"arguments": {"code": "ls"}}', "there is no tool 'None'"),
        ('{"name": "python"}', "the call has no code"),
        ('{"name": "python", "arguments": "print(2)"}', "the call has no code"),
        ('{"name": "python", "arguments": {"code": 7}}', "the call has no code"),
        ("[" * 100_000, "the call is not JSON (nested too deeply)"),
        ('{"a":' * 100_000, "the call is not JSON (nested too deeply)"),
        ('{"name": "python", "arguments": ' + "1" * 5000 + "}", "the call is not JSON (a number is too long)"),
        ('{"name": "' + "x" * 10_000 + '"}', "there is no tool '" + "x" * 50 + "'"),
        ('{"name": "\\ud800"}', "there is no tool '\\ud800'"),
    ],
)
def test_a_broken_call_is_told_what_is_wrong(content: str, problem: str) -> None:
    (call,) = found(f"{OPEN}{content}{CLOSE}")
    assert call.code is None and call.problem is not None
    assert call.problem.startswith(problem)
    assert len(call.problem) < 200
    call.problem.encode()


def test_nested_and_unfinished_calls() -> None:
    inner = f"print('{OPEN}')"
    assert found(written(inner)) == [Call(code=inner)]
    # It ends at the first closing text, also where that stands in a string.
    (call,) = found(written(f"print('{CLOSE}')"))
    assert call.problem is not None and call.problem.startswith("the call is not JSON (Unterminated string")
    assert found(OPEN + "print(1)") == []
    assert found(CLOSE + OPEN) == []
    assert found(written("one") + OPEN + "cut off") == [Call(code="one")]


def test_more_calls_than_allowed_get_one_answer_and_little_time() -> None:
    started = time.perf_counter()
    calls = found(written("x") * 20_000)
    assert time.perf_counter() - started < 1
    assert calls[:MAX_CALLS] == [Call(code="x")] * MAX_CALLS
    assert [call.problem for call in calls[MAX_CALLS:]] == ["at most 8 calls in one turn; the others were not run"]


def test_a_huge_call_is_read() -> None:
    code = "#" * (4 << 20)
    assert found(written(code)) == [Call(code=code)]

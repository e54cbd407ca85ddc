"""Finds the tool calls in what the student wrote. Pure functions of text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from megatron_mopd.domains.reasoning import after_reasoning

MAX_CALLS = 8
"""Of one turn; the rest is answered with one error instead of being run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, or what is wrong with it: exactly one of the two is set."""

    code: str | None = None
    problem: str | None = None


def find_calls(text: str, *, opening: str, closing: str, form: Literal["json", "code"]) -> list[Call]:
    """The calls between `opening` and `closing`, in order; what the student only thought about is none.

    A call ends at the first closing text, whatever it stands in. An opening without one is no call: the turn ended
    before it was written.
    """
    calls: list[Call] = []
    rest = after_reasoning(text)
    while True:
        _, opened, after = rest.partition(opening)
        content, closed, rest = after.partition(closing)
        if not opened or not closed:
            return calls
        if len(calls) == MAX_CALLS:
            return [*calls, Call(problem=f"at most {MAX_CALLS} calls in one turn; the others were not run")]
        if form == "code":
            calls.append(Call(code=content))
        else:
            calls.append(_read_json(content))


def _read_json(content: str) -> Call:
    """{"name": "python", "arguments": {"code": ...}}, as Qwen's, Hermes' and GLM's templates have it."""
    expected = '{"name": "python", "arguments": {"code": "..."}}'
    try:
        tree = json.loads(content)
    except json.JSONDecodeError as error:
        return Call(problem=f"the call is not JSON ({error.msg}); write {expected}")
    except (ValueError, RecursionError) as error:  # Python reads no integer of more than 4,300 digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
        return Call(problem=f"the call is not JSON ({reason}); write {expected}")
    if not isinstance(tree, dict):
        return Call(problem=f"the call is not an object; write {expected}")
    if tree.get("name") != "python":
        return Call(problem=f"there is no tool {str(tree.get('name'))[:50]!r}; the only one is 'python'")
    arguments = tree.get("arguments")
    code = arguments.get("code") if isinstance(arguments, dict) else None
    return Call(code=code) if isinstance(code, str) else Call(problem=f"the call has no code; write {expected}")

"""`environment: {kind: python}`: the code in the student's calls is run in a sandbox, and its output comes back."""

from __future__ import annotations

import time

from megatron_mopd.environments.calls import Call, find_calls
from megatron_mopd.environments.chat import TEXT_PER_TOKEN, TurnFormat
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.environments.protocol import EnvironmentFailure, Observation, Turn
from megatron_mopd.environments.sandbox import Sandbox, SandboxError, SandboxLimits, SandboxResult
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import Prompt

_MEGABYTE = 1 << 20
_ENDINGS = {
    "timeout": "[ended: it took too long]",
    "output": "[ended: too much output]",
    "killed": "[ended at a limit of memory, time or files]",
}


class PythonTool:
    """`Environment` whose calls know nothing of each other: every snippet is a program of its own."""

    def __init__(self, spec: EnvironmentSpec, tokenizer: Tokenizer, sandbox: Sandbox) -> None:
        self._spec, self._tokenizer, self._sandbox = spec, tokenizer, sandbox
        self._format = TurnFormat(tokenizer, spec.role)

    def reset(self, episode: str, prompt: Prompt, sample: int, seed: int, seconds: float) -> Observation:
        return Observation()

    def step(self, episode: str, turn: Turn, seconds: float) -> Observation:
        """Run the calls of the turn, one after another; a turn without any is the answer."""
        spec = self._spec
        text = self._tokenizer.decode(turn.token_ids, keep_special=True)
        calls = find_calls(text, opening=spec.open, closing=spec.close, form=spec.call)
        if not calls:
            return Observation(done=True)
        deadline = time.monotonic() + seconds
        results = [self._run(call, deadline - time.monotonic()) for call in calls]
        return Observation(
            token_ids=self._format.follow(turn.token_ids, [text for text, _ in results], spec.max_result_tokens),
            calls=sum(call.code is not None for call in calls),
            calls_failed=sum(not good for _, good in results),
        )

    def close(self, episode: str) -> None:
        """Nothing is left of a snippet when it has ended."""

    def _run(self, call: Call, seconds: float) -> tuple[str, bool]:
        """(what the student gets to read, whether all went well)"""
        if call.code is None:
            return f"[error: {call.problem}]", False
        if seconds <= 0:
            return "[not run: no time is left]", False
        limits = SandboxLimits(
            seconds=seconds,
            memory_bytes=self._spec.memory_mb * _MEGABYTE,
            scratch_bytes=self._spec.scratch_mb * _MEGABYTE,
            output_bytes=self._spec.max_result_tokens * TEXT_PER_TOKEN,
        )
        try:
            result = self._sandbox.run(call.code, limits)
        except SandboxError as error:
            raise EnvironmentFailure("sandbox", str(error)) from None
        return _as_text(result), result.ending == "ok"


def _as_text(result: SandboxResult) -> str:
    parts = (result.output.strip("\n"), _ENDINGS.get(result.ending, ""))
    return "\n".join(part for part in parts if part)

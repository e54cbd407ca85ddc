"""What stands around a result in the conversation, taken from the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import IntArray
from megatron_mopd.yaml_config import ConfigError

_ANSWER, _RESULT = "ANSWERMARK", "RESULTMARK"
TEXT_PER_TOKEN = 16
"""Characters of a result that are read for each token it may have: enough for any tokenizer, and far from a flood."""
CUT = "\n[cut]"
"""At the end of a result that was longer than it may be."""


class TurnFormat:
    """Writes messages of one role as token ids that follow a turn of the student's, up to where it goes on."""

    def __init__(self, tokenizer: Tokenizer, role: str) -> None:
        """Raises ConfigError where the chat template has no such role or hides what is said in it."""
        self._tokenizer, self._role = tokenizer, role
        self._pieces: dict[int, tuple[str, ...]] = {}
        self._around(1)

    def follow(self, turn: IntArray, results: Sequence[str], max_tokens: int) -> IntArray:
        """[E] what comes after `turn`: its end, where it did not write it itself, one message for each result, and the
        beginning of the next answer. A result that is longer than `max_tokens` is cut.

        Results come from outside: a special token that is spelt out in one is plain text.
        """
        first, *others = self._around(len(results))
        end = self._tokenizer.decode(turn[-1:], keep_special=True)
        parts = [self._tokenizer.encode(first.removeprefix(end) if int(turn[-1]) in self._stops else first)]
        for result, piece in zip(results, others, strict=True):
            parts += [self._cut(result, max_tokens), self._tokenizer.encode(piece)]
        return np.concatenate(parts)

    @property
    def _stops(self) -> tuple[int, ...]:
        return self._tokenizer.stop_ids

    def _cut(self, text: str, max_tokens: int) -> IntArray:
        limit = max_tokens * TEXT_PER_TOKEN
        tokens = self._tokenizer.encode_plain(text[:limit])
        if len(tokens) <= max_tokens and len(text) <= limit:
            return tokens
        mark = self._tokenizer.encode_plain(CUT)[:max_tokens]
        return np.concatenate((tokens[: max_tokens - len(mark)], mark))

    def _around(self, count: int) -> tuple[str, ...]:
        """[count + 1] texts: before the first result, between two, after the last."""
        if count not in self._pieces:
            marks = [f"{_RESULT}{number}" for number in range(count)]
            messages = [
                {"role": "user", "content": "QUESTION"},
                {"role": "assistant", "content": _ANSWER},
                *({"role": self._role, "content": mark} for mark in marks),
            ]
            rest = self._tokenizer.render_text(messages)
            pieces = []
            for mark in (_ANSWER, *marks):
                piece, found, rest = rest.partition(mark)
                if not found:
                    raise ConfigError(f"the chat template leaves out messages of the role '{self._role}'")
                pieces.append(piece)
            self._pieces[count] = (*pieces[1:], rest)
        return self._pieces[count]

"""The engine of the `sft` stage: every response is the prompt's reference answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.types import IntArray, Prompt, Rollout


class AnswerTokenizer(Protocol):
    """The part of the tokenizer that writing an answer needs."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response, the usual one first."""
        ...

    def encode(self, text: str) -> IntArray: ...


class ReferenceAnswers:
    """`RolloutEngine` that looks the response up: nothing depends on weights or seed."""

    def __init__(self, tokenizer: AnswerTokenizer) -> None:
        self._tokenizer = tokenizer

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Nothing to load; the stream is not read."""

    def rest(self) -> None:
        """Nothing to give up."""

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """One rollout per prompt: its answer and the end token, log-probabilities 0, policy version 0.

        An answer that does not fit `max_response_tokens` with its end token is cut (finish_reason `length`).
        Raises ValueError when `samples` is not 1: a prompt has one reference answer.
        """
        if samples != 1:
            raise ValueError(f"samples: a prompt has one reference answer, got {samples}")
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> Rollout:
        encoded = np.asarray(self._tokenizer.encode(prompt.answer), dtype=np.int64)
        full = np.append(encoded, self._tokenizer.stop_ids[0])
        response = full[: prompt.max_response_tokens]
        before, total = len(prompt.token_ids), len(prompt.token_ids) + len(response)
        return Rollout(
            prompt=prompt,
            sample=0,
            token_ids=np.concatenate((prompt.token_ids, response)),
            loss_mask=np.arange(total) >= before,
            rollout_logprobs=np.zeros(total, dtype=np.float32),
            policy_version=0,
            finish_reason="stop" if len(response) == len(full) else "length",
        )

"""The engine of `rollout.engine: dataset`: every response is the one that is stored with the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.types import Prompt, Rollout


class StoredAnswers:
    """`RolloutEngine` that looks the response up in the prompt's record: nothing depends on weights or seed.

    Rollouts come with the reward that was given when they were sampled.
    """

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Nothing to load; the stream is not read."""

    def rest(self) -> None:
        """Nothing to give up."""

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """One rollout per prompt of a `StoredFeed`, log-probabilities 0, policy version 0.

        Raises ValueError when `samples` is not 1, and for a prompt that is of no dataset.
        """
        if samples != 1:
            raise ValueError(f"samples: a stored prompt has one answer, got {samples}")
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> Rollout:
        stored = prompt.record
        if "response" not in stored:
            raise ValueError(f"prompt {prompt.id}: has no stored answer")
        before, total = len(prompt.token_ids), len(prompt.token_ids) + len(stored["response"])
        return Rollout(
            prompt=prompt,
            sample=0,
            token_ids=np.concatenate((prompt.token_ids, np.array(stored["response"], np.int64))),
            loss_mask=np.arange(total) >= before,
            rollout_logprobs=np.zeros(total, dtype=np.float32),
            policy_version=0,
            finish_reason=stored["finish_reason"],
            reward=stored["reward"],
        )

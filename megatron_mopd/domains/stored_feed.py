"""A domain's training prompts out of a dataset of stored answers, in a new order every epoch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Protocol

import numpy as np

from megatron_mopd.config import RunConfig
from megatron_mopd.domains.dataset import Dataset
from megatron_mopd.domains.source import Epochs, derive_seed
from megatron_mopd.types import Prompt
from megatron_mopd.yaml_config import ConfigError


class FeedState(Protocol):
    """The part of a domain's state that reading moves."""

    cursor: int
    drawn: int
    too_long: int
    held_out_skipped: int


class StoredFeed:
    """The stored answers of one domain as prompts that know their answer: `record` is the `StoredAnswer`.

    Which one comes at a place of the stream is a function of the run's seed and the place: what a resume needs is
    the cursor. Once through is an epoch.
    """

    def __init__(self, name: str, config: RunConfig, dataset: Dataset):
        self._name, self._spec, self._dataset = name, config.domains[name], dataset
        self._size = dataset.size(name)
        self._epochs = Epochs(self._size, derive_seed(config.seed, "dataset", name))

    def next(self, state: FeedState, reserved: frozenset[str]) -> Prompt:
        """The next usable prompt; moves `state` past it and past those that were left out.

        Left out, and counted: questions that are evaluated on (`reserved` has their hashes), and answers longer than
        the configuration allows. Raises ConfigError when none is left.
        """
        for _ in range(2 * self._size):  # the next epoch may have last what this one had first
            index = state.cursor
            state.cursor += 1
            answer = self._dataset.answer(self._name, self._epochs.place(index))
            if answer.question in reserved:
                state.held_out_skipped += 1
            elif (
                len(answer.prompt) > self._spec.max_prompt_tokens
                or len(answer.response) > self._spec.max_response_tokens
            ):
                state.too_long += 1
            else:
                state.drawn += 1
                return Prompt(
                    id=f"{self._name}/{index}",
                    domain=self._name,
                    question=answer.question,
                    token_ids=np.array(answer.prompt, np.int64),
                    answer="",
                    max_response_tokens=self._spec.max_response_tokens,
                    record=asdict(answer),
                )
        raise ConfigError(
            f"rollout.dataset: none of the {self._size} answers of domain '{self._name}' can be used (longer than"
            f" max_prompt_tokens={self._spec.max_prompt_tokens} or max_response_tokens="
            f"{self._spec.max_response_tokens}, or held out for evaluation); raise them, or sample other prompts"
        )

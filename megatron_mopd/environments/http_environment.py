"""`environment: {kind: http}`: an agent environment of yours behind three requests. docs/environments.md has the
protocol."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import numpy as np

from megatron_mopd.environments.chat import TurnFormat
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.environments.protocol import EnvironmentFailure, Observation, Turn
from megatron_mopd.environments.request import Endpoint
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import IntArray, Prompt
from megatron_mopd.yaml_config import ConfigError

PROTOCOL = 1
_CLOSE_SECONDS = 5.0
_CHECK_SECONDS = 10.0


class HttpEnvironment:
    """`Environment` that asks a server. An episode lives there, under the id that it is given here."""

    def __init__(self, spec: EnvironmentSpec, tokenizer: Tokenizer) -> None:
        """Raises ConfigError for a role that the chat template has not, or a key that is not set."""
        assert spec.url is not None
        key = os.environ.get(spec.api_key_env) if spec.api_key_env is not None else None
        if spec.api_key_env is not None and not key:
            raise ConfigError(f"api_key_env: the environment has no variable {spec.api_key_env}; set it to the key")
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError(f"api_key_env: {spec.api_key_env} holds a character that no key has, as a line break")
        self._endpoint = Endpoint(url=spec.url.rstrip("/"), api_key=key, retries=spec.retries)
        self._spec, self._tokenizer = spec, tokenizer
        self._format = TurnFormat(tokenizer, spec.role)

    def check(self) -> None:
        """Raise ConfigError where the server cannot be reached or speaks another protocol."""
        try:
            answer = self._endpoint.post("/check", {"protocol": PROTOCOL}, _CHECK_SECONDS)
        except EnvironmentFailure as failure:
            raise ConfigError(f"url: {failure}; start the environment, or correct the url") from None
        if answer.get("protocol") != PROTOCOL:
            raise ConfigError(
                f"url: {self._endpoint.url} speaks protocol {answer.get('protocol')!r}, this program {PROTOCOL}"
            )

    def reset(self, episode: str, prompt: Prompt, sample: int, seed: int, seconds: float) -> Observation:
        body = {
            "protocol": PROTOCOL,
            "episode": episode,
            "prompt_id": prompt.id,
            "sample": sample,
            "seed": seed,
            "record": dict(prompt.record),
            **self._as_sent("prompt", prompt.token_ids),
        }
        answer = self._endpoint.post("/reset", body, seconds)
        return self._observation("/reset", answer, prompt.token_ids)

    def step(self, episode: str, turn: Turn, seconds: float) -> Observation:
        body = {
            "protocol": PROTOCOL,
            "episode": episode,
            "turn": turn.number,
            "room": turn.room,
            **self._as_sent("response", turn.token_ids),
        }
        return self._observation("/step", self._endpoint.post("/step", body, seconds), turn.token_ids)

    def close(self, episode: str) -> None:
        with suppress(EnvironmentFailure):  # the server ends what it has not heard of for a while
            self._endpoint.post("/close", {"protocol": PROTOCOL, "episode": episode}, _CLOSE_SECONDS)

    def _as_sent(self, name: str, token_ids: IntArray) -> dict[str, Any]:
        if self._spec.send == "token_ids":
            return {f"{name}_ids": token_ids.tolist()}
        return {name: self._tokenizer.decode(token_ids)}

    def _observation(self, path: str, answer: dict[str, Any], before: IntArray) -> Observation:
        """Read an answer. Raises EnvironmentFailure for one that is not of the protocol."""
        done, reward = answer.get("done", False), answer.get("reward")
        if not isinstance(done, bool):
            raise self._wrong(path, "done must be true or false")
        number = isinstance(reward, int | float) and not isinstance(reward, bool)
        if reward is not None and not (number and 0 <= reward <= 1):
            raise self._wrong(path, "reward must be a number from 0 to 1, or null")
        text, ids = answer.get("observation"), answer.get("observation_ids")
        if text is not None and ids is not None:
            raise self._wrong(path, "observation and observation_ids are both there")
        score = None if reward is None else float(reward)
        if done and path == "/reset":
            raise self._wrong(path, "the episode is done before the first turn")
        if done:
            return Observation(done=True, reward=score)
        if ids is not None:
            return Observation(token_ids=self._own_ids(path, ids), reward=score, calls=int(path == "/step"))
        if path == "/reset":
            if text is not None:
                raise self._wrong(path, "an observation before the first turn must be observation_ids")
            return Observation()
        if not isinstance(text, str):
            raise self._wrong(path, "observation must be a text, as the episode is not done")
        follow = self._format.follow(before, [text], self._spec.max_result_tokens)
        return Observation(token_ids=follow, reward=score, calls=1)

    def _own_ids(self, path: str, ids: Any) -> IntArray:
        limit = self._tokenizer.vocab_size
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < limit for i in ids):
            raise self._wrong(path, f"observation_ids must be a list of token ids below {limit}")
        if not ids and path == "/step":
            raise self._wrong(path, "observation_ids is empty, and the episode is not done")
        return np.array(ids, np.int64)

    def _wrong(self, path: str, what: str) -> EnvironmentFailure:
        return EnvironmentFailure("bad_answer", f"{self._endpoint.url}{path}: {what}")

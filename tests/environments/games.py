"""The other side of a game: an engine that says what it is told to and notes what it saw, and such an environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from megatron_mopd.config import DomainSpec, SourceSpec
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.environments.play import play
from megatron_mopd.environments.protocol import EnvironmentFailure, Failure, Observation, Turn
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import IntArray, Prompt, Rollout

MODEL = Path(__file__).parents[2] / "configs" / "tiny" / "model"
TOKENIZER = Tokenizer.load(MODEL)
STOP = TOKENIZER.eos_id
PLAIN = Sampling(temperature=1.0)
EXPERTS = (2, 3)
"""MoE layers, experts per token."""


def python_spec(**options: object) -> EnvironmentSpec:
    """A tool whose calls are the code between [ and ]: one token each."""
    return EnvironmentSpec(**{"kind": "python", "role": "user", "open": "[", "close": "]", "call": "code"} | options)  # type: ignore[arg-type]


def domain(environment: EnvironmentSpec | None, **options: object) -> DomainSpec:
    given = {"source": SourceSpec(jsonl="unused"), "verifier": "none", "environment": environment} | options
    return DomainSpec(**given)  # type: ignore[arg-type]


def prompt(number: int, *, name: str = "tool", room: int = 60) -> Prompt:
    ids = TOKENIZER.render([{"role": "user", "content": f"question {number}"}])
    return Prompt(id=f"{name}/{number}", domain=name, token_ids=ids, answer="", max_response_tokens=room)


@dataclass
class Asked:
    """One row of one batch that an engine was given."""

    call: int
    prompt: Prompt
    seed: int
    rollout: Rollout


class Recorder:
    """`RolloutEngine` that answers with `script(prompt, sample)`; a text, then the stop token if there is room."""

    def __init__(self, script: Callable[[Prompt, int], str], *, experts: bool = False) -> None:
        self._script, self._experts = script, experts
        self.calls, self.asked = 0, list[Asked]()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    def rest(self) -> None: ...

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        rollouts = []
        for asked in prompts:
            for sample in range(samples):
                rollout = self._answer(asked, sample)
                self.asked.append(Asked(self.calls, asked, seed, rollout))
                rollouts.append(rollout)
        self.calls += 1
        return rollouts

    def _answer(self, asked: Prompt, sample: int) -> Rollout:
        text = TOKENIZER.encode(self._script(asked, sample))
        answer = np.append(text, STOP)[: asked.max_response_tokens]
        before = len(asked.token_ids)
        total = before + len(answer)
        logprobs = np.where(np.arange(total) < before, 0, -(np.arange(total) + 1 + 1000 * self.calls) / 1024)
        rows = np.arange(total)[:, None, None] + 100 * self.calls + np.zeros((1, *EXPERTS), np.int64)
        rows[-1] = -1  # never an input
        return Rollout(
            prompt=asked,
            sample=sample,
            token_ids=np.concatenate((asked.token_ids, answer)),
            loss_mask=np.arange(total) >= before,
            rollout_logprobs=logprobs.astype(np.float32),
            policy_version=self.calls,
            finish_reason="stop" if answer[-1] == STOP else "length",
            routed_experts=rows.astype(np.int16) if self._experts else None,
        )

    @property
    def identities(self) -> list[str]:
        return [asked.prompt.id for asked in self.asked]


@dataclass
class Scripted:
    """`Environment` that says `say(turn)`; notes who began, stepped and was closed."""

    say: Callable[[Turn], Observation]
    first: Callable[[Prompt, int], Observation] = lambda prompt, sample: Observation()
    begun: list[str] = field(default_factory=list)
    stepped: list[tuple[str, int]] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    allowed: list[float] = field(default_factory=list)
    """Seconds that each step was given."""

    def reset(self, episode: str, prompt: Prompt, sample: int, seed: int, seconds: float) -> Observation:
        self.begun.append(episode)
        return self.first(prompt, sample)

    def step(self, episode: str, turn: Turn, seconds: float) -> Observation:
        self.stepped.append((episode, turn.number))
        self.allowed.append(seconds)
        return self.say(turn)

    def close(self, episode: str) -> None:
        self.closed.append(episode)


def tokens(text: str) -> IntArray:
    return TOKENIZER.encode(text)


def said(text: str, **options: object) -> Observation:
    return Observation(token_ids=tokens(text), **options)  # type: ignore[arg-type]


def failing(reason: Failure) -> Observation:
    raise EnvironmentFailure(reason, "on purpose")


def waiting(seconds: float, then: Observation) -> Observation:
    time.sleep(seconds)
    return then


def play_alone(
    engine: Recorder,
    prompts: Sequence[Prompt],
    environment: object,
    spec: EnvironmentSpec,
    *,
    samples: int = 1,
    seed: int = 5,
) -> list[Rollout]:
    """One rank's episodes in the domain `tool`; the domain `plain` has no environment."""
    domains = {"tool": domain(spec), "plain": domain(None)}
    return play(
        engine,
        prompts,
        domains,
        lambda wanted: environment,  # type: ignore[arg-type,return-value]
        lambda flag: flag,
        samples=samples,
        sampling=PLAIN,
        seed=seed,
    )

"""What a step trains on: groups, dynamic sampling, metrics of rollouts; scripted answers stand for a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_mopd.config import (
    DomainSpec,
    ModelSpec,
    ObjectiveSpec,
    OptimSpec,
    RolloutSpec,
    RunConfig,
    SourceSpec,
)
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.parallel.runtime import Axis, World
from megatron_mopd.rollout.collect import Collector, rollout_metrics
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import Prompt, Rollout

MODEL = Path(__file__).parents[2] / "configs" / "tiny" / "model"
ALONE = Axis(size=1, rank=0, group=None)  # type: ignore[arg-type]
WORLD = World(
    size=1, rank=0, device=torch.device("cpu"), tensor=ALONE, pipeline=ALONE, context=ALONE, data=ALONE, expert=ALONE
)


class Scripted:
    """Right answers for the samples below `right(prompt number)`, wrong ones for the rest."""

    def __init__(self, tokenizer: Tokenizer, right: Sequence[int], wrong: Callable[[str], str] = lambda answer: "~"):
        self._tokenizer, self._right, self._wrong = tokenizer, right, wrong
        self.prompts, self.seeds = 0, list[int]()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    def rest(self) -> None: ...

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        self.seeds.append(seed)
        rollouts = []
        for prompt in prompts:
            right = self._right[self.prompts % len(self._right)]
            self.prompts += 1
            for sample in range(samples):
                answer = self._tokenizer.encode(prompt.answer if sample < right else self._wrong(prompt.answer))
                mask = np.arange(len(prompt.token_ids) + len(answer)) >= len(prompt.token_ids)
                rollouts.append(
                    Rollout(
                        prompt=prompt,
                        sample=sample,
                        token_ids=np.concatenate([prompt.token_ids, answer]),
                        loss_mask=mask,
                        rollout_logprobs=np.zeros(len(mask), np.float32),
                        policy_version=0,
                        finish_reason="length" if sample >= right else "stop",
                    )
                )
        return rollouts


def config(**objective: object) -> RunConfig:
    source = SourceSpec(reasoning_gym="spell_backward", params={"min_word_len": 3, "max_word_len": 6})
    return RunConfig(
        run_dir="unused",
        stage="rl",
        steps=1,
        prompts_per_step=4,
        model=ModelSpec(hf_config=str(MODEL)),
        domains={"words": DomainSpec(source=source, max_response_tokens=8, verifier="exact")},
        objective=ObjectiveSpec(kind="grpo", **objective),  # type: ignore[arg-type]
        optim=OptimSpec(lr=1e-3),
        rollout=RolloutSpec(samples_per_prompt=4),
    )


def collect(run: RunConfig, right: Sequence[int]) -> tuple[list[Rollout], Scripted]:
    tokenizer = Tokenizer.load(MODEL)
    engine = Scripted(tokenizer, right)
    return Collector(run, DomainMixer(run, tokenizer), engine, tokenizer, WORLD).collect(step=5), engine


def test_advantages_are_normalised_within_the_samples_of_a_prompt() -> None:
    rollouts, _ = collect(config(), right=[1, 4, 0, 2])
    rewards = np.array([r.reward for r in rollouts]).reshape(4, 4)
    assert rewards.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    advantages = np.array([r.outcome_advantage for r in rollouts]).reshape(4, 4)
    std = 0.1875**0.5
    np.testing.assert_allclose(advantages[0], np.array([0.75, -0.25, -0.25, -0.25]) / std, rtol=1e-5)
    assert advantages[1].tolist() == advantages[2].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(advantages[3], [1, 1, -1, -1], rtol=1e-5)


def test_mix_rl_has_the_ratio_in_every_batch_and_each_domain_its_own_verifier() -> None:
    run, tokenizer = config(), Tokenizer.load(MODEL)
    words, numbers = run.domains["words"], SourceSpec(reasoning_gym="gcd", params={"max_value": 99})
    domains = {
        "words": dataclasses.replace(words, weight=3.0),
        "numbers": DomainSpec(source=numbers, max_response_tokens=8, verifier="math", weight=1.0),
    }
    run = dataclasses.replace(run, domains=domains)
    # Every group: its reference answer, and the same number written differently, which only math-verify takes.
    engine = Scripted(tokenizer, [2], wrong=lambda answer: f"{answer}.0")
    collector = Collector(run, DomainMixer(run, tokenizer), engine, tokenizer, WORLD)
    for step in range(2):
        rollouts = collector.collect(step)
        assert [r.domain for r in rollouts if r.sample == 0] == ["words", "words", "numbers", "words"]
        rewards = {name: {r.reward for r in rollouts if r.domain == name and r.sample >= 2} for name in domains}
        assert rewards == {"words": {0.0}, "numbers": {1.0}}


def test_dynamic_sampling_replaces_groups_without_signal() -> None:
    rollouts, engine = collect(config(dynamic_sampling=True), right=[4, 1, 0, 2])
    # Two of every four prompts have a signal: 4 prompts, then 2, then 1 ... until there are 4 groups.
    assert len(rollouts) == 16
    assert all(r.outcome_advantage != 0 for r in rollouts)
    assert len({r.prompt.id for r in rollouts}) == 4
    assert engine.prompts == 4 + 2 + 1 + 1
    assert len(set(engine.seeds)) == len(engine.seeds)


def test_generated_tokens_count_what_was_dropped() -> None:
    run, tokenizer = config(dynamic_sampling=True), Tokenizer.load(MODEL)
    collector = Collector(run, DomainMixer(run, tokenizer), Scripted(tokenizer, [4]), tokenizer, WORLD)
    words = [len(tokenizer.encode(prompt.answer)) for prompt in DomainMixer(run, tokenizer).draw(16)]
    kept = collector.collect(step=0)
    # All answers are right, so no group has a signal: four rounds of four prompts with four samples each.
    assert len(kept) == 16
    assert collector.generated_tokens == 4 * sum(words)


def test_dynamic_sampling_gives_up_with_what_it_has() -> None:
    rollouts, engine = collect(config(dynamic_sampling=True, max_sampling_rounds=2), right=[4, 1, 0, 0, 0, 4, 0])
    assert [r.prompt.id for r in rollouts] == [rollouts[0].prompt.id] * 4
    assert engine.prompts == 4 + 3


def test_dynamic_sampling_without_any_signal_still_has_a_batch() -> None:
    rollouts, engine = collect(config(dynamic_sampling=True, max_sampling_rounds=3), right=[4])
    assert engine.prompts == 12
    assert len(rollouts) == 16
    assert all(r.outcome_advantage == 0 for r in rollouts)


def test_metrics_by_hand() -> None:
    rollouts, _ = collect(config(), right=[1, 4, 0, 2])
    metrics = rollout_metrics(rollouts, ["words", "absent"])
    assert metrics["rollouts"] == 16
    assert metrics["reward/words"] == metrics["reward"] == pytest.approx(7 / 16)
    assert metrics["truncation_rate/words"] == pytest.approx(9 / 16)
    assert metrics["prompt_share/words"] == 1.0
    assert metrics["prompt_share/absent"] == 0.0
    assert metrics["response_tokens"] == pytest.approx(np.mean([r.loss_mask.sum() for r in rollouts]))
    assert metrics["repetition_rate"] == 0.0
    stuck = dataclasses.replace(
        rollouts[0],
        token_ids=np.full(400, 7),
        loss_mask=np.arange(400) > 0,
        rollout_logprobs=np.zeros(400, np.float32),
    )
    assert rollout_metrics([stuck, rollouts[1]], ["words"])["repetition_rate/words"] == 0.5

"""A step's rollouts: drawn, sampled, verified, and shared, so that every rank ends up with the same list."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_mopd.config import DomainSpec, RunConfig
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.domains.verifiers import group_advantages, verify
from megatron_mopd.environments.metrics import episode_means
from megatron_mopd.environments.opening import Environments
from megatron_mopd.environments.play import play
from megatron_mopd.parallel.runtime import World
from megatron_mopd.rollout.ahead import Ahead
from megatron_mopd.rollout.engine import RolloutEngine, Sampling
from megatron_mopd.rollout.stored_answers import StoredAnswers
from megatron_mopd.routing_exchange import without_experts
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import Prompt, Rollout
from megatron_mopd.yaml_config import ConfigError

REPETITIVE = 10.0
"""A response is called repetitive when zlib makes its token ids this many times smaller."""


class Collector:
    """Collects rollouts with the whole world as samplers: rank r takes every world-size-th prompt."""

    def __init__(
        self,
        config: RunConfig,
        mixer: DomainMixer,
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        world: World,
        ahead: Ahead | None = None,
    ):
        """Rollouts of `StoredAnswers` keep the reward that they come with. ahead: with `rollout.samples_ahead`."""
        self._config = config
        self._mixer = mixer
        self._engine = engine
        self._tokenizer = tokenizer
        self._world = world
        self._ahead = ahead
        self._environments = Environments(config.environments, tokenizer)
        self.rollouts: list[Rollout] = []
        """Of the step that was collected last."""
        self.sampling_metrics: dict[str, float] = {}
        """Of the last `collect`. Dynamic sampling: what was sampled, before groups without signal were left out;
        `rollout.lag`: how old the rollouts are."""
        self.generated_tokens = 0
        """Sampled in the last `collect`, also for rollouts that were left out; 0 where answers are only looked up."""

    def collect(self, step: int) -> list[Rollout]:
        """The rollouts of `step`: what they are depends on (seed, step) and the weights, not on the layout."""
        return [rollout for wave in self.waves(step) for rollout in wave]

    def waves(self, step: int) -> Iterator[list[Rollout]]:
        """The same in parts, each as soon as it is there: one part, unless `rollout.waves` says more. What this object
        tells of the step it knows after the last one."""
        self.rollouts = []
        for wave in self._ahead_of(self._ahead, step) if self._ahead is not None else [self._on_policy(step)]:
            self.rollouts += wave
            yield wave

    def _on_policy(self, step: int) -> list[Rollout]:
        config = self._config
        rounds = config.objective.max_sampling_rounds if config.objective.dynamic_sampling else 1
        kept: list[Rollout] = []
        sampled: list[Rollout] = []
        for attempt in range(rounds):
            missing = config.prompts_per_step - len(kept) // config.rollout.samples_per_prompt
            prompts = self._mixer.draw(missing, step)
            rollouts = self.sample(prompts, seed=config.seed * 1_000_003 + step * rounds + attempt)
            if config.needs_outcome:
                rollouts = group_advantages(rollouts, config.objective.normalise_by_std)
            sampled += rollouts
            last = attempt == rounds - 1
            kept += rollouts if rounds == 1 or (last and not kept) else _with_signal(rollouts)
            if len(kept) >= config.prompts_per_step * config.rollout.samples_per_prompt:
                break
        self._engine.rest()
        if config.generates:
            self.generated_tokens = sum(int(rollout.loss_mask.sum()) for rollout in sampled)
        if rounds > 1:
            names = config.domain_names
            self.sampling_metrics = {
                f"sampled_{k}": v for k, v in rollout_metrics(sampled, names).items() if "reward" in k
            }
            self.sampling_metrics["dropped_rollouts"] = float(len(sampled) - len(kept))
        return kept

    def _ahead_of(self, ahead: Ahead, step: int) -> Iterator[list[Rollout]]:
        for prompts, own in ahead.collect(step):
            known = {prompt.id: prompt for prompt in prompts}
            own = [replace(rollout, prompt=known[rollout.prompt.id]) for rollout in own]
            rollouts = self._judge(own, prompts, self._config.domains)
            if self._config.needs_outcome:
                rollouts = group_advantages(rollouts, self._config.objective.normalise_by_std)
            yield rollouts
        ahead.check(self.rollouts, step)
        self._engine.rest()
        self.generated_tokens = sum(int(rollout.loss_mask.sum()) for rollout in self.rollouts)
        self.sampling_metrics = ahead.metrics

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        samples: int | None = None,
        sampling: Sampling | None = None,
        domains: Mapping[str, DomainSpec] | None = None,
    ) -> list[Rollout]:
        """Verified rollouts of `prompts`, in their order, on every rank. Collective.

        `domains` says how to verify prompts that are of none of the configuration's domains.
        """
        spec = self._config.rollout
        sampling = sampling or Sampling(temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k)
        own = range(self._world.rank, len(prompts), self._world.size)
        rollouts = play(
            self._engine,
            [prompts[index] for index in own],
            domains or self._config.domains,
            self._environments.find,
            self._world.any,
            samples=samples or spec.samples_per_prompt,
            sampling=sampling,
            seed=seed,
        )
        if isinstance(self._engine, StoredAnswers):
            return _share(rollouts, None, prompts, self._world)
        return self._judge(rollouts, prompts, domains or self._config.domains)

    def _judge(
        self, own: Sequence[Rollout], prompts: Sequence[Prompt], domains: Mapping[str, DomainSpec]
    ) -> list[Rollout]:
        """All ranks' rollouts with their rewards, in the order of `prompts`. Collective."""
        try:
            rollouts, problem = verify(own, domains, self._tokenizer), None
        except ConfigError as error:  # of one rank's prompt: the others must hear of it, not wait for it
            rollouts, problem = [], str(error)
        return _share(rollouts, problem, prompts, self._world)


def _share(own: Sequence[Rollout], problem: str | None, prompts: Sequence[Prompt], world: World) -> list[Rollout]:
    """All ranks' rollouts in prompt order, or the first rank's problem as a ConfigError on all of them.

    Prompts are on every rank already and do not travel; routed experts stay where they are (`routing_exchange.py`).
    """
    if world.size == 1 and problem is None:
        return list(own)
    place = {prompt.id: index for index, prompt in enumerate(prompts)}
    stripped = [(place[r.prompt.id], replace(without_experts(r, world.rank), prompt=_NOWHERE)) for r in own]
    gathered = world.all_gather_objects((problem, stripped))
    for message, _ in gathered:
        if message is not None:
            raise ConfigError(message)
    pairs = [pair for _, part in gathered for pair in part]
    pairs.sort(key=lambda pair: (pair[0], pair[1].sample))
    held = {(r.prompt.id, r.sample): r.routed_experts for r in own}
    return [
        replace(rollout, prompt=prompts[index], routed_experts=held.get((prompts[index].id, rollout.sample)))
        for index, rollout in pairs
    ]


_NOWHERE = Prompt(id="", domain="", token_ids=np.zeros(0, np.int64), answer="", max_response_tokens=0)


def _with_signal(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Groups whose rewards differ: only they give GRPO a gradient (DAPO's dynamic sampling)."""
    informative = {r.prompt.id for r in rollouts if r.outcome_advantage != 0}
    return [r for r in rollouts if r.prompt.id in informative]


def rollout_metrics(rollouts: Sequence[Rollout], domain_names: Sequence[str]) -> dict[str, float]:
    """What a step's rollouts look like, per domain and over all: '<metric>[/<domain>]' -> mean."""
    groups: Mapping[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.domain].append(rollout)
    report: dict[str, float] = {"rollouts": float(len(rollouts))}
    for name in domain_names:
        report |= {f"{metric}/{name}": value for metric, value in _means(groups.get(name, [])).items()}
        report[f"prompt_share/{name}"] = len(groups.get(name, [])) / max(1, len(rollouts))
    return report | _means(rollouts)


def _means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    if not rollouts:
        return {}
    return {
        "reward": float(np.mean([r.reward for r in rollouts])),
        "response_tokens": float(np.mean([r.loss_mask.sum() for r in rollouts])),
        "truncation_rate": float(np.mean([r.finish_reason == "length" for r in rollouts])),
        "repetition_rate": float(np.mean([_is_repetitive(r) for r in rollouts])),
        **episode_means(rollouts),
    }


def _is_repetitive(rollout: Rollout) -> bool:
    data = rollout.response_ids.astype(np.int32).tobytes()
    return len(data) > REPETITIVE * len(zlib.compress(data, 1))

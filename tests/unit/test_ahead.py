"""What is answered ahead and what a step takes of it: order, seeds, age, resume, and no bias towards short answers.

Servers are a clock here: a prompt's answer takes as many ticks as it has tokens, whatever else is under way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import pytest

from megatron_mopd.config import ObjectiveSpec, RolloutSpec, RunConfig, SglangSpec, TeacherSpec
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.rollout.ahead import Ahead, Ticket, choose, prompts_in_play
from megatron_mopd.rollout.sglang.flight import Choose
from megatron_mopd.rollout.staleness import check_staleness, staleness_metrics, token_versions
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import Prompt, Rollout, WeightSpan
from tests.unit.test_collect import MODEL, config

PROMPTS = 16


class Way(NamedTuple):
    lag: int
    over_sample: float = 1.0
    partial: bool = False
    waves: int = 1


WAYS = [
    Way(1),
    Way(3),
    Way(2, 1.25),
    Way(3, 1.5),
    Way(1, 1.25, True),
    Way(1, 1.5, True),
    Way(2, 1.5, True),
    Way(0, waves=4),
    Way(0, waves=PROMPTS),
    Way(1, waves=3),
]


def run_of(way: Way, steps: int, prompts: int = PROMPTS) -> RunConfig:
    rollout = RolloutSpec(
        engine="sglang", sglang=SglangSpec(urls=("http://a:1",)), samples_per_prompt=2, **way._asdict()
    )
    plain = config()
    return replace(
        plain,
        stage="mopd",
        objective=ObjectiveSpec(kind="full_vocab"),
        teachers={"t": TeacherSpec(checkpoint="unused")},
        domains={"words": replace(plain.domains["words"], teacher="t")},
        rollout=rollout,
        steps=steps,
        prompts_per_step=prompts,
        seed=3,
    )


def flat[T](lists: Sequence[Sequence[T]]) -> list[T]:
    return list(chain.from_iterable(lists))


@cache
def length_of(prompt: str) -> int:
    """Log-normal, as answers are: median 20, mean 33, one in a hundred above 200."""
    rng = np.random.default_rng(list(prompt.encode()))
    return max(1, round(20 * math.exp(rng.normal())))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL)


class Clock:
    """An engine whose answers take `length_of` ticks; `update` ticks pass while the trainer trains, and in all
    `scoring` while the teachers score a step."""

    update = 25
    scoring = 16

    def __init__(self, spec: RolloutSpec):
        self._spec = spec
        self.policy_version = 0
        self.kept_tokens = 0
        self.seeds: dict[str, int] = {}
        self._versions: dict[str, list[int]] = {}
        self._prompts: dict[str, Prompt] = {}
        self._answered: list[str] = []
        self.ticks = 0

    def begin(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> None:
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.seeds[prompt.id], self._prompts[prompt.id], self._versions[prompt.id] = seed, prompt, []

    def take(self, choose: Choose) -> tuple[list[str], list[Rollout]]:
        while (ids := choose(tuple(self._answered))) is None:
            self._tick()
        self._answered = [identity for identity in self._answered if identity not in ids]
        return list(ids), [self._rollout(identity) for identity in ids]

    def score(self, prompts: int, of: int) -> None:
        for _ in range(self.scoring * prompts // of):
            self._tick()

    def train(self, version: int) -> None:
        if not self._spec.partial:
            for _ in range(self.update):
                self._tick()
        self.policy_version = version

    def _tick(self) -> None:
        self.ticks += 1
        for identity, versions in self._versions.items():
            if len(versions) < length_of(identity):
                versions.append(self.policy_version)
                if len(versions) == length_of(identity):
                    self._answered.append(identity)

    def _rollout(self, identity: str) -> Rollout:
        prompt, versions = self._prompts.pop(identity), self._versions.pop(identity)
        before = len(prompt.token_ids)
        edges = [0, *(i for i in range(1, len(versions)) if versions[i] != versions[i - 1]), len(versions)]
        spans = tuple(
            WeightSpan(version=versions[start], start=before + start, end=before + end)
            for start, end in pairwise(edges)
        )
        return Rollout(
            prompt=prompt,
            sample=0,
            token_ids=np.concatenate([prompt.token_ids, np.full(len(versions), 7)]),
            loss_mask=np.arange(before + len(versions)) >= before,
            rollout_logprobs=np.zeros(before + len(versions), np.float32),
            policy_version=min(versions),
            finish_reason="stop",
            weight_versions=spans,
        )


class Play:
    """Steps of a run in which nothing but the rollouts is real."""

    def __init__(self, run: RunConfig, first_step: int = 0, updates: int = 1):
        self.run, self.updates = run, updates
        self.waves: list[int] = []
        """How many rollouts each wave of the last step had."""
        self.mixer = DomainMixer(run, tokenizer())
        self.engine = Clock(run.rollout)
        self.engine.policy_version = first_step * updates
        self.ahead = Ahead(run, self.mixer, self.engine, first_step)  # type: ignore[arg-type]

    def step(self, step: int) -> list[Rollout]:
        rollouts: list[Rollout] = []
        self.waves = []
        for prompts, wave in self.ahead.collect(step):
            assert [rollout.prompt.id for rollout in wave] == [prompt.id for prompt in prompts]
            rollouts += wave
            self.waves.append(len(wave))
            if self.run.rollout.waves > 1:
                self.engine.score(len(wave), self.run.prompts_per_step)
        self.ahead.check(rollouts, step)
        self.engine.train((step + 1) * self.updates)
        return rollouts


@cache
def on_policy(steps: int, prompts: int = PROMPTS) -> list[list[str]]:
    """Ids of the prompts of each step without a lag."""
    run = run_of(WAYS[0], steps, prompts)
    mixer = DomainMixer(run, tokenizer())
    return [[prompt.id for prompt in mixer.draw(prompts, step)] for step in range(steps)]


@pytest.mark.parametrize("way", WAYS)
def test_every_prompt_is_trained_on_once_with_its_own_seed_and_in_time(way: Way) -> None:
    steps = 12
    play, expected = Play(run_of(way, steps), updates=2), on_policy(steps)
    trained, oldest = [], 0.0
    for step in range(steps):
        rollouts = play.step(step)  # which checks their age
        trained.append([rollout.prompt.id for rollout in rollouts])
        metrics = play.ahead.metrics
        oldest = max(oldest, metrics["staleness_max"])
        assert metrics["staleness"] <= metrics["staleness_max"] <= way.lag * 2  # two updates a step
        assert metrics["staleness/words"] == metrics["staleness"]
        in_play = prompts_in_play(play.run.rollout, PROMPTS, steps - step)
        assert metrics["prompts_in_play"] == in_play - PROMPTS
        assert len(play.waves) <= way.waves
        assert min(play.waves[:-1], default=PROMPTS) >= math.ceil(PROMPTS / way.waves)
    assert oldest == way.lag * 2
    assert all(len(ids) == PROMPTS for ids in trained)
    assert sorted(flat(trained)) == sorted(flat(expected))
    if way.over_sample > 1:
        assert trained != expected
    elif way.waves == 1:
        assert trained == expected
    else:  # the same steps, the first answered first
        assert trained != expected
        assert [sorted(ids) for ids in trained] == [sorted(ids) for ids in expected]
    seeds = {identity: 3 * 1_000_003 + step for step, ids in enumerate(expected) for identity in ids}
    assert play.engine.seeds == seeds


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lost", [0, 3])
def test_a_resume_draws_again_what_was_in_play_and_nothing_twice(way: Way, lost: int) -> None:
    """Saved after five steps, killed `lost` steps later."""
    steps, saved = 12, 5
    before = Play(run_of(way, steps))
    trained = [[rollout.prompt.id for rollout in before.step(step)] for step in range(saved)]
    state = json.loads(json.dumps(before.ahead.state_dict()))
    assert (state["trained"] == []) == (way.over_sample == 1)
    for step in range(saved, saved + lost):
        before.step(step)

    after = Play(run_of(way, steps), first_step=saved)
    after.mixer.load_state_dict(state["cursors"])
    after.ahead.load_state_dict(state)
    assert json.loads(json.dumps(after.ahead.state_dict())) == state
    trained += [[rollout.prompt.id for rollout in after.step(step)] for step in range(saved, steps)]
    assert all(len(ids) == PROMPTS for ids in trained)
    assert sorted(flat(trained)) == sorted(flat(on_policy(steps)))
    expected = {i: 3 * 1_000_003 + step for step, ids in enumerate(on_policy(steps)) for i in ids}
    assert after.engine.seeds.items() <= expected.items()


@pytest.mark.parametrize("way", [way for way in WAYS if way.over_sample > 1])
def test_early_stops_do_not_favour_short_answers_and_save_time(way: Way) -> None:
    """Mean length over 120 of 140 steps against that of the prompts as they come, and against dropping what is late."""
    steps, prompts = 140, 32
    counted = 120
    play, order = Play(run_of(way, steps, prompts)), on_policy(steps, prompts)
    drawn = [length_of(identity) for ids in order[:counted] for identity in ids]
    got = [[length_of(rollout.prompt.id) for rollout in play.step(step)] for step in range(counted)]
    mean, expected = np.mean(flat(got)), np.mean(drawn)
    error = np.std(drawn) / len(drawn) ** 0.5

    stream = iter(flat(order))
    begun = math.ceil(way.over_sample * prompts)
    dropping = [sorted(length_of(next(stream)) for _ in range(begun))[:prompts] for _ in range(60)]
    # Ticks of a run in which every step waits for its longest answer, and nothing else goes on:
    update = 0 if way.partial else Clock.update
    waiting = sum(max(length_of(identity) for identity in ids) + update for ids in order[:counted])
    saved = 1 - play.engine.ticks / waiting
    print(f"{way}: {mean:.2f}, as drawn {expected:.2f} +- {error:.2f}, dropping {np.mean(dropping):.2f}; -{saved:.0%}")
    assert abs(mean - expected) < 2 * error
    assert np.mean(dropping) < expected - 10 * error
    assert saved > 0.1


def ticket(number: int, begun: int) -> Ticket:
    prompt = Prompt(id=str(number), domain="a", token_ids=np.array([1]), answer="", max_response_tokens=1)
    return Ticket(prompt=prompt, batch=0, begun=begun)


def test_what_a_step_takes_by_hand() -> None:
    spec = run_of(Way(2, 1.5), 9, 4).rollout
    old = [ticket(n, begun) for n, begun in enumerate([1, 2, 2, 2, 2, 2, 3, 3, 3, 3])]
    # In step 3 prompt 0 is due. Step 4 has room for four of the five that are due then: one of them has to come now.
    assert choose(old, ["6", "7", "8", "9"], 3, spec, 4, 4) is None
    assert choose(old, ["6", "7", "0", "8", "9"], 3, spec, 4, 4) is None
    assert choose(old, ["6", "7", "0", "8", "9", "3"], 3, spec, 4, 4) == ["0", "3", "6", "7"]
    assert choose(old, ["3", "4", "5", "0"], 3, spec, 4, 4) == ["0", "3", "4", "5"]
    ordered = run_of(Way(1), 9, 4).rollout
    assert choose(old, ["9", "8", "0", "1", "2"], 3, ordered, 4, 4) is None
    assert choose(old, ["9", "3", "2", "1", "0"], 3, ordered, 4, 4) == ["0", "1", "2", "3"]
    waves = run_of(Way(0, waves=2), 9, 4).rollout
    assert choose(old, ["9", "8", "3"], 3, waves, 4, 4) is None
    assert choose(old, ["9", "8", "3", "1"], 3, waves, 4, 4) == ["1", "3"]
    assert choose(old, ["3", "1", "2"], 3, waves, 4, 4) == ["1", "2", "3"]  # all that are there, not half of them
    assert choose(old[:1] + old[4:], ["9"], 3, waves, 4, 1) is None
    assert choose(old[:1] + old[4:], ["9", "0"], 3, waves, 4, 1) == ["0"]


def test_waves_score_while_the_long_answers_go_on() -> None:
    """A step with W waves waits for its longest answer and the last wave's scores, not for that and all scores."""
    steps = 20
    ticks, waves = {}, []
    for count in (1, 4):
        play = Play(run_of(Way(0, waves=count), steps))
        for step in range(steps):
            play.step(step)
            if count == 1:
                play.engine.ticks += Clock.scoring  # after all answers
            waves.append(len(play.waves))
        ticks[count] = play.engine.ticks
    longest = sum(max(length_of(identity) for identity in ids) for ids in on_policy(steps))
    print(
        f"ticks {ticks}, longest answers and updates {longest + steps * Clock.update}, waves {np.mean(waves[steps:])}"
    )
    assert ticks[1] == longest + steps * (Clock.update + Clock.scoring)
    assert longest + steps * Clock.update < ticks[4] < ticks[1] - steps * Clock.scoring * 0.6


def with_spans(spans: Sequence[tuple[int, int]], domain: str = "a") -> Rollout:
    """spans: (version, tokens)."""
    length = sum(count for _, count in spans)
    prompt = Prompt(id=f"{domain}/0", domain=domain, token_ids=np.array([1, 2]), answer="", max_response_tokens=99)
    edges = np.cumsum([2, *(count for _, count in spans)]).tolist()
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=np.arange(length + 2),
        loss_mask=np.arange(length + 2) >= 2,
        rollout_logprobs=np.zeros(length + 2, np.float32),
        policy_version=min(version for version, _ in spans),
        finish_reason="stop",
        weight_versions=tuple(
            WeightSpan(version=version, start=start, end=end)
            for (version, _), start, end in zip(spans, edges[:-1], edges[1:], strict=True)
        )
        if len(spans) > 1
        else (),
    )


def test_staleness_is_counted_token_by_token() -> None:
    mixed, fresh = with_spans([(4, 3), (6, 1)]), with_spans([(6, 2)], "b")
    assert token_versions(mixed).tolist() == [4, 4, 4, 6]
    metrics = staleness_metrics([mixed, fresh], 6, ["a", "b", "c"])
    assert metrics == {"staleness/a": 1.5, "staleness/b": 0.0, "staleness": 1.0, "staleness_max": 2.0}
    check_staleness([mixed, fresh], oldest=4, newest=6)


@pytest.mark.parametrize(("oldest", "newest"), [(5, 6), (4, 5)])
def test_a_token_of_other_weights_is_refused(oldest: int, newest: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens of weights 4\.\.6; this step may train on {oldest}\.\.{newest}"):
        check_staleness([with_spans([(4, 3), (6, 1)])], oldest=oldest, newest=newest)


def test_an_engine_that_breaks_the_bound_stops_the_run() -> None:
    play = Play(run_of(Way(1), 9))
    play.step(0)
    play.engine._versions = {name: [-1] * length_of(name) for name in play.engine._versions}
    play.engine._answered = list(play.engine._versions)
    with pytest.raises(ValueError, match=r"\(rollout\.lag\)"):
        play.step(1)

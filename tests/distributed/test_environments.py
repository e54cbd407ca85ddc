"""Episodes on several ranks: the same as on one, whatever games a rank has, over engines that are collective or not;
and what a real student is trained on is exactly what the engine sampled, after what it saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.parallel import cpu
from megatron_mopd.rollout.collect import Collector
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.student.random_init import write_random_model
from megatron_mopd.types import MicroBatch, Prompt, Rollout
from megatron_mopd.yaml_config import build
from tests.comparison import small_model
from tests.distributed.ranks import RankError, run_ranks
from tests.e2e.conftest import run_tree
from tests.environments.agent_server import serving
from tests.environments.games import MODEL, PLAIN, TOKENIZER, Recorder, tokens

cpu.install()

from megatron_mopd.parallel.runtime import Axis, World  # noqa: E402
from megatron_mopd.run import Run  # noqa: E402

ALONE = Axis(size=1, rank=0, group=None)  # type: ignore[arg-type]
Context = tuple[tuple[int, ...], int]
"""(everything before a token, the token)"""


class Together:
    """A collective engine, as SGLang's: the first rank answers for all. Raises where ranks are at different batches."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.calls, self.empty, self._recorder = 0, 0, Recorder(lambda asked, sample: f"{asked.id}#{sample}")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    def rest(self) -> None: ...

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        asked = self._world.all_gather_objects((self.calls, samples, seed, list(prompts)))
        assert {row[:3] for row in asked} == {(self.calls, samples, seed)}
        self.calls += 1
        self.empty += not prompts
        parts = None
        if self._world.is_main:
            flat = [prompt for row in asked for prompt in row[3]]
            answers = iter(self._recorder.generate(flat, samples=samples, sampling=sampling, seed=seed))
            parts = [[next(answers) for _ in range(len(row[3]) * samples)] for row in asked]
        return list(self._world.scatter_objects(parts))


def game(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Prompt number n is a game of n + 1 turns; every third begins with a word of the server's."""
    if path == "/reset":
        number = int(body["prompt_id"].rpartition("/")[2])
        return {"observation_ids": tokens("listen. ").tolist()} if number % 3 == 2 else {}
    number = int(body["episode"].partition("#")[0].rpartition("/")[2])
    done = {"done": True, "reward": (number + 1) / 8}
    return done if body.get("turn") == number else {"observation": f"turn {body.get('turn')}"}


def game_config(url: str) -> RunConfig:
    source = {"reasoning_gym": "chain_sum"}
    environment = {"kind": "http", "url": url, "role": "user"}
    return build(
        RunConfig,
        {
            "run_dir": "unused",
            "stage": "rl",
            "steps": 1,
            "prompts_per_step": 1,
            "model": {"hf_config": str(MODEL)},
            "objective": {"kind": "grpo"},
            "rollout": {"samples_per_prompt": 2},
            "optim": {"lr": 1e-3},
            "domains": {
                "tool": {"source": source, "verifier": "environment", "environment": environment},
                "plain": {"source": source, "verifier": "exact"},
            },
        },
    )


def asked_of(names: Sequence[str]) -> list[Prompt]:
    """One prompt for each, numbered within its domain; the right answer to plain ones is that of their sample 1."""
    seen: Counter[str] = Counter()
    prompts = []
    for name in names:
        number = seen[name]
        seen[name] += 1
        ids = TOKENIZER.render([{"role": "user", "content": f"{name} {number}"}])
        identity = f"{name}/{number}"
        prompts.append(Prompt(id=identity, domain=name, token_ids=ids, answer=f"{identity}#1", max_response_tokens=200))
    return prompts


def _sample(config: RunConfig, mixer: DomainMixer, names: Sequence[str]) -> tuple[list[Rollout], int, int]:
    world = World(
        size=dist.get_world_size(),
        rank=dist.get_rank(),
        device=torch.device("cpu"),
        tensor=ALONE,
        pipeline=ALONE,
        context=ALONE,
        data=ALONE,
        expert=ALONE,
    )
    engine = Together(world)
    collector = Collector(config, mixer, engine, TOKENIZER, world)
    rollouts = collector.sample(asked_of(names), seed=3, samples=2, sampling=PLAIN)
    return rollouts, engine.calls, engine.empty


def facts(rollout: Rollout) -> tuple[Any, ...]:
    episode = rollout.episode
    return (
        rollout.prompt.id,
        rollout.sample,
        rollout.token_ids.tolist(),
        rollout.loss_mask.tolist(),
        rollout.rollout_logprobs.tolist(),
        rollout.weight_versions,
        rollout.finish_reason,
        rollout.reward,
        None if episode is None else (episode.turns, episode.calls, episode.ended, episode.failed),
    )


MIXES = {
    "games on one rank only": ["tool", "plain"] * 4,
    "fewer prompts than ranks": ["tool"],
    "no games": ["plain"] * 5,
    "uneven": ["plain", "tool", "tool", "tool", "tool", "plain", "tool"],
}


SIZES = dict.fromkeys(MIXES, (2,)) | {"uneven": (2, 3)}


@pytest.mark.parametrize("mix", MIXES)
def test_every_rank_asks_a_collective_engine_equally_often(mix: str) -> None:
    names = MIXES[mix]
    with serving(game) as server:
        config = game_config(server.url)
        mixer = DomainMixer(config, TOKENIZER)  # made here, once: ranks are forks
        ((alone, calls, _),) = run_ranks(_sample, 1, config, mixer, names)
        for size in SIZES[mix]:
            results = run_ranks(_sample, size, config, mixer, names)
            assert [count for _, count, _ in results] == [calls] * size
            for rollouts, _, _ in results:
                assert list(map(facts, rollouts)) == list(map(facts, alone))
    games = names.count("tool")
    assert calls == 1 + (games > 2) + max(0, games - 1)  # those that begin with a word go by themselves
    for rollout in alone:
        number = int(rollout.prompt.id.rpartition("/")[2])
        if rollout.domain == "tool":
            assert rollout.episode is not None
            assert (rollout.episode.turns, rollout.episode.ended) == (number + 1, "answered")
            assert rollout.reward == (number + 1) / 8
        else:
            assert rollout.episode is None
            assert rollout.reward == float(rollout.sample == 1)
    if mix == "games on one rank only":
        assert results[1][2] > 0  # a rank without a game took part with empty batches


def test_ranks_that_do_not_agree_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "any", lambda self, flag: flag)
    with serving(game) as server:
        config = game_config(server.url)
        with pytest.raises(RankError):
            run_ranks(_sample, 2, config, DomainMixer(config, TOKENIZER), MIXES["games on one rank only"], timeout=30)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small_model(folder / "model")
    for seed, name in enumerate(("student", "a", "b", "c")):
        write_random_model(folder / name, folder / "model", seed)
    return folder


def tool_run(models: Path, run_dir: Path, ranks: int) -> dict:
    """The run of tests/e2e; in domain `a`, what ends a turn is taken for a call: `end` between <| and |>."""
    tree = run_tree(models, run_dir) | {
        "parallel": {"ranks": ranks},
        "evaluation": {"prompts": 16, "every": 0},
        "objective": {"kind": "sampled"},
        # With a smaller eps the first step of Adam makes a whole one of a gradient that is rounding alone.
        "optim": {"lr": 1e-3, "eps": 1e-5},
        "rollout": {"samples_per_prompt": 2},
    }
    tree["domains"]["a"] |= {
        "max_response_tokens": 120,
        "weight": 2.0,
        "environment": {
            "kind": "python",
            "open": "<|",
            "close": "|>",
            "call": "code",
            "role": "user",
            "max_turns": 3,
            "max_result_tokens": 12,
            "turn_seconds": 60.0,
            "episode_seconds": 600.0,
        },
    }
    return tree


def contexts_of(batches: Sequence[MicroBatch]) -> Counter[Context]:
    """What is trained on, with what stands before it in its sequence."""
    found: Counter[Context] = Counter()
    for batch in batches:
        bounds, ids = batch.cu_seqlens.numpy(), batch.token_ids.numpy()
        for row, target in zip(batch.rows.tolist(), batch.targets.tolist(), strict=True):
            start = bounds[np.searchsorted(bounds, row, side="right") - 1]
            found[tuple(ids[start : row + 1].tolist()), target] += 1
    return found


def contexts_sampled(answers: Sequence[Rollout]) -> Counter[Context]:
    """What an engine sampled, with what it saw before."""
    return Counter(
        (tuple(answer.token_ids[:place].tolist()), int(answer.token_ids[place]))
        for answer in answers
        for place in np.flatnonzero(answer.loss_mask)
    )


def _train(config: RunConfig) -> dict[str, Any]:
    answers: list[Rollout] = []
    with Run(config) as run:
        generate = run.engine.generate

        def noting(*args: Any, **options: Any) -> list[Rollout]:
            given = generate(*args, **options)
            answers.extend(given)
            return given

        run.engine.generate = noting  # type: ignore[method-assign]
        rollouts = run.collector.collect(0)
        batches = run.updates.pack(rollouts)
        report = run.student.update(batches, run.teachers.score(batches), run.teachers.heads(), 0)
        weights = {name: tensor.clone() for name, tensor in run.student.hf_weights()}
        return {
            "rollouts": [facts(rollout) for rollout in rollouts],
            "trained": contexts_of(batches),
            "sampled": contexts_sampled(answers),
            "logprobs": sorted(float(value) for batch in batches for value in batch.rollout_logprobs),
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "weights": weights,
        }


def test_a_student_is_trained_on_what_was_sampled_and_one_rank_equals_two(models: Path, tmp_path: Path) -> None:
    one, two = (
        run_ranks(_train, ranks, build(RunConfig, tool_run(models, tmp_path / str(ranks), ranks)), init=False)
        for ranks in (1, 2)
    )
    (alone,) = one
    episodes = [rollout[-1] for rollout in alone["rollouts"] if rollout[-1] is not None]
    turns = Counter(episode[0] for episode in episodes)
    print("episodes by turns:", dict(turns), "trained tokens:", alone["trained"].total())
    assert len(episodes) == 24 and turns[2] + turns[3] >= 6
    for result in (one, two):
        trained: Counter[Context] = sum((rank["trained"] for rank in result), Counter())
        sampled: Counter[Context] = sum((rank["sampled"] for rank in result), Counter())
        assert trained == sampled
        assert trained.total() == sum(sum(rollout[3]) for rollout in alone["rollouts"])
    for rank in two:
        for ours, theirs in zip(rank["rollouts"], alone["rollouts"], strict=True):
            assert ours[:4] + ours[5:] == theirs[:4] + theirs[5:]
            np.testing.assert_allclose(ours[4], theirs[4], atol=2e-5)
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert rank["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=0, atol=1e-5, msg=name)

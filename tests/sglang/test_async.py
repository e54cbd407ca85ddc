"""Answers under way while the trainer goes on, on one real server: weights that change meanwhile, answers that are
stopped and gone on with, and whole runs that are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.metrics import read_records
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.rollout.staleness import token_versions
from megatron_mopd.types import Rollout
from megatron_mopd.yaml_config import build
from tests.distributed.ranks import run_ranks
from tests.e2e.conftest import write_run
from tests.sglang.test_run import logged, start, until
from tests.sglang.trainer_side import Trainer, prompts, response_logprobs, run_file, running, served_logprobs

SECONDS = 1500
KEY = "of-this-file"
PLAIN = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def url(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ["MOPD_SGLANG_API_KEY"] = KEY
    with running(models / "student", tmp_path_factory.mktemp("server"), KEY) as found:
        yield found
    del os.environ["MOPD_SGLANG_API_KEY"]


def config_of(models: Path, run_dir: Path, url: str, sync: dict[str, Any], **rollout: Any) -> RunConfig:
    tree = run_file(models, run_dir, urls=[url], sync=sync)
    return build(RunConfig, tree | {"rollout": tree["rollout"] | rollout})


class Views:
    """What the student says of rollouts with the weights of each version."""

    def __init__(self, trainer: Trainer, rollouts: Sequence[Rollout]):
        self._trainer, self._rollouts = trainer, rollouts
        self._logprobs: dict[int, np.ndarray] = {}

    def look(self, version: int) -> None:
        logits, _ = self._trainer.view(self._rollouts)
        self._logprobs[version] = response_logprobs(self._rollouts, logits, 1.0)

    def difference(self, version: int) -> tuple[float, int]:
        """Largest to what the server said of the tokens that it sampled with these weights, and how many they are."""
        own = np.concatenate([token_versions(rollout) for rollout in self._rollouts]) == version
        gap = np.abs(self._logprobs[version] - served_logprobs(self._rollouts))[own]
        return float(gap.max()), int(own.sum())


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def set_weights(trainer: Trainer, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            value.copy_(weights[name])


def everything(count: int) -> Any:
    return lambda answered: list(answered) if len(answered) == count else None


def begin(trainer: Trainer, asked: Sequence[Any], seed: int = 4) -> None:
    trainer.engine.begin(asked, [seed] * len(asked))


def updated_under_way(config: RunConfig) -> dict[str, Any]:
    """32 answers of up to 200 tokens, under way while the weights change."""
    trainer, asked = Trainer(config), prompts(32, 200)
    trainer.send(1)
    before = weights_of(trainer)
    found: dict[str, Any] = {}
    begin(trainer, asked)
    flight = trainer.engine._flight
    assert flight is not None
    while not flight._answered:  # the shortest: the others are on their way
        time.sleep(0.005)
    trainer.change()
    after = weights_of(trainer)
    trainer.send(2)
    found["under way after the update"] = flight._running
    ids, rollouts = trainer.engine.take(everything(32))
    found["ids"], found["asked"] = sorted(ids), sorted(prompt.id for prompt in asked)
    found["spans"] = [[(s.version, s.end - s.start) for s in rollout.weight_versions] for rollout in rollouts]
    found["versions"] = sorted({int(v) for rollout in rollouts for v in token_versions(rollout)})
    views = Views(trainer, rollouts)
    for version, weights in ((1, before), (2, after)):
        set_weights(trainer, weights)
        views.look(version)
    found["difference"] = {version: views.difference(version) for version in found["versions"]}
    fresh = trainer.engine.generate(asked, samples=1, sampling=PLAIN, seed=9)
    logits, _ = trainer.view(fresh)
    found["fresh"] = float(np.abs(response_logprobs(fresh, logits, 1.0) - served_logprobs(fresh)).max())
    found["fresh versions"] = {rollout.policy_version for rollout in fresh}
    trainer.close()
    return found


@pytest.mark.parametrize(("in_flight", "kind"), [("retract", "distributed"), ("in_place", "disk"), ("wait", "tensor")])
def test_weights_change_under_answers(in_flight: str, kind: str, models: Path, tmp_path: Path, url: str) -> None:
    sync = {"kind": kind, "in_flight": in_flight}
    config = config_of(models, tmp_path / "run", url, sync, lag=1)
    (found,) = run_ranks(updated_under_way, 1, config, init=False, timeout=SECONDS)
    print(in_flight, {key: found[key] for key in ("difference", "fresh", "under way after the update")})
    assert found["ids"] == found["asked"]
    assert found["fresh versions"] == {2}
    assert found["fresh"] < 1e-4  # no cache of older weights
    if in_flight == "wait":
        assert found["under way after the update"] == 0
        assert found["versions"] == [1]
        assert found["difference"][1][0] < 1e-4
        return
    assert found["under way after the update"] > 0
    assert found["versions"] == [1, 2]
    assert any(len(spans) == 2 for spans in found["spans"])
    assert found["difference"][1][0] < 1e-4
    assert found["difference"][2][1] > 100
    # In place, the old weights' cache stays: the tokens are of neither policy, and mu is what the server says.
    assert (found["difference"][2][0] < 1e-4) == (in_flight == "retract")


def stopped(config: RunConfig) -> dict[str, Any]:
    trainer, asked = Trainer(config), prompts(24, 120)
    engine = trainer.engine
    trainer.send(1)
    whole = {(r.prompt.id, r.sample): r for r in engine.generate(asked, samples=1, sampling=PLAIN, seed=4)}
    found: dict[str, Any] = {"tokens": [], "logprobs": [], "experts": [], "kept": []}

    def first(count: int) -> Any:
        return lambda answered: list(answered[:count]) if len(answered) >= count else None

    begin(trainer, asked)
    parts: list[Rollout] = []
    for _ in range(2):
        parts += engine.take(first(6))[1]
        found["kept"].append(engine.kept_tokens)
        begin(trainer, [])
    parts += engine.take(everything(12))[1]
    assert len(parts) == len({rollout.prompt.id for rollout in parts}) == 24
    for rollout in parts:
        same = whole[rollout.prompt.id, 0]
        assert rollout.routed_experts is not None and same.routed_experts is not None
        found["tokens"].append(rollout.token_ids.tolist() == same.token_ids.tolist())
        found["logprobs"].append(float(np.abs(rollout.rollout_logprobs - same.rollout_logprobs).max()))
        found["experts"].append(bool((np.sort(rollout.routed_experts) == np.sort(same.routed_experts)).all()))
    # And with other weights in between.
    begin(trainer, asked)
    early = engine.take(first(8))[1]
    before = weights_of(trainer)
    trainer.change()
    after = weights_of(trainer)
    trainer.send(2)
    begin(trainer, [])
    late = engine.take(everything(16))[1]
    views = Views(trainer, late)
    for version, weights in ((1, before), (2, after)):
        set_weights(trainer, weights)
        views.look(version)
    found["difference"] = {version: views.difference(version) for version in (1, 2)}
    found["early"] = {int(v) for rollout in early for v in token_versions(rollout)}
    found["mixed"] = sum(len(rollout.weight_versions) == 2 for rollout in late)
    trainer.close()
    return found


def test_an_answer_in_parts_is_the_answer_in_one(models: Path, tmp_path: Path, url: str) -> None:
    config = config_of(models, tmp_path / "run", url, {"kind": "disk"}, lag=1, over_sample=1.5, partial=True)
    (found,) = run_ranks(stopped, 1, config, init=False, timeout=SECONDS)
    print(found["kept"], max(found["logprobs"]), found["difference"], found["mixed"])
    assert min(found["kept"]) > 0
    assert all(found["tokens"])
    assert max(found["logprobs"]) < 1e-4
    assert all(found["experts"])
    assert found["early"] == {1}
    assert found["mixed"] > 0
    for version in (1, 2):
        assert found["difference"][version][0] < 1e-4
        assert found["difference"][version][1] > 0


@pytest.mark.parametrize("rollout", [{"lag": 1}, {"lag": 1, "over_sample": 1.5, "partial": True}])
def test_a_run_that_is_killed_goes_on_and_trains_on_every_prompt_once(
    rollout: dict[str, Any], models: Path, tmp_path: Path, url: str
) -> None:
    steps, run_dir = 14, tmp_path / "run"
    tree = run_file(models, run_dir, urls=[url]) | {
        "steps": steps,
        "checkpoint": {"every": 3, "keep_last": 2},
        "evaluation": {"prompts": 16, "every": 7},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "updates_per_step": 2},
    }
    tree["objective"] |= {"importance": {"kind": "tis"}}
    tree["rollout"] |= rollout
    # Of lengths so different that a step which takes the first ones has some under way.
    for domain, tokens in zip(tree["domains"].values(), (4, 16, 32), strict=True):
        domain["max_response_tokens"] = tokens
    config = write_run(tmp_path / "run.yaml", tree)

    process = start(config)
    until(process, lambda: len(logged(run_dir)) >= 8)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    process = start(config)
    output = process.communicate(timeout=SECONDS)[0].decode()
    assert process.returncode == 0, output
    assert "going on from step" in output

    records = read_records(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(steps))
    assert all(record["rollouts"] == 24 for record in records)
    assert max(record["staleness_max"] for record in records) == 2  # one step of two updates
    assert records[-1]["prompts_in_play"] == 0
    assert sum(records[-1][f"drawn/{name}"] for name in "abc") == 24 * steps
    if "partial" in rollout:
        assert any(record["kept_tokens"] > 0 for record in records)
        assert 0 < np.mean([record["staleness"] for record in records]) < 1


def test_scored_in_waves_a_step_is_what_it_is_in_one(models: Path, tmp_path: Path, url: str) -> None:
    """Two ranks, domains that weigh by tokens: which answers come first changes the packing, and nothing else."""
    records, weights = [], []
    for waves in (1, 4):
        run_dir = tmp_path / str(waves)
        tree = run_file(models, run_dir, urls=[url], sync={"kind": "disk"}) | {
            "steps": 4,
            "evaluation": {"prompts": 16, "every": 4},
            "optim": {"lr": 1e-3, "warmup_steps": 2},
            "parallel": {"ranks": 2},
        }
        tree["objective"] |= {"aggregation": "token", "domain_weights": {"kind": "token_share"}}
        tree["rollout"] |= {"waves": waves}
        for domain in tree["domains"].values():
            domain["max_response_tokens"] = 16
        process = start(write_run(tmp_path / f"{waves}.yaml", tree))
        output = process.communicate(timeout=SECONDS)[0].decode()
        assert process.returncode == 0, output
        records.append(read_records(run_dir / "metrics.jsonl"))
        weights.append(load_file(run_dir / "checkpoints" / "latest" / "model" / "model.safetensors"))
    for one, four in zip(*records, strict=True):
        assert one["tokens/generated"] == four["tokens/generated"]
        for key in ("loss", "grad_norm", "reverse_kl", "reward", "domain_factor/a", "domain_factor/b"):
            assert four[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    gaps = torch.cat([(weights[1][name] - value).abs().flatten() for name, value in weights[0].items()])
    print("weights differ by at most", gaps.max().item(), "above 1e-5:", (gaps > 1e-5).float().mean().item())
    assert (gaps > 1e-5).float().mean() < 1e-4  # AdamW takes a whole step where a gradient is nothing but rounding

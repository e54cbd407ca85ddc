"""R3 with a real server: what it says it chose is what the student replays, and brings the two policies together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mopd.config import RunConfig
from megatron_mopd.yaml_config import build
from tests.distributed.ranks import run_ranks
from tests.sglang.trainer_side import run_file

PROMPTS = 512


def measured(config: RunConfig) -> dict[str, dict[str, float]]:
    """One step's rollouts, seen by the student that sampled them: with the server's routing, and with its own."""
    from megatron_mopd.run import Run

    with Run(config) as run:
        rollouts = run.collector.collect(0)
        batches = run.updates.pack(rollouts)
        scores, heads = run.teachers.score(batches), run.teachers.heads()
        free = [replace(batch, routed_experts=None) for batch in batches]
        return {
            "replayed": dict(run.student.measure(batches, scores, heads)),
            "free": dict(run.student.measure(free, scores, heads)),
            "rollouts": {
                "last_tokens": len(rollouts) / sum(len(rollout.token_ids) for rollout in rollouts),
                "trained_tokens": float(sum(rollout.loss_mask.sum() for rollout in rollouts)),
            },
        }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_routing_is_the_servers(dtype: str, models: Path, tmp_path: Path) -> None:
    tree = run_file(models, tmp_path / "run", launch={"servers": 1}) | {
        "model": {"checkpoint": str(models / "student"), "dtype": dtype},
        "objective": {"kind": "full_vocab", "importance": {"kind": "icepop"}},
        "prompts_per_step": PROMPTS,
        "evaluation": {"prompts": 8, "every": 0},
    }
    for domain in tree["domains"].values():
        domain["max_response_tokens"] = 16
    found = run_ranks(measured, 2, build(RunConfig, tree), init=False, timeout=600)[0]
    replayed, free = found["replayed"], found["free"]
    assert found["rollouts"]["trained_tokens"] > 2000
    # Every token has its row but the last one of each rollout, which the server never read.
    assert replayed["replay_missing"] == pytest.approx(found["rollouts"]["last_tokens"], rel=1e-12)
    if dtype == "float32":
        assert replayed["replay_differs"] == 0
        assert replayed["rollout_kl_k3"] < 1e-9
        assert replayed["rollout_kl_k3"] == free["rollout_kl_k3"]
    else:
        assert 0 < replayed["replay_differs"] < 0.05
        assert 5 * replayed["rollout_kl_k3"] < free["rollout_kl_k3"]  # 15 times when it was written

"""`rollout.routing_replay: R2` in whole runs: the later updates of a step replay the routing of before the first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mopd.config import load_config
from megatron_mopd.metrics import read_records
from tests.distributed.ranks import run_ranks
from tests.e2e.conftest import run_tree, write_run


def records(models: Path, folder: Path, *, replay: str, updates: int, replace: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of two steps on two ranks."""
    from megatron_mopd.train import train

    folder.mkdir()
    tree = run_tree(models, folder / "run") | {"steps": 2, "evaluation": {"prompts": 8, "every": 0}} | replace
    tree |= {"optim": {"lr": 1e-3, "updates_per_step": updates}, "rollout": {"routing_replay": replay}}
    run_ranks(train, 2, load_config(write_run(folder / "run.yaml", tree)), init=False)
    return read_records(folder / "run" / "metrics.jsonl")


def test_r2_replays_what_the_weights_before_the_first_update_chose(models: Path, tmp_path: Path) -> None:
    found = records(models, tmp_path / "r2", replay="R2", updates=2, replace={"parallel": {"expert": 2}})
    assert len(found) == 2
    for record in found:
        assert record["replay_missing"] == 0
        # Recorded after the first update it would be 0: nothing happens between that and the second.
        assert 0 < record["replay_differs"] < 0.5
        assert record["seconds/routing"] > 0


def test_with_one_update_a_step_r2_is_off(models: Path, tmp_path: Path) -> None:
    on, off = (
        records(models, tmp_path / mode, replay=mode, updates=1, replace={"parallel": {"pipeline": 2}})
        for mode in ("R2", "off")
    )
    assert [(r["loss"], r["grad_norm"]) for r in on] == [(r["loss"], r["grad_norm"]) for r in off]
    assert "seconds/routing" not in on[0]

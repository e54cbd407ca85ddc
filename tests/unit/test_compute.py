"""The cost of a run, from its metrics: by hand, after a resume, and from folders that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mopd.compute import Compute, read_compute, token_metrics
from megatron_mopd.config import LogSpec
from megatron_mopd.metrics import MetricLog
from megatron_mopd.yaml_config import ConfigError
from tests import tiny

STEP = {"tokens/generated": 30.0, "tokens/trained": 50.0, "tokens/teacher": 50.0, "seconds/total": 0.25}


def test_costs_add_up() -> None:
    one = Compute(generated_tokens=1, trained_tokens=20, teacher_tokens=300, seconds=0.5)
    assert one + one + Compute() == Compute(generated_tokens=2, trained_tokens=40, teacher_tokens=600, seconds=1.0)
    assert Compute(**one.as_json()) == one  # type: ignore[arg-type]


@pytest.mark.parametrize("has_teachers", [True, False])
def test_tokens_of_a_step(has_teachers: bool) -> None:
    rollouts = tiny.rollouts(["a", "b"])
    processed = float(len(rollouts[0].token_ids) + len(rollouts[1].token_ids))
    assert token_metrics(rollouts, generated=7, has_teachers=has_teachers) == {
        "tokens/generated": 7.0,
        "tokens/trained": processed,
        "tokens/teacher": processed if has_teachers else 0.0,
    }


def write(folder: Path, steps: range, resume: int = 0) -> None:
    with MetricLog(folder, LogSpec(tensorboard=False), rank=0, resume_step=resume) as log:
        for step in steps:
            log.step(step, STEP | {"loss": 1.0})
            log.step(step + 1, {"accuracy/a": 0.5}, kind="eval")


def test_a_resumed_run_counts_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, range(7))
    assert read_compute(tmp_path) == Compute(generated_tokens=210, trained_tokens=350, teacher_tokens=350, seconds=1.75)
    write(tmp_path, range(4, 8), resume=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "kind": "tr')  # killed in the middle of a line
    assert read_compute(tmp_path) == Compute(generated_tokens=240, trained_tokens=400, teacher_tokens=400, seconds=2.0)


def test_folders_without_a_cost(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics.jsonl: no such file; name the folder of a run"):
        read_compute(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "kind": "train", "loss": 1.0}) + "\n")
    with pytest.raises(ConfigError, match=r"step 3 has no tokens/generated: written by an older version; run it ag"):
        read_compute(tmp_path)

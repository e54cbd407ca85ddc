"""Each inner update weighs teacher against the student of that moment, not against the one that the step began with
(Open-MOPD, arXiv 2608.19098: "student reward refresh")."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_mopd.config import ObjectiveSpec, RunConfig
from megatron_mopd.parallel import cpu
from tests import tiny
from tests.distributed.ranks import run_ranks

cpu.install()

DOMAINS = ["a", "b", "c", "a", "b", "a"]


def two_updates(config: RunConfig, folder: Path) -> dict[str, float]:
    """A step of two updates as in train.py. The second one's advantage, and what it would be with the log-probs of the
    student as it then is, and with those of the student at the start of the step."""
    from megatron_mopd.packing import pack_step
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.step import score
    from megatron_mopd.student.student import Student
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(config.parallel, config.seed)
    arch = read_architecture(folder / "student")
    sources = {name: (read_architecture(folder / name), folder / name) for name in config.teachers}
    bank, student = TeacherBank(config, sources, world), Student(config, arch, world, folder / "student")
    plain = ObjectiveSpec(kind="sampled")

    def logprobs(batches: list) -> np.ndarray:
        scores = score(student.model, batches, arch.vocab_size, world, plain)
        return np.concatenate([item.logprobs.numpy() for item in scores if item.logprobs is not None])

    parts = [
        pack_step(
            tiny.rollouts(DOMAINS, seed=seed), config, data_rank=0, data_ranks=1, multiple_of=1, device=world.device
        )
        for seed in range(2)
    ]
    at_the_start = logprobs(parts[1])
    for number, batches in enumerate(parts):
        if number == 1:
            now = logprobs(batches)
        scores = bank.score(batches)
        report = student.update(batches, scores, bank.heads(), step=0)
    teacher = np.concatenate([item.logprobs.numpy() for item in scores if item.logprobs is not None])
    sampled_with = np.concatenate([batch.rollout_logprobs.numpy() for batch in parts[1]])
    stop_world()
    clip = config.objective.advantage_clip
    means = {
        name: float((teacher - own).clip(-clip, clip).mean())
        for name, own in (("now", now), ("start", at_the_start), ("rollout", sampled_with))
    }
    return means | {"reported": report.metrics["advantage"]}


def test_the_second_update_of_a_step_sees_the_student_after_the_first(tmp_path: Path) -> None:
    for seed, name in enumerate(("student", "a", "b", "c")):
        tiny.write_model(tmp_path / name, seed=seed)
    config = tiny.run_config(tmp_path, kind="sampled", lr=1e-2)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, updates_per_step=2))
    (found,) = run_ranks(two_updates, 1, config, tmp_path, init=False)
    print(found)
    assert found["reported"] == pytest.approx(found["now"], abs=1e-5)
    assert abs(found["reported"] - found["start"]) > 1e-2
    assert abs(found["reported"] - found["rollout"]) > 1e-2

"""A number that is not one stops the run before the optimizer; bf16 and recomputation train like fp32."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mopd.config import ParallelSpec, RunConfig
from megatron_mopd.parallel import cpu
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_teacher_bank import pack_all, sources_of

cpu.install()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    for seed, name in enumerate(("student", "a", "b", "c")):
        tiny.write_model(folder / name, seed=seed)
    broken = load_file(folder / "b" / "model.safetensors")
    broken["model.norm.weight"][0] = float("nan")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text((folder / "b" / "config.json").read_text())
    save_file(broken, folder / "broken" / "model.safetensors", {"format": "pt"})
    return folder


def one_step(config: RunConfig, folder: Path) -> dict:
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.student import NonFiniteError, Student
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(config.parallel, 0)
    bank = TeacherBank(config, sources_of(config, folder), world)
    arch = read_architecture(folder / "student")
    student = Student(config, arch, world, folder / "student")
    before = {name: tensor.clone() for name, tensor in student.hf_weights()}
    batches = [batch for _, batch in pack_all(config, tiny.rollouts(["a", "broken", "c"] * 4), bank.names, world)]
    error, loss = "", 0.0
    try:
        loss = student.update(batches, bank.score(batches), bank.heads(), step=3).loss
    except NonFiniteError as caught:
        error = str(caught)
    changed = sum(not torch.equal(before[name], tensor) for name, tensor in student.hf_weights())
    norm = sum(float((before[n] - t).float().pow(2).sum()) for n, t in student.hf_weights()) ** 0.5
    stop_world()
    return {"error": error, "loss": loss, "changed": changed, "norm": norm, "tensors": len(before)}


@pytest.mark.parametrize("kind", ["full_vocab", "sampled"])
def test_not_a_number_stops_before_the_optimizer_step(kind: str, models: Path) -> None:
    config = tiny.run_config(models, kind=kind, teachers=("a", "broken", "c"), parallel=ParallelSpec(pipeline=2))
    results = run_ranks(one_step, 4, config, models, init=False)
    for result in results:
        assert "step 3" in result["error"]
        assert "domain broken" in result["error"]
        assert "rank 2, 3" in result["error"]  # the last pipeline stage, both data-parallel ranks
        assert result["changed"] == 0


def test_recomputation_changes_nothing(models: Path) -> None:
    plain = tiny.run_config(models, teachers=("a", "c"), kind="full_vocab")
    config = dataclasses.replace(plain, domains=plain.domains | {"broken": plain.domains["a"]})
    again = dataclasses.replace(config, parallel=ParallelSpec(recompute=True))
    expected, recomputed = (run_ranks(one_step, 1, c, models, init=False)[0] for c in (config, again))
    assert expected["error"] == recomputed["error"] == ""
    assert expected["changed"] == expected["tensors"]
    assert recomputed["loss"] == expected["loss"]
    assert recomputed["norm"] == pytest.approx(expected["norm"], rel=1e-6)


def test_bf16_takes_nearly_the_same_step(models: Path) -> None:
    plain = tiny.run_config(models, teachers=("a", "c"), kind="full_vocab", lr=1e-2)
    config = dataclasses.replace(plain, domains=plain.domains | {"broken": plain.domains["a"]})
    half = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    expected, rounded = (run_ranks(one_step, 2, c, models, init=False)[0] for c in (config, half))
    assert rounded["error"] == ""
    assert rounded["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert rounded["norm"] == pytest.approx(expected["norm"], rel=0.05)

"""A student resumes bit-identically, from a checkpoint written in any parallel layout."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_mopd.parallel.runtime import stop_world
from megatron_mopd.student.architecture import Architecture
from tests.distributed.ranks import RankError, run_ranks
from tests.distributed.trainee import MOE, ONE_RANK, TIED, Degrees, Trainee


def degrees_id(degrees: Degrees) -> str:
    return "w{}-tp{}-pp{}-ep{}".format(*degrees)


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


def draws() -> dict[str, Tensor]:
    """The next number of each global generator."""
    return {
        "torch": torch.rand(1),
        "numpy": torch.tensor(np.random.rand()),
        "python": torch.tensor(random.random()),
    }


def train(degrees: Degrees, run_dir: Path, updates: int, *model: Any) -> dict[str, Tensor]:
    """Some updates, a checkpoint, one more update."""
    trainee = Trainee(degrees, *model)
    for step in range(updates):
        trainee.update(step)
    trainee.save(run_dir, updates)
    random_numbers = draws()
    trainee.update(updates)
    stop_world()
    return trainee.everything() | random_numbers


def resume(degrees: Degrees, run_dir: Path, updates: int, *model: Any) -> dict[str, Tensor]:
    """The same update after it, in a process that starts from other weights."""
    trainee = Trainee(degrees, *model, seed=7)
    trainee.load(run_dir / "checkpoints" / "latest")
    random_numbers = draws()
    trainee.update(updates)
    stop_world()
    return trainee.everything() | random_numbers


@pytest.mark.parametrize(
    ("degrees", "updates", "model"),
    [
        (ONE_RANK, 0, (MOE,)),  # before the optimizer has any moments
        (ONE_RANK, 2, (MOE, torch.bfloat16)),
        ((2, 1, 1, 1), 2, (MOE,)),
        ((2, 1, 1, 1), 2, (MOE, torch.bfloat16)),
        ((2, 1, 2, 1), 2, (TIED,)),  # two buckets in the gradient buffers of both stages
        ((4, 2, 1, 2), 2, (MOE, torch.bfloat16)),
    ],
    ids=["start", "bf16", "dp2-fp32", "dp2-bf16", "pp2-tied", "dp2-tp2-ep2-bf16"],
)
def test_resuming_is_bit_identical(degrees: Degrees, updates: int, model: tuple[Any, ...], tmp_path: Path) -> None:
    uninterrupted = run_ranks(train, degrees[0], degrees, tmp_path, updates, *model, init=False)
    resumed = run_ranks(resume, degrees[0], degrees, tmp_path, updates, *model, init=False)
    for found, expected in zip(resumed, uninterrupted, strict=True):
        assert_identical(found, expected)


Model = tuple[Architecture, torch.dtype]
Original = tuple[Path, dict[str, Tensor], dict[str, Tensor]]
"""Folder of a run that trained on one rank, every number of it, and its weights by Hugging Face name."""


def train_and_save(run_dir: Path, *model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trainee = Trainee(ONE_RANK, *model)
    for step in range(2):
        trainee.update(step)
    trainee.save(run_dir, 2)
    return trainee.everything(), trainee.whole_weights()


def load_and_save(degrees: Degrees, source: Path, target: Path, *model: Any) -> dict[str, Tensor]:
    """Pass a checkpoint on through another layout; the whole weights as seen there."""
    trainee = Trainee(degrees, *model, seed=7)
    trainee.load(source / "checkpoints" / "latest")
    trainee.save(target, 2)
    return trainee.whole_weights()


def load_on_one_rank(run_dir: Path, *model: Any) -> dict[str, Tensor]:
    trainee = Trainee(ONE_RANK, *model, seed=8)
    trainee.load(run_dir / "checkpoints" / "latest")
    return trainee.everything()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[Model, Original]:
    made = {}
    for model in ((MOE, torch.float32), (TIED, torch.bfloat16)):
        run_dir = tmp_path_factory.mktemp("original")
        made[model] = (run_dir, *run_ranks(train_and_save, 1, run_dir, *model, init=False)[0])
    return made


@pytest.mark.parametrize(
    ("degrees", "model"),
    [
        ((2, 1, 2, 1), (MOE, torch.float32)),
        ((4, 2, 1, 2), (MOE, torch.float32)),
        ((8, 2, 2, 2), (MOE, torch.float32)),
        ((2, 2, 1, 2), (TIED, torch.bfloat16)),
        ((4, 1, 2, 2), (TIED, torch.bfloat16)),
    ],
    ids=lambda value: degrees_id(value) if len(value) == 4 else ("tied-bf16" if value[0] is TIED else "untied-fp32"),
)
def test_a_checkpoint_loads_in_any_layout(
    degrees: Degrees, model: Model, originals: dict[Model, Original], tmp_path: Path
) -> None:
    run_dir, everything, weights = originals[model]
    for seen in run_ranks(load_and_save, degrees[0], degrees, run_dir, tmp_path, *model, init=False):
        assert_identical(seen, weights)
    assert_identical(run_ranks(load_on_one_rank, 1, tmp_path, *model, init=False)[0], everything)


def test_a_checkpoint_of_another_architecture_is_refused(originals: dict[Model, Original]) -> None:
    run_dir = originals[MOE, torch.float32][0]
    wider = dataclasses.replace(MOE, expert_ffn_size=64)
    with pytest.raises(RankError, match=r"CheckpointError: .*latest: does not fit the model \(.*shape mismatch"):
        run_ranks(load_on_one_rank, 1, run_dir, wider, init=False)

"""Moments in host memory: the same numbers bit for bit, in every update and through checkpoints of either kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_mopd.parallel import adamw
from megatron_mopd.parallel.runtime import stop_world
from megatron_mopd.student.sharded_state import optimizer_parts
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import assert_identical
from tests.distributed.trainee import MOE, ONE_RANK, Degrees, Trainee

PIECE = 96
"""So small that most parameters are cut, none of them evenly."""


def trainee_of(degrees: Degrees, dtype: torch.dtype, offload: bool, seed: int = 0) -> Trainee:
    adamw.PIECE = PIECE
    trainee = Trainee(degrees, MOE, dtype, seed=seed, offload=offload)
    kind = adamw.OffloadedAdamW if offload else adamw.AdamW
    assert {type(part.optimizer) for part in optimizer_parts(trainee.optimizer)} == {kind}
    return trainee


def train(degrees: Degrees, dtype: torch.dtype, run_dir: Path, offload: bool) -> dict[str, Tensor]:
    trainee = trainee_of(degrees, dtype, offload)
    for step in range(3):
        trainee.update(step)
    trainee.save(run_dir, 3)
    trainee.update(3)
    stop_world()
    return trainee.everything()


def resume(degrees: Degrees, dtype: torch.dtype, run_dir: Path, offload: bool) -> dict[str, Tensor]:
    trainee = trainee_of(degrees, dtype, offload, seed=7)
    trainee.load(run_dir / "checkpoints" / "latest")
    trainee.update(3)
    stop_world()
    return trainee.everything()


@pytest.mark.parametrize(
    ("degrees", "dtype"), [(ONE_RANK, torch.float32), ((4, 2, 1, 2), torch.bfloat16)], ids=["one", "dp2-tp2-ep2-bf16"]
)
def test_offloaded_moments_change_no_bit(degrees: Degrees, dtype: torch.dtype, tmp_path: Path) -> None:
    ranks = degrees[0]
    plain = run_ranks(train, ranks, degrees, dtype, tmp_path / "plain", False, init=False)
    moved = run_ranks(train, ranks, degrees, dtype, tmp_path / "moved", True, init=False)
    crossed = run_ranks(resume, ranks, degrees, dtype, tmp_path / "plain", True, init=False)
    back = run_ranks(resume, ranks, degrees, dtype, tmp_path / "moved", False, init=False)
    assert any("exp_avg_sq" in name and value.abs().sum() > 0 for name, value in plain[0].items())
    for found in (moved, crossed, back):
        for own, expected in zip(found, plain, strict=True):
            assert_identical(own, expected)


def start_and_save(run_dir: Path) -> dict[str, Tensor]:
    """Before the first update, when there are no moments yet."""
    trainee = trainee_of(ONE_RANK, torch.float32, True)
    trainee.save(run_dir, 0)
    trainee.update(0)
    return trainee.everything()


def load_start(run_dir: Path) -> dict[str, Tensor]:
    trainee = trainee_of(ONE_RANK, torch.float32, False, seed=7)
    trainee.load(run_dir / "checkpoints" / "latest")
    trainee.update(0)
    return trainee.everything()


def test_a_checkpoint_of_the_start(tmp_path: Path) -> None:
    (saved,) = run_ranks(start_and_save, 1, tmp_path, init=False)
    (loaded,) = run_ranks(load_start, 1, tmp_path, init=False)
    assert_identical(loaded, saved)

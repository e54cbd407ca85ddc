"""Saving and resuming the student: bit-identical, in any layout, and safe against full disks and kills."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mopd.config import OptimSpec, ParallelSpec
from megatron_mopd.parallel import cpu
from megatron_mopd.types import MicroBatch
from tests import tiny
from tests.distributed.ranks import RankError, run_ranks

cpu.install()

from megatron_mopd.parallel.runtime import World, start_world, stop_world  # noqa: E402
from megatron_mopd.student import checkpoint, checkpoint_files  # noqa: E402
from megatron_mopd.student.architecture import Architecture, parse_architecture  # noqa: E402
from megatron_mopd.student.model import build_model, output_weight  # noqa: E402
from megatron_mopd.student.optimizer import wrap  # noqa: E402
from megatron_mopd.student.random_init import init_random  # noqa: E402
from megatron_mopd.student.step import run_schedule  # noqa: E402
from megatron_mopd.student.weight_stream import iter_hf  # noqa: E402

Degrees = tuple[int, int, int, int]
"""World, TP, PP, EP."""
MOE = parse_architecture(tiny.MOE | {"num_hidden_layers": 2, "num_experts": 4}, "test")
TIED = dataclasses.replace(MOE, tie_embeddings=True)
ONE_RANK = (1, 1, 1, 1)


def degrees_id(degrees: Degrees) -> str:
    return "w{}-tp{}-pp{}-ep{}".format(*degrees)


class Trainee:
    """A model with its optimizer on this rank, and the least that trains it."""

    def __init__(self, degrees: Degrees, arch: Architecture = MOE, dtype: torch.dtype = torch.float32, seed: int = 0):
        _, tensor, pipeline, expert = degrees
        parallel = ParallelSpec(tensor=tensor, pipeline=pipeline, expert=expert)
        self.arch = arch
        self.world: World = start_world(parallel, seed)
        self.model = build_model(arch, parallel, self.world, dtype, training=True)
        init_random(self.model, arch, self.world, seed)
        self.ddp, self.optimizer = wrap(self.model, OptimSpec(lr=1e-2, weight_decay=0.1))

    def update(self, step: int) -> None:
        """The gradient's scale does not matter here, only that every weight gets its own and other ranks others."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        batch = random_batch(seed=100 * step + self.world.data.rank)

        def loss(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            logits = hidden.float() @ output_weight(self.model).float().T
            return logits.pow(2).sum() + logits.sum(), torch.tensor(len(batch.token_ids), dtype=torch.int), {}

        run_schedule(self.ddp, [batch], loss, backward=True)
        succeeded, _, _ = self.optimizer.step()
        assert succeeded

    def save(self, run_dir: Path, step: int, **options: Any) -> Path:
        given: dict[str, Any] = {"state": {}, "write_model": lambda folder: None, "keep_last": 2} | options
        return checkpoint.save(run_dir, step, self.ddp, self.optimizer, self.world, **given)

    def load(self, path: Path) -> None:
        checkpoint.load(path, self.ddp, self.optimizer, self.world)

    def everything(self) -> dict[str, Tensor]:
        """Every number on this rank that an update reads or writes."""
        found = {f"weight {name}": value.detach().clone() for name, value in self.model.named_parameters()}
        for index, part in enumerate(checkpoint._parts(self.optimizer)):
            for group in part.optimizer.param_groups:
                for position, main in enumerate(group["params"]):
                    key = f"{index} {group['is_expert_parallel']} {group['weight_decay']} {position}"
                    found[f"main {key}"] = main.detach().clone()
                    found |= {f"{name} {key}": value.clone() for name, value in part.optimizer.state[main].items()}
                found[f"step {index} {len(found)}"] = torch.tensor(group["step"])
        return found

    def whole_weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in iter_hf(self.model, self.arch, self.world)}


def random_batch(seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 5, 4])
    ids = torch.randint(0, 101, (16,), generator=generator)
    return MicroBatch(
        teacher=None,
        token_ids=ids,
        position_ids=torch.cat([torch.arange(int(length)) for length in lengths]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int(),
        max_seqlen=7,
        rows=torch.arange(16),
        targets=ids,
        weights=torch.ones(16),
        num_units=16,
        rollout_logprobs=torch.zeros(16),
        outcome_advantages=torch.zeros(16),
        domain_index=torch.zeros(16, dtype=torch.long),
    )


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


def train(degrees: Degrees, run_dir: Path, *model: Any) -> dict[str, Tensor]:
    """Two updates, a checkpoint, one more update."""
    trainee = Trainee(degrees, *model)
    for step in range(2):
        trainee.update(step)
    trainee.save(run_dir, 2)
    trainee.update(2)
    stop_world()
    return trainee.everything()


def resume(degrees: Degrees, run_dir: Path, *model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In a process that starts from other weights: what the checkpoint brought, and the update after it."""
    trainee = Trainee(degrees, *model, seed=7)
    trainee.load(run_dir / "checkpoints" / "latest")
    loaded = trainee.everything()
    trainee.update(2)
    stop_world()
    return loaded, trainee.everything()


@pytest.mark.parametrize(
    ("degrees", "arch", "dtype"),
    [
        (ONE_RANK, MOE, torch.bfloat16),
        ((2, 1, 1, 1), MOE, torch.float32),
        ((2, 1, 1, 1), MOE, torch.bfloat16),
        ((2, 1, 2, 1), TIED, torch.float32),
        ((4, 2, 1, 2), MOE, torch.bfloat16),
    ],
    ids=lambda value: degrees_id(value) if isinstance(value, tuple) else str(getattr(value, "family", value)),
)
def test_resuming_is_bit_identical(degrees: Degrees, arch: Architecture, dtype: torch.dtype, tmp_path: Path) -> None:
    uninterrupted = run_ranks(train, degrees[0], degrees, tmp_path, arch, dtype, init=False)
    resumed = run_ranks(resume, degrees[0], degrees, tmp_path, arch, dtype, init=False)
    for (loaded, after), expected in zip(resumed, uninterrupted, strict=True):
        assert_identical(after, expected)
        assert not torch.equal(loaded["weight decoder.layers.0.mlp.router.weight"], expected[
            "weight decoder.layers.0.mlp.router.weight"
        ]) if arch is MOE else True

"""A tiny student with its optimizer, the least that trains it, and every number it consists of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.config import OptimSpec, ParallelSpec
from megatron_mopd.parallel import cpu
from megatron_mopd.token_layout import TokenLayout
from megatron_mopd.types import MicroBatch
from tests import tiny

cpu.install()

from megatron_mopd.parallel.runtime import World, start_world  # noqa: E402
from megatron_mopd.student import checkpoint  # noqa: E402
from megatron_mopd.student.architecture import Architecture, parse_architecture  # noqa: E402
from megatron_mopd.student.model import build_model, output_weight  # noqa: E402
from megatron_mopd.student.optimizer import wrap  # noqa: E402
from megatron_mopd.student.random_init import init_random  # noqa: E402
from megatron_mopd.student.sharded_state import optimizer_parts  # noqa: E402
from megatron_mopd.student.step import run_schedule  # noqa: E402
from megatron_mopd.student.weight_stream import iter_hf  # noqa: E402

Degrees = tuple[int, int, int, int]
"""World, TP, PP, EP."""
ONE_RANK = (1, 1, 1, 1)
MOE = parse_architecture(tiny.MOE | {"num_hidden_layers": 2, "num_experts": 4}, "test")
TIED = dataclasses.replace(MOE, tie_embeddings=True)


class Trainee:
    """A model with its optimizer on this rank, and the least that trains it."""

    def __init__(
        self,
        degrees: Degrees,
        arch: Architecture = MOE,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
        context: int = 1,
        offload: bool = False,
    ):
        _, tensor, pipeline, expert = degrees
        parallel = ParallelSpec(tensor=tensor, pipeline=pipeline, context=context, expert=expert)
        self.arch = arch
        self.world: World = start_world(parallel, seed)
        self.model = build_model(arch, parallel, self.world, dtype, training=True)
        init_random(self.model, arch, self.world, seed)
        self.ddp, self.optimizer = wrap(self.model, OptimSpec(lr=1e-2, weight_decay=0.1, offload=offload))

    def update(self, step: int) -> None:
        """Any gradient will do, as long as every weight gets its own and other data ranks others."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        batch = random_batch(100 * step + self.world.data.rank, self.world)

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
        for index, part in enumerate(optimizer_parts(self.optimizer)):
            for group in part.optimizer.param_groups:
                for position, main in enumerate(group["params"]):
                    key = f"{index} {group['is_expert_parallel']} {group['weight_decay']} {position}"
                    found[f"main {key}"] = main.detach().clone()
                    found |= {f"{name} {key}": value.clone() for name, value in part.optimizer.state[main].items()}
                found[f"step {index} {len(found)}"] = torch.tensor(group["step"])
        return found

    def whole_weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in iter_hf(self.model, self.arch, self.world)}


def random_batch(seed: int, world: World) -> MicroBatch:
    """Of 16 tokens, and what pads them for the context ranks."""
    generator = torch.Generator().manual_seed(seed)
    lengths, context = (7, 5, 4), world.context
    layout = TokenLayout.of(
        lengths, multiple_of=world.tensor.size, context_ranks=context.size, context_rank=context.rank
    )
    whole = torch.randint(0, 101, (16,), generator=generator)
    ids = torch.from_numpy(layout.tokens([part.numpy() for part in whole.split(lengths)]))
    size = len(ids)
    return MicroBatch(
        teacher=None,
        token_ids=ids,
        position_ids=torch.from_numpy(layout.positions()),
        cu_seqlens=torch.from_numpy(layout.starts).int(),
        max_seqlen=layout.longest,
        rows=torch.arange(size),
        targets=ids,
        weights=torch.ones(size),
        num_units=size,
        rollout_logprobs=torch.zeros(size),
        outcome_advantages=torch.zeros(size),
        domain_index=torch.zeros(size, dtype=torch.long),
        sequence_index=torch.zeros(size, dtype=torch.long),
    )

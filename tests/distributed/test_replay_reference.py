"""Replayed routing against transformers with the same experts forced upon it: logits, gradients, counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.config import OptimSpec, ParallelSpec
from megatron_mopd.packing import pack
from megatron_mopd.parallel import cpu
from megatron_mopd.types import MicroBatch, Rollout
from tests import tiny
from tests.distributed.forced_routing import ForcedModel
from tests.distributed.ranks import run_ranks
from tests.distributed.test_routing_replay import LAYERS, routed

cpu.install()

MODELS = {"renormalised": tiny.MOE, "not-renormalised": {**tiny.MOE, "norm_topk_prob": False}}


def megatron(folder: Path, parallel: ParallelSpec, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Of -sum log p(y): logits [R, V], the routers' gradients by layer, and the counts of (token, layer) pairs."""
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.model import build_model, output_weight
    from megatron_mopd.student.optimizer import wrap
    from megatron_mopd.student.replay import ReplayPass, RoutingReplay
    from megatron_mopd.student.step import hidden_rows, run_schedule
    from megatron_mopd.student.weights import load_hf

    world = start_world(parallel, 0)
    arch = read_architecture(folder)
    model = build_model(arch, parallel, world, torch.float32, training=True)
    load_hf(model, arch, folder, world)
    ddp, _ = wrap(model, OptimSpec(lr=1e-3))
    replay = ReplayPass(RoutingReplay(model, world, num_domains=2))
    names, multiple, device = ("a", "b"), world.tensor.size, world.device
    batches = [
        pack(
            part,
            None,
            domain_names=names,
            aggregation="token",
            multiple_of=multiple,
            device=device,
            with_experts=True,
        )
        for part in (rollouts[:3], rollouts[3:])
    ]
    seen: list[Tensor] = []

    def loss(batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shard = hidden_rows(hidden, batch, world) @ output_weight(model).T
        parts = [torch.empty_like(shard) for _ in range(world.tensor.size)]
        dist.all_gather(parts, shard.detach(), group=world.tensor.group)
        parts[world.tensor.rank] = shard  # its own vocabulary's gradient: tensor ranks sum theirs
        logits = torch.cat(parts, dim=-1)[:, : arch.vocab_size]
        seen.append(logits.detach())
        total = -logits.log_softmax(-1).gather(1, batch.targets[:, None]).sum()
        return total, torch.tensor(batch.num_units, dtype=torch.int), torch.zeros(())

    run_schedule(ddp, batches, loss, backward=True, route=replay)
    gradients = {layer.layer_number - 1: layer.mlp.router.weight.main_grad.clone() for layer in model.decoder.layers}
    counts = world.sum(replay.counts())
    stop_world()
    return {"logits": torch.cat(seen) if seen else None, "gradients": gradients, "counts": counts}


@pytest.mark.parametrize("name", MODELS)
def test_replay_equals_transformers_with_these_experts(name: str, tmp_path: Path) -> None:
    tiny.write_model(tmp_path, MODELS[name], seed=1)
    rollouts = routed(tiny.rollouts(["a", "b", "a", "a", "b"], seed=5))
    forced = ForcedModel(tmp_path)
    logits, loss = [], torch.zeros(())
    counts = torch.zeros(3, 2, dtype=torch.float64)
    for rollout in rollouts:
        experts = rollout.routed_experts
        assert experts is not None
        logits.append(forced.logits(rollout, experts))
        target = torch.from_numpy(rollout.response_ids)[:, None]
        loss = loss - logits[-1].log_softmax(-1).gather(1, target).sum()
        own = torch.stack(forced.own, dim=1).sort(-1).values.numpy()
        missing = (experts < 0).all(-1)
        differs = ~missing & (np.sort(experts, -1) != own).any(-1)
        counts[:, "ab".index(rollout.domain)] += torch.tensor([missing.size, missing.sum(), differs.sum()])
    loss.backward()
    units = sum(len(rollout.response_ids) for rollout in rollouts)
    free = torch.cat([forced.logits(rollout, None) for rollout in rollouts])
    for layout, world in (("111", 1), ("212", 2)):
        parallel = ParallelSpec(tensor=int(layout[0]), expert=int(layout[2]))
        for result in run_ranks(megatron, world, tmp_path, parallel, rollouts, init=False):
            torch.testing.assert_close(result["logits"], torch.cat(logits), rtol=0, atol=1e-4)
            assert (result["logits"] - free).abs().max() > 0.1
            assert result["counts"].tolist() == counts.tolist()
            assert list(result["gradients"]) == list(range(LAYERS))
            for gate, gradient in zip(forced.gates, result["gradients"].values(), strict=True):
                torch.testing.assert_close(gradient, gate.weight.grad / units, rtol=1e-4, atol=1e-6)
                assert gradient.abs().max() > 1e-3

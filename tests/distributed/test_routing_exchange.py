"""Routed experts reach the ranks that train on them, whoever had them, and the micro-batches are those of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_mopd import routing_exchange
from megatron_mopd.config import ParallelSpec, RolloutSpec, RunConfig, SglangSpec
from megatron_mopd.packing import pack_step, plan_step
from megatron_mopd.parallel.runtime import start_world, stop_world
from megatron_mopd.rollout.collect import _share
from megatron_mopd.routing_exchange import deliver_experts
from megatron_mopd.types import MicroBatch, Rollout
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_routing_replay import routed

DOMAINS = ["a"] * 9 + ["b"] * 5 + ["c"] * 2


def config_of(folder: Any, tensor: int, pipeline: int, context: int) -> RunConfig:
    parallel = ParallelSpec(tensor=tensor, pipeline=pipeline, context=context)
    config = tiny.run_config(folder, parallel=parallel, max_tokens=24)
    servers = SglangSpec(urls=("http://127.0.0.1:1",))
    return replace(config, rollout=RolloutSpec(engine="sglang", sglang=servers, routing_replay="R3"))


def exchanged(config: RunConfig, rollouts: Sequence[Rollout], round_bytes: int) -> tuple[list[MicroBatch], list[int]]:
    """This rank's micro-batches, from rollouts of which each rank has its share, and whose experts it has then."""
    routing_exchange.ROUND_BYTES = round_bytes
    world = start_world(config.parallel, 0)
    own = rollouts[world.rank :: world.size]
    prompts = [rollout.prompt for rollout in rollouts]
    shared = _share(own, None, prompts, world)
    assert [r.routed_experts is not None for r in shared] == [i % world.size == world.rank for i in range(len(shared))]
    plans = plan_step(shared, config, data_ranks=world.data.size, context_ranks=world.context.size)
    delivered = deliver_experts(shared, plans, world.all_gather_objects(world.data.rank), world)
    batches, whole = (
        pack_step(
            each,
            config,
            data_rank=world.data.rank,
            data_ranks=world.data.size,
            multiple_of=world.tensor.size,
            device=world.device,
            context_ranks=world.context.size,
            context_rank=world.context.rank,
        )
        for each in (delivered, rollouts)
    )
    assert len(batches) == len(whole) > 2
    for found, expected in zip(batches, whole, strict=True):
        if expected.routed_experts is None:  # an empty one
            assert found.routed_experts is None
            continue
        assert found.routed_experts is not None
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.equal(found.routed_experts, expected.routed_experts)
    stop_world()
    return batches, [i for i, rollout in enumerate(delivered) if rollout.routed_experts is not None]


@pytest.mark.parametrize("round_bytes", [1, 1 << 30], ids=["rollout by rollout", "at once"])
@pytest.mark.parametrize(
    ("ranks", "tensor", "pipeline", "context"), [(2, 1, 1, 1), (4, 2, 1, 1), (4, 1, 2, 1), (4, 1, 1, 2)]
)
def test_every_rank_gets_what_it_trains_on(
    ranks: int, tensor: int, pipeline: int, context: int, round_bytes: int, tmp_path: Any
) -> None:
    rollouts = routed(tiny.rollouts(DOMAINS))
    config = config_of(tmp_path, tensor, pipeline, context)
    results = run_ranks(exchanged, ranks, config, rollouts, round_bytes, init=False)
    # Who has none of another data rank's rollouts, but those that were its own from the start.
    for rank, (_, held) in enumerate(results):
        assert set(range(rank, len(rollouts), ranks)) <= set(held) or ranks == 1
    assert min(len(held) for _, held in results) < len(rollouts)
    union = set().union(*(held for _, held in results))
    assert union == set(range(len(rollouts)))


def nothing_to_replay(config: RunConfig, rollouts: Sequence[Rollout]) -> bool:
    world = start_world(config.parallel, 0)
    plans = plan_step(rollouts, config, data_ranks=world.data.size)
    delivered = deliver_experts(rollouts, plans, world.all_gather_objects(world.data.rank), world)
    stop_world()
    return all(r.routed_experts is None for r in delivered)


def test_rollouts_without_experts_come_back_as_they_are(tmp_path: Any) -> None:
    rollouts = [replace(rollout, routed_experts=None) for rollout in tiny.rollouts(DOMAINS)]
    config = config_of(tmp_path, 1, 1, 1)
    assert run_ranks(nothing_to_replay, 2, config, rollouts, init=False) == [True, True]

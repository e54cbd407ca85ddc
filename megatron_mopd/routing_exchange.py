"""Routed experts (R3) travel from the rank that got them to those that replay them, and to no other.

Of Qwen3-30B-A3B a token's experts are 48 x 8 int16, 768 bytes: 25 GB for 2,048 answers of 16,000 tokens. So rollouts
are shared by all ranks without them (`without_experts`), and once it is planned who trains on which, each rank gets
those of its own data-parallel share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_mopd.packing import BatchPlan
from megatron_mopd.parallel.runtime import World
from megatron_mopd.types import ExpertArray, Rollout

ROUND_BYTES = 256 << 20
"""Sent at once, over all ranks."""


def without_experts(rollout: Rollout, rank: int) -> Rollout:
    """What the other ranks get of a rollout of `rank`."""
    return rollout if rollout.routed_experts is None else replace(rollout, routed_experts=None, experts_on=rank)


def deliver_experts(
    rollouts: Sequence[Rollout], plans: Sequence[BatchPlan], data_rank_of: Sequence[int], world: World
) -> list[Rollout]:
    """`rollouts`, those that this rank trains on with their `routed_experts`. Collective.

    data_rank_of: [world] each rank's data-parallel rank.
    """
    shapes = world.all_gather_objects(_shape(rollouts))
    shape = next((found for found in shapes if found is not None), None)
    if shape is None:
        return list(rollouts)
    needed = [
        frozenset(index for plan in plans for index in plan.members[data_rank]) for data_rank in range(world.data.size)
    ]
    delivered = list(rollouts)
    for part in _rounds(rollouts, shape):
        mine = [i for i in part if rollouts[i].experts_on == world.rank]
        sent = [_bytes([rollouts[i] for i in mine if i in needed[data_rank]]) for data_rank in data_rank_of]
        wanted = [i for i in part if i in needed[world.data.rank]]
        expected = [[i for i in wanted if rollouts[i].experts_on == source] for source in range(world.size)]
        sizes = [sum(_size(rollouts[i], shape) for i in indices) for indices in expected]
        for indices, received in zip(expected, world.all_to_all_bytes(sent, sizes), strict=True):
            pieces = received.split([_size(rollouts[i], shape) for i in indices])
            for i, piece in zip(indices, pieces, strict=True):
                experts: ExpertArray = piece.numpy().view(np.int16).reshape(-1, *shape)
                delivered[i] = replace(rollouts[i], routed_experts=experts)
    return delivered


def _shape(rollouts: Sequence[Rollout]) -> tuple[int, ...] | None:
    """(MoE layers, k), where this rank holds any."""
    held = (rollout.routed_experts for rollout in rollouts if rollout.routed_experts is not None)
    first = next(held, None)
    return None if first is None else first.shape[1:]


def _size(rollout: Rollout, shape: tuple[int, ...]) -> int:
    return len(rollout.token_ids) * int(np.prod(shape)) * np.dtype(np.int16).itemsize


def _rounds(rollouts: Sequence[Rollout], shape: tuple[int, ...]) -> Iterator[list[int]]:
    """Indices of those that have experts somewhere, in parts of about `ROUND_BYTES`; the same on every rank."""
    part, size = list[int](), 0
    for index, rollout in enumerate(rollouts):
        if rollout.experts_on is None:
            continue
        if part and size + _size(rollout, shape) > ROUND_BYTES:
            yield part
            part, size = [], 0
        part.append(index)
        size += _size(rollout, shape)
    if part:
        yield part


def _bytes(rollouts: Sequence[Rollout]) -> torch.Tensor:
    parts = [rollout.routed_experts for rollout in rollouts if rollout.routed_experts is not None]
    flat = [np.ascontiguousarray(part, dtype=np.int16).view(np.uint8).reshape(-1) for part in parts]
    return torch.from_numpy(np.concatenate([*flat, np.zeros(0, np.uint8)]))

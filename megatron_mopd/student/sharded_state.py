"""What has to survive a restart, as Megatron tells a checkpoint: each tensor with its place in the model."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_mopd.parallel.adamw import OffloadedAdamW
from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.checkpoint_files import CheckpointError

FORMAT = "fully_reshardable"
"""Megatron's optimizer format in which each state has the shape and the place of its parameter."""
OBJECTS_BYTES = 1 << 16
"""Allowance per rank for what is not a tensor: random states, indices, headers."""


def sharded_tensors(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, *, loading: bool
) -> dict[str, dict[Any, Any]]:
    """`weights`, and `optimizer`: fp32 weights and moments, to save gathered on one data rank. Collective."""
    metadata: dict[str, Any] = {
        "distrib_optim_sharding_type": FORMAT,
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    weights = model.module.sharded_state_dict(metadata=metadata)
    states: dict[int, Any] = {}
    for index, part in enumerate(optimizer_parts(optimizer)):
        if not part.optimizer.state:
            _allocate_moments(part)
        with _long_lived_objects_aside(), _offsets_without_padding(part):
            state = part.sharded_state_dict(weights, is_loading=loading, metadata=metadata)["param_state"]
        if state is not None:  # None on the data ranks that gave theirs away
            states[index] = state
    return {"weights": weights, "optimizer": states}


def load_optimizer(optimizer: MegatronOptimizer, states: dict[int, Any], updates: int) -> None:
    """Set fp32 weights, moments and the number of updates; rates and decay stay those of `optimizer`."""
    for index, part in enumerate(optimizer_parts(optimizer)):
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = updates
        part.load_state_dict(own | {"param_state": states[index], "param_state_sharding_type": FORMAT})


def check_gathered_weights(optimizer: MegatronOptimizer, states: dict[int, Any]) -> None:
    """Raise CheckpointError when the gathered fp32 weights are not the model's: their places are mixed up."""
    for index, state in states.items():
        buffers = optimizer_parts(optimizer)[index].buffers
        parameters = [parameter for buffer in buffers for parameter in buffer.param_index_map]
        for position, parameter in enumerate(parameters):
            gathered = state[position]["param"].data
            if not torch.equal(gathered.to(parameter.dtype), parameter.detach().cpu()):
                raise CheckpointError(
                    f"cannot save: Megatron's {state[position]['param'].key} differs from the model; "
                    "run with the megatron-core version that this program is tested with"
                )


def optimizer_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """One optimizer for everything, and with expert parallelism a second one for the experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def count_updates(optimizer: MegatronOptimizer, world: World) -> int:
    """Updates made so far; a rank whose shard is empty may not have counted. Collective."""
    own = [int(group.get("step", 0)) for part in optimizer_parts(optimizer) for group in part.optimizer.param_groups]
    return max(world.all_gather_objects(max(own, default=0)))


def bytes_needed(tensors: dict[str, dict[Any, Any]], world: World) -> int:
    """Of a checkpoint: weights twice (`model/` and `state/`), fp32 weights and moments once. Collective."""

    def size(part: dict[Any, Any]) -> int:
        shards = [shard for shard in nested_values(part) if is_main_replica(shard.replica_id)]
        return sum(shard.data.nbytes for shard in shards if torch.is_tensor(shard.data))

    own = 2 * size(tensors["weights"]) + size(tensors["optimizer"]) + OBJECTS_BYTES
    return int(sum(world.all_gather_objects(own)))


def _allocate_moments(part: DistributedOptimizer) -> None:
    """Moments of zero for an optimizer that has made no update yet: Megatron can only save what exists."""
    if isinstance(part.optimizer, OffloadedAdamW):
        part.optimizer.allocate()
        return
    part.load_state_dict(part.state_dict())
    for state in part.optimizer.state.values():
        for moment in state.values():
            if torch.is_tensor(moment):
                moment.zero_()


@contextlib.contextmanager
def _offsets_without_padding(part: DistributedOptimizer) -> Iterator[None]:
    """Works around a defect of Megatron-Core 0.19.2 (mended later by NVIDIA/Megatron-LM pull request 5077).

    It lines up the buckets of a gradient buffer without the padding at their ends, but cuts parameters out at
    offsets that count it, so those after the first bucket get others' numbers. Tied embeddings with several
    pipeline stages make two buckets. Should a later Megatron not need this, `check_gathered_weights` says so.
    """
    original = [buffer.param_index_map for buffer in part.buffers]
    for buffer in part.buffers:
        start, moved = 0, {}
        for bucket in buffer.buckets:
            moved[bucket.bucket_id] = bucket.offset - start
            start += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (begin - moved[bucket], end - moved[bucket], bucket)
            for parameter, (begin, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, index_map in zip(part.buffers, original, strict=True):
            buffer.param_index_map = index_map


@contextlib.contextmanager
def _long_lived_objects_aside() -> Iterator[None]:
    """Megatron ends each gather with `gc.collect()`: over all objects, half of the time of a small save."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def random_states(world: World) -> ShardedObject:
    """This rank's generators. Nothing in a step draws from them, but what does one day resumes as well."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng", states, (world.size,), (world.rank,))


def set_random_states(states: dict[str, Any]) -> None:
    """Inverse of `random_states`, on the same rank of the same layout."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["megatron"])

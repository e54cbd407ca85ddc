"""Save and resume the student: weights, optimizer and random states, in Megatron's distributed checkpoint format.

Every tensor is stored under its place in the whole model, so a checkpoint written with one tensor / pipeline / expert
/ data layout loads in any other, bit for bit. Weights in bf16 are stored beside the fp32 ones of the optimizer.

Reading `state/` unpickles (torch's `.metadata` and the random states): it is only ever read from the run's own
folder, on resume. Other runs take the safetensors in `model/`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed import checkpoint as torch_checkpoint

from megatron_mopd.parallel.runtime import World
from megatron_mopd.student import checkpoint_files
from megatron_mopd.student.checkpoint_files import (
    CheckpointError,
    Layout,
    Manifest,
    find_latest,
    read_manifest,
    remove_leftovers,
)
from megatron_mopd.yaml_config import ConfigError

__all__ = ["CheckpointError", "Manifest", "find_latest", "load", "read_manifest", "remove_leftovers", "save"]

R = TypeVar("R")

FORMAT = "fully_reshardable"
"""Megatron's optimizer format in which each state has the shape and the place of its parameter."""
OBJECTS_BYTES = 1 << 16
"""Allowance per rank for what is not a tensor: random states, indices, headers."""


def save(
    run_dir: Path,
    step: int,
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    world: World,
    *,
    state: Mapping[str, Any],
    write_model: Callable[[Path], None],
    keep_last: int,
) -> Path:
    """Write `run_dir`/checkpoints/step_<step>, make it `latest`, delete all but the newest `keep_last`. Collective.

    Args:
        step: updates of the run so far; the checkpoint's name.
        state: JSON-able, the same on every rank; comes back as `Manifest.state`.
        write_model: writes the Hugging Face folder it is given. Called on every rank; if it is collective itself it
            must finish its collectives before it raises, or the other ranks wait for ever.

    Raises:
        CheckpointError: on every rank, when one of them could not write (disk full, no permission). What was written
            is removed; the previous checkpoint and `latest` are as before.
    """
    folder = checkpoint_files.step_folder(run_dir, step)
    partial = checkpoint_files.unfinished(folder)
    contents = json.loads(json.dumps(dict(state)))
    tensors = _sharded_tensors(model, optimizer, loading=False)
    needed = _bytes_needed(tensors, world)
    # Of Megatron's param groups only the number of updates is a result of training, and the groups themselves
    # depend on the layout: experts get their own only with expert parallelism.
    sharded = {**tensors, "rng": _random_states(world), "updates": _updates(optimizer, world)}
    publish = functools.partial(
        checkpoint_files.publish, folder, step=step, layout=_layout(world), state=contents, keep_last=keep_last
    )
    try:
        _together(world, lambda: checkpoint_files.start(folder, needed) if world.is_main else None)
        _together(world, lambda: dist_checkpointing.save(sharded, str(partial / "state"), _SaveInProcess(world)))
        _together(world, lambda: write_model(partial / "model"))
        _together(world, lambda: publish(versions=_versions()) if world.is_main else None)
    except CheckpointError as error:
        free = checkpoint_files.free_bytes(folder)
        world.barrier()
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        world.barrier()
        raise CheckpointError(
            f"{folder}: not written, earlier checkpoints are intact: {error} ({free} bytes free there, about {needed} "
            "needed); free space or lower checkpoint.keep_last, then resume"
        ) from error
    return folder


def load(path: Path, model: DistributedDataParallel, optimizer: MegatronOptimizer, world: World) -> None:
    """Set weights, optimizer and random states from the checkpoint folder `path`. Collective.

    The layout may differ from the one that wrote it; random states, which belong to ranks, are then left as they are.
    Learning rate, weight decay and betas stay those of `optimizer`.

    Raises:
        CheckpointError: on every rank; incomplete (nothing has been loaded then), or of another architecture.
    """
    manifest = _together(world, lambda: read_manifest(path))
    request = _sharded_tensors(model, optimizer, loading=True)
    if manifest.layout == _layout(world):
        request["rng"] = _random_states(world)
    loaded = _together(world, lambda: _read_state(request, path))
    model.module.load_state_dict(loaded["weights"])
    for index, part in enumerate(_parts(optimizer)):
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = loaded["updates"]
        state = {"param_state": loaded["optimizer"][index], "param_state_sharding_type": FORMAT}
        part.load_state_dict(own | state)
    if "rng" in loaded:
        _set_random_states(loaded["rng"])


def _read_state(request: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(request, str(path / "state"))
    except (KeyError, ValueError, CheckpointingException) as error:
        raise CheckpointError(
            f"{path}: does not fit the model ({_one_line(error)}); resume with the configuration that wrote it"
        ) from error


def _together(world: World, action: Callable[[], R]) -> R:
    """Run `action` on every rank; if it raises on one, raise CheckpointError on all, so that none waits for ever."""
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    text = None if error is None else _one_line(error)
    failures = {text: rank for rank, text in reversed(list(enumerate(world.all_gather_objects(text)))) if text}
    if failures:
        told = "; ".join(text if len(failures) == 1 else f"rank {rank}: {text}" for text, rank in failures.items())
        raise CheckpointError(told) from error
    return cast(R, result)


def _one_line(error: Exception) -> str:
    if isinstance(error, torch_checkpoint.CheckpointException):
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        return "; ".join(dict.fromkeys(_one_line(cause) for cause in causes if isinstance(cause, Exception)))
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def _sharded_tensors(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, *, loading: bool
) -> dict[str, dict[Any, Any]]:
    """Weights and optimizer states with their places in the whole model; gathers the latter on one data rank."""
    metadata: dict[str, Any] = {
        "distrib_optim_sharding_type": FORMAT,
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    weights = model.module.sharded_state_dict(metadata=metadata)
    states: dict[int, Any] = {}
    for index, part in enumerate(_parts(optimizer)):
        if not part.optimizer.state:
            _allocate_states(part)
        with _long_lived_objects_aside():
            state = part.sharded_state_dict(weights, is_loading=loading, metadata=metadata)["param_state"]
        if state is not None:  # None on the data ranks that gave theirs away
            states[index] = state
    return {"weights": weights, "optimizer": states}


@contextlib.contextmanager
def _long_lived_objects_aside() -> Iterator[None]:
    """Megatron ends each of its gathers with `gc.collect()`: half of the time of a small save, over objects of others."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """One optimizer for everything, and with expert parallelism a second one for the experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _allocate_states(part: DistributedOptimizer) -> None:
    """Moments of zero for an optimizer that has not made an update yet: Megatron can only save what exists."""
    part.load_state_dict(part.state_dict())
    for state in part.optimizer.state.values():
        for moment in state.values():
            if torch.is_tensor(moment):
                moment.zero_()


def _updates(optimizer: MegatronOptimizer, world: World) -> int:
    """Updates made so far; a rank whose shard is empty may not have counted."""
    own = [int(group.get("step", 0)) for part in _parts(optimizer) for group in part.optimizer.param_groups]
    return max(world.all_gather_objects(max(own, default=0)))


def _bytes_needed(tensors: dict[str, dict[Any, Any]], world: World) -> int:
    """Of the whole checkpoint: weights twice (`model/` and `state/`), fp32 weights and moments once."""

    def size(part: dict[Any, Any]) -> int:
        shards = [shard for shard in nested_values(part) if is_main_replica(shard.replica_id)]
        return sum(shard.data.nbytes for shard in shards if torch.is_tensor(shard.data))

    sizes = {name: size(part) for name, part in tensors.items()}
    own = 2 * sizes["weights"] + sizes["optimizer"] + OBJECTS_BYTES
    return int(sum(world.all_gather_objects(own)))


def _random_states(world: World) -> ShardedObject:
    """The generators of this rank. Nothing in a step draws from them, but what does so one day resumes as well."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng", states, (world.size,), (world.rank,))


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["megatron"])


def _layout(world: World) -> Layout:
    return Layout(
        ranks=world.size, tensor=world.tensor.size, pipeline=world.pipeline.size, expert=world.expert.size
    )


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "megatron-core")}


class _SaveInProcess(TorchDistSaveShardedStrategy):
    """Megatron's `torch_dist` format through torch's synchronous writer.

    Megatron's own writer is made for saving in the background: every rank starts a manager process first, which takes
    seconds, and only the first rank learns why a write failed.
    """

    def __init__(self, world: World):
        super().__init__()
        self._world = world

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        shards = defaultdict(list)
        for shard in nested_values(sharded_state_dict):
            if is_main_replica(shard.replica_id):
                shards[shard.unique_key if isinstance(shard, ShardedObject) else shard.key].append(shard)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(shards),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )
        # Megatron writes this again right after, on the first rank and before a barrier in which the others would
        # wait for ever if there were no room for it. Once it exists there is.
        config = CheckpointingConfig(self.backend, self.version)
        _together(self._world, lambda: save_config(config, str(checkpoint_dir)) if self._world.is_main else None)

"""Save and resume the student: weights, optimizer, random states, in a Megatron distributed checkpoint.

Every tensor is stored under its place in the whole model: a checkpoint written with one tensor / pipeline /
expert / data layout loads in any other, bit for bit. bf16 weights lie beside the optimizer's fp32 ones.

Reading `state/` unpickles (torch's `.metadata`, the random states): it is only ever read from the run's own
folder, on resume. Other runs take the safetensors in `model/`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

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
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import CheckpointException as TorchCheckpointException

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
from megatron_mopd.student.sharded_state import (
    bytes_needed,
    check_gathered_weights,
    count_updates,
    load_optimizer,
    random_states,
    set_random_states,
    sharded_tensors,
)
from megatron_mopd.yaml_config import ConfigError

__all__ = ["CheckpointError", "Manifest", "find_latest", "load", "read_manifest", "remove_leftovers", "save"]


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
    """Write `run_dir`/checkpoints/step_<step>, make it `latest`, keep the newest `keep_last`. Collective.

    Args:
        step: updates of the run so far; the checkpoint's name.
        state: JSON-able, the same on every rank; comes back as `Manifest.state`.
        write_model: writes the Hugging Face folder it is given. Called on every rank; if it is collective
            itself it must finish its collectives before it raises, or the other ranks wait for ever.

    Raises:
        CheckpointError: on every rank, when one of them could not write (disk full, no permission). What was
            written is removed; the previous checkpoint and `latest` are as before.
    """
    folder = checkpoint_files.step_folder(run_dir, step)
    partial = checkpoint_files.unfinished(folder)
    contents = json.loads(json.dumps(dict(state)))
    tensors = sharded_tensors(model, optimizer, loading=False)
    _together(world, lambda: check_gathered_weights(optimizer, tensors["optimizer"]))
    needed = bytes_needed(tensors, world)
    # Of Megatron's param groups only the number of updates is a result of training, and the groups themselves
    # depend on the layout: experts get their own only with expert parallelism.
    sharded = {**tensors, "rng": random_states(world), "updates": count_updates(optimizer, world)}
    publish = functools.partial(
        checkpoint_files.publish,
        folder,
        step=step,
        layout=_layout(world),
        state=contents,
        keep_last=keep_last,
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
            with contextlib.suppress(OSError):  # the next save tries again
                remove_leftovers(run_dir)
        world.barrier()
        raise CheckpointError(
            f"{folder}: not written, earlier checkpoints are intact: {error} ({free} bytes free there, "
            f"about {needed} needed); free space or lower checkpoint.keep_last, then resume"
        ) from error
    return folder


def load(path: Path, model: DistributedDataParallel, optimizer: MegatronOptimizer, world: World) -> None:
    """Set weights, optimizer and random states from the checkpoint folder `path`. Collective.

    The layout may differ from the one that wrote it; random states belong to ranks and are then left alone.
    Learning rate, weight decay and betas stay those of `optimizer`.

    Raises:
        CheckpointError: on every rank; incomplete (nothing has been loaded then), or of another architecture.
    """
    manifest = _together(world, lambda: read_manifest(path))
    request = sharded_tensors(model, optimizer, loading=True)
    if manifest.layout == _layout(world):
        request["rng"] = random_states(world)
    loaded = _together(world, lambda: _read_state(request, path))
    model.module.load_state_dict(loaded["weights"])
    load_optimizer(optimizer, loaded["optimizer"], loaded["updates"])
    if "rng" in loaded:
        set_random_states(loaded["rng"])


def _read_state(request: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(request, str(path / "state"))
    except (KeyError, ValueError, CheckpointingException, TorchCheckpointException) as error:
        reason = _one_line(error)
        raise CheckpointError(f"{path}: does not fit the model ({reason}); resume the run that wrote it") from error


def _together[R](world: World, action: Callable[[], R]) -> R:
    """Run `action` on every rank; if it raises on one, raise CheckpointError on all: none waits for ever."""
    result, error = None, None
    try:
        result = action()
    except (Exception, TorchCheckpointException) as caught:  # torch's is a BaseException
        error = caught
    text = None if error is None else _one_line(error)
    failures = list(dict.fromkeys(text for text in world.all_gather_objects(text) if text))
    if failures:
        raise CheckpointError("; ".join(failures)) from error
    return cast(R, result)


def _one_line(error: BaseException) -> str:
    if isinstance(error, TorchCheckpointException):
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        return "; ".join(dict.fromkeys(_one_line(cause) for cause in causes))
    text = " ".join(str(error).split())[:500]
    if "inline_container" in text:  # how torch's serialiser puts that a write came back short
        return "a file could not be written to its end"
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def _layout(world: World) -> Layout:
    return Layout(
        ranks=world.size,
        tensor=world.tensor.size,
        pipeline=world.pipeline.size,
        expert=world.expert.size,
        context=world.context.size,
    )


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("torch", "megatron-core")}


class _SaveInProcess(TorchDistSaveShardedStrategy):
    """Megatron's `torch_dist` format through torch's synchronous writer.

    Megatron's own writer is made for saving in the background: every rank first starts a manager process,
    which takes seconds, and only the first rank learns why a write failed.
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
        # Megatron writes this again right after, on the first rank and before a barrier in which the others
        # would wait for ever if there were no room for it. Once it exists there is.
        config = CheckpointingConfig(self.backend, self.version)
        _together(self._world, lambda: save_config(config, str(checkpoint_dir)) if self._world.is_main else None)

"""Process groups: one `World`, built once, from which every parallel function takes what it needs."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mopd.config import ParallelSpec, check_layout
from megatron_mopd.parallel import cpu
from megatron_mopd.yaml_config import ConfigError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of the layout as seen from this rank."""

    size: int
    rank: int
    group: ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Where this rank stands. Experts lie in the tensor x context x data ranks of a pipeline stage."""

    size: int
    rank: int
    device: torch.device
    tensor: Axis
    pipeline: Axis
    context: Axis
    """Ranks that share the tokens of the same micro-batches; to the optimizer they are data-parallel ones."""
    data: Axis
    """Without the context ranks: rollouts are shared out over these."""
    expert: Axis

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather_objects(self, value: Any) -> list[Any]:
        """[size] the small host-side value of every rank, in rank order."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def scatter_objects(self, values: list[Any] | None) -> Any:
        """This rank's element of rank 0's `values` [size]; the other ranks pass None."""
        received: list[Any] = [None]
        dist.scatter_object_list(received, values if self.is_main else None, src=0)
        return received[0]

    def all_to_all_bytes(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """pieces: [size] uint8 in host memory, the r-th for rank r. Returns what each rank had for this one, in rank
        order: sizes[r] bytes from rank r."""
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        dist.all_to_all_single(received, torch.cat(list(pieces)), list(sizes), [len(piece) for piece in pieces])
        return list(received.split(list(sizes)))

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one. Collective."""
        if self.size == 1:
            return flag
        tensor = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item())

    def on_main(self, action: Callable[[], T]) -> T | None:
        """The result of `action`, called on rank 0 only; None elsewhere. A ConfigError is raised on every rank."""
        result, message = None, None
        if self.is_main:
            try:
                result = action()
            except ConfigError as error:
                message = str(error)
        message = self.all_gather_objects(message)[0]
        if message is not None:
            raise ConfigError(message)
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """In-place sum over all ranks."""
        dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """In-place maximum over all ranks."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        dist.barrier()


def start_world(parallel: ParallelSpec, seed: int) -> World:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and lay Megatron's groups over it."""
    cuda = torch.cuda.is_available()
    if cuda:
        if importlib.util.find_spec("transformer_engine") is None:
            raise ConfigError("Transformer Engine is not installed, which the GPU path needs: pip install '.[gpu]'")
        torch.cuda.set_device(_own_gpu())
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # Deprecation notices and hints about absent GPU packages would drown the progress line.
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    check_layout(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(
        size=dist.get_world_size(),
        rank=dist.get_rank(),
        device=device,
        tensor=_axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_axis(parallel_state.get_pipeline_model_parallel_group()),
        context=_axis(parallel_state.get_context_parallel_group()),
        data=_axis(parallel_state.get_data_parallel_group()),
        expert=_axis(parallel_state.get_expert_model_parallel_group()),
    )


def _own_gpu() -> int:
    """LOCAL_RANK, except where the job's launcher shows each rank only its own GPU (`--gpus-per-task=1`)."""
    local, visible = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if visible == 1:
        return 0
    if local >= visible:
        raise ConfigError(
            f"parallel.ranks: rank {local} of this machine has no GPU, {visible} are visible; start fewer"
        )
    return local


def _axis(group: ProcessGroup) -> Axis:
    return Axis(size=dist.get_world_size(group), rank=dist.get_rank(group), group=group)


def stop_world() -> None:
    """Leave the process group; safe to call when it was never joined."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()

"""Any rank of any layout in this one process: Megatron's groups over torch's fake backend, parameters on `meta`.

Nothing is allocated and nothing is sent: real constructors, real shapes. Only one such world exists at a time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_mopd.config import ParallelSpec, check_layout
from megatron_mopd.parallel import cpu
from megatron_mopd.parallel.runtime import Axis, World, stop_world
from megatron_mopd.student.architecture import Architecture, check_architecture

_META = torch.device("meta")


@contextlib.contextmanager
def world_on_paper(parallel: ParallelSpec, size: int, rank: int = 0) -> Iterator[World]:
    """The `World` of `rank` among `size` ranks, none of which exists. Raises ConfigError for a layout that does not fit
    them."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    check_layout(parallel, size)
    if dist.is_initialized():
        raise RuntimeError("a plan needs a process without a process group")
    cpu.install()
    current_device = torch.cuda.current_device
    try:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        torch.cuda.current_device = lambda: _META  # type: ignore[assignment, return-value]
        with torch.random.fork_rng(devices=[]), _META:
            model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            yield _world(parallel_state)
    finally:
        torch.cuda.current_device = current_device
        stop_world()


def _world(parallel_state: Any) -> World:
    def axis(group: dist.ProcessGroup) -> Axis:
        return Axis(size=dist.get_world_size(group), rank=dist.get_rank(group), group=group)

    return World(
        size=dist.get_world_size(),
        rank=dist.get_rank(),
        device=_META,
        tensor=axis(parallel_state.get_tensor_model_parallel_group()),
        pipeline=axis(parallel_state.get_pipeline_model_parallel_group()),
        context=axis(parallel_state.get_context_parallel_group()),
        data=axis(parallel_state.get_data_parallel_group()),
        expert=axis(parallel_state.get_expert_model_parallel_group()),
    )


def build_on_paper(arch: Architecture, parallel: ParallelSpec, size: int, rank: int = 0) -> GPTModel:
    """The part of the student that `rank` of `size` holds, by the program's own constructor, without memory.

    Raises ConfigError for a layout that fits neither the ranks nor the model.
    """
    from megatron_mopd.student.model import build_model

    check_architecture(arch, parallel)
    with world_on_paper(parallel, size, rank) as world, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Megatron, about its own defaults
        return build_model(arch, parallel, world, torch.bfloat16, training=True)

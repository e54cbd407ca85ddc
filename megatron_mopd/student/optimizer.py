"""Megatron's DistributedDataParallel and distributed optimizer around the student."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_mopd.config import OptimSpec
from megatron_mopd.parallel.adamw import OffloadedAdamW
from megatron_mopd.parallel.cpu import cuda_type_names


def wrap(model: GPTModel, spec: OptimSpec) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """Give the student gradient buffers (fp32, summed over data parallel) and a sharded AdamW."""
    if spec.freeze_router:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("router" not in name)
    config = model.config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,  # `Student.update` does, and says which domain
    )
    wrapped = DistributedDataParallel(config, ddp_config, model)
    # Megatron's schedules call these back through the model's configuration.
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped.no_sync
    bf16 = config.params_dtype == torch.bfloat16
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.betas[0],
        adam_beta2=spec.betas[1],
        adam_eps=spec.eps,
        clip_grad=spec.clip_grad,
        bf16=bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
    )
    with cuda_type_names(), _adam(spec), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = get_megatron_optimizer(optimizer_config, [wrapped])
    return wrapped, optimizer


@contextlib.contextmanager
def _adam(spec: OptimSpec) -> Iterator[None]:
    """While Megatron builds its optimizer: the class that steps, where that is not Megatron's choice."""
    if not spec.offload:
        yield
        return
    original = megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = OffloadedAdamW, False
    try:
        yield
    finally:
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = original


def learning_rate(spec: OptimSpec, step: int, total_steps: int) -> float:
    """Rate of update `step` (from 0): linear warm-up from 0, then `schedule` down to `min_lr` at the last one."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    if spec.schedule == "constant":
        return spec.lr
    progress = min(1.0, (step + 1 - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps))
    left = 1 - progress if spec.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return spec.min_lr + (spec.lr - spec.min_lr) * left

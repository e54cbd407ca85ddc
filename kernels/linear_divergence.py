"""Divergence over the vocabulary from hidden states, without a [T, vocab] tensor.

The full-vocabulary objective of on-policy distillation as in DeepSeek-V4: only the teacher's last hidden
states are kept and both sets of logits are rebuilt block by block. Forward and backward are written by hand
because autograd does not differentiate a collective: the loss would be exact under tensor parallelism and its
gradient wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels import sweep
from kernels.dispatch import Implementation, row_kernels
from kernels.divergence import DivergenceStats
from kernels.layer_blocks import KEPT_ELEMENTS, Teachers
from kernels.linear_passes import InForward, Keep, LinearJob, Recompute
from kernels.objective import DivergenceKind, Objective, check_tokens, check_weights
from kernels.output_layer import check_layer
from kernels.shard import VocabShard

GradientPlan = Literal["auto", "in_forward", "recompute"]


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor],
    teacher_weight: Tensor | Sequence[Tensor],
    kind: DivergenceKind = "reverse_kl",
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    shard: VocabShard | None = None,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    teacher_index: Tensor | None = None,
    teacher_mixture: Sequence[float] | None = None,
    token_ids: Tensor | None = None,
    chunk_tokens: int | None = None,
    gradient: GradientPlan = "auto",
    main_grad: Tensor | None = None,
    impl: Implementation = "auto",
    return_stats: bool = False,
) -> DivergenceStats:
    """weights * D(p, q) per row in nats, p = softmax(X W^T / temperature), q likewise of the teacher (a constant).
    `Objective` lists the kinds; reverse_kl is sum_j p_j (log p_j - log q_j).

    Shapes: student_hidden [T, H], student_weight [rows, H], teacher_hidden [T, Ht], teacher_weight [rows, Ht]; rows
    are this rank's (`shard`; None: the whole vocabulary is here). Several teachers are lists of heads: with
    teacher_index [T], sorted, row i has teacher_index[i] (hidden states: a list, one entry a head with its rows
    only, or one tensor [T, Ht]); with teacher_mixture [K] every row has the softmax of sum_k w_k t_k. weights [T]:
    constants, rows of weight 0 cost nothing on a CPU.

    Gradient: dz as in `divergence`; dW = dz^T X; dX = dz W. **dX is this rank's share: the caller sums it over
    `shard.group`** (Megatron's reduce-scatter under sequence parallelism), as the backward of its copy to the
    tensor-parallel region does. dW is complete. Both are summed in fp32 and come in the dtype of their inputs;
    with `main_grad` (fp32 [rows, H]) dW is added to it instead, as Megatron's `gradient_accumulation_fusion` does.

    gradient: "recompute" makes the logits again in backward: 6 matrix products, blocks of 16 MiB whatever T and the
    vocabulary, [T, H] in fp32 for dX. "in_forward" has 4, chunks of 64 MiB of logits and holds dW from forward to
    backward; it needs the same upstream gradient for every row (use `weights`), else backward raises ValueError.
    "auto" recomputes, but for a problem of up to 2^20 logits, of one teacher, which are kept.

    Collectives: one all-gather of [6, T] (8, 12: see `divergence`) in forward if `shard.group` has several ranks,
    one more of [2, T] for jsd; with "in_forward" these once a chunk; none in backward. Every rank gets the same
    bits. Ranks may differ in `chunk_tokens` unless the gradient comes in forward.

    Raises ValueError when shapes, dtypes, devices, ids or options do not fit.
    """
    objective = Objective(kind, alpha, beta, temperature)
    if gradient not in ("auto", "in_forward", "recompute"):
        raise ValueError(f"gradient must be auto, in_forward or recompute, got '{gradient}'")
    tokens, device = len(student_hidden), student_hidden.device
    teachers = Teachers.of(teacher_hidden, teacher_weight, teacher_index, teacher_mixture, tokens)
    shard = shard or _whole(student_weight, teachers)
    check_layer("student_", student_hidden, student_weight, shard)
    teachers.check(shard, student_hidden)
    check_weights(weights, tokens, device)
    if token_ids is not None:
        check_tokens(token_ids, tokens, device, shard.vocab_size)
    _check_main_grad(main_grad, student_weight)
    teachers = _detached(teachers)
    elements = tokens * shard.rows
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    kernels = row_kernels(impl, device, torch.float32 if student_hidden.dtype != torch.float64 else torch.float64,
                          elements)  # fmt: skip
    job = LinearJob(sweep.Job(objective, shard, kernels, token_ids, return_stats), teachers, chunk_tokens, main_grad)
    few = elements <= KEPT_ELEMENTS and (chunk_tokens or tokens) >= tokens and weights is None and not teachers.bounds
    differentiable = torch.is_grad_enabled() and (student_hidden.requires_grad or student_weight.requires_grad)
    function: type[torch.autograd.Function]
    if gradient == "in_forward" and differentiable:
        function = InForward
    else:
        function = Keep if gradient == "auto" and few and differentiable else Recompute
    found = function.apply(student_hidden, student_weight, weights, job, *teachers.tensors())
    value, statistics = found
    if return_stats:
        return DivergenceStats.of(value, statistics, token_ids is not None)
    return DivergenceStats(value, statistics)


def _detached(teachers: Teachers) -> Teachers:
    hidden, weight = (tuple(each.detach() for each in tensors) for tensors in (teachers.hidden, teachers.weight))
    return Teachers(hidden, weight, teachers.bounds, teachers.mixture)


def _whole(student_weight: Tensor, teachers: Teachers) -> VocabShard:
    for weight in teachers.weight:
        if student_weight.shape[:1] != weight.shape[:1]:
            shapes = f"{tuple(student_weight.shape)} and {tuple(weight.shape)}"
            raise ValueError(f"student and teacher weight have shapes {shapes}: pass a shard if some rows are padding")
    return VocabShard.whole(student_weight.shape[0])


def _check_main_grad(main_grad: Tensor | None, weight: Tensor) -> None:
    if main_grad is None:
        return
    if main_grad.shape != weight.shape or main_grad.dtype != torch.float32 or main_grad.device != weight.device:
        given = f"{tuple(main_grad.shape)} {main_grad.dtype} on {main_grad.device}"
        raise ValueError(f"main_grad is {given}: expected {tuple(weight.shape)} torch.float32 on {weight.device}")

"""Exact KL(student || teacher) over the vocabulary from hidden states, without a [T, vocab] tensor.

The full-vocabulary objective of on-policy distillation as in DeepSeek-V4: only the teacher's last hidden
states are kept and both sets of logits are rebuilt chunk by chunk. Forward and backward are written by hand
because autograd does not differentiate a collective: the loss would be exact under tensor parallelism and its
gradient wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.output_layer import LayerGradients, OutputLayer, Plan, accumulation_dtype, check_layer, make_plan
from kernels.partials import divergence_terms, merge_divergence
from kernels.shard import VocabShard

DivergenceKind = Literal["reverse_kl"]


@dataclass(frozen=True, slots=True)
class DivergenceStats:
    """Per row, in nats; fp32 (float64 for float64 hidden states)."""

    divergence: Tensor
    """[T] differentiable in the student's hidden states and weight."""
    student_entropy: Tensor
    """[T] detached."""


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: DivergenceKind = "reverse_kl",
    shard: VocabShard | None = None,
    chunk_tokens: int | None = None,
) -> DivergenceStats:
    """Reverse KL of each row: sum_j p_j (log p_j - log q_j), p = softmax(X W^T), q likewise of the teacher.

    Shapes: student_hidden [T, H], student_weight [rows, H], teacher_hidden [T, Ht], teacher_weight
    [rows, Ht]; rows are this rank's (`shard`; None: the whole vocabulary is here). The teacher is a constant.

    Gradient: dz_j = g p_j (log p_j - log q_j - KL); dW = dz^T X; dX = dz W. **dX is this rank's share: the
    caller sums it over `shard.group`**, as the backward of Megatron's copy to the tensor-parallel region
    does. dW is complete. Both are summed in fp32 and come in the dtype of their inputs.

    Collectives: one all-gather of [6, T] in forward if `shard.group` has several ranks, none in backward.
    Every rank gets the same bits. Ranks may differ in `chunk_tokens` (default: chunks of 2^24 logits).

    Raises ValueError when shapes, dtypes or devices do not fit, or for another `kind`.
    """
    if kind != "reverse_kl":
        raise ValueError(f"kind must be 'reverse_kl', got '{kind}'")
    if shard is None:
        if student_weight.shape[:1] != teacher_weight.shape[:1]:
            shapes = f"{tuple(student_weight.shape)} and {tuple(teacher_weight.shape)}"
            raise ValueError(f"student and teacher weight have shapes {shapes}: pass a shard if some rows are padding")
        shard = VocabShard.whole(student_weight.shape[0])
    check_layer("student_", student_hidden, student_weight, shard)
    check_layer("teacher_", teacher_hidden, teacher_weight, shard)
    if student_hidden.shape[0] != teacher_hidden.shape[0] or student_hidden.device != teacher_hidden.device:
        student, teacher = (f"{len(h)} rows on {h.device}" for h in (student_hidden, teacher_hidden))
        raise ValueError(f"student_hidden has {student}, teacher_hidden {teacher}: they must describe the same tokens")
    plan = make_plan(shard, chunk_tokens, student_hidden, student_weight)
    divergence, entropy = _reverse_kl(
        student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach(), plan
    )
    return DivergenceStats(divergence, entropy)


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(hidden.dtype)
        student = OutputLayer(hidden, weight, plan.shard.rows, dtype)
        teacher = OutputLayer(teacher_hidden, teacher_weight, plan.shard.rows, dtype)
        packet = torch.empty(6, hidden.shape[0], dtype=dtype, device=hidden.device)
        for chunk in plan.chunks:
            terms = divergence_terms(student.logits(chunk), teacher.logits(chunk))
            packet[:, chunk] = terms.sums
        kl, entropy, rows = merge_divergence(plan.shard.gather(packet), packet)
        source = terms[1:] if plan.keep else (_savable(teacher_hidden), _savable(teacher_weight))
        ctx.save_for_backward(hidden, weight, rows, *source)
        ctx.plan = plan
        ctx.mark_non_differentiable(entropy)
        return kl, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, rows, *source = ctx.saved_tensors
        plan: Plan = ctx.plan
        m, n, probability, mean = rows[:, :, None].unbind(0)
        scale = grad[:, None] * probability
        student = OutputLayer(hidden, weight, plan.shard.rows, rows.dtype)
        gradients = LayerGradients(student, hidden=ctx.needs_input_grad[0], weight=ctx.needs_input_grad[1])
        if plan.keep:
            exponentials, differences = source
            dlogits = torch.sub(differences, mean).mul_(exponentials).mul_(scale)
            gradients.add(plan.chunks[0], dlogits)
        else:
            teacher_hidden, teacher_weight = source
            teacher = OutputLayer(teacher_hidden, teacher_weight, plan.shard.rows, rows.dtype)
            for chunk in plan.chunks:
                x = student.logits(chunk).sub_(m[chunk])
                y = teacher.logits(chunk).sub_(n[chunk])
                difference = torch.sub(x, y, out=y)
                gradients.add(chunk, difference.sub_(mean[chunk]).mul_(x.exp_()).mul_(scale[chunk]))
        return gradients.hidden_gradient(), gradients.weight_gradient(weight), None, None, None


_reverse_kl: Callable[..., tuple[Tensor, Tensor]] = _ReverseKL.apply


def _savable(tensor: Tensor) -> Tensor:
    """Teachers are scored in inference mode; autograd refuses to keep such a tensor, but takes a copy."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor

"""The three ways to get the gradient of `linear_divergence`: keep, make again, or have it already in forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import sweep
from kernels.dispatch import fused_layers
from kernels.layer_blocks import LayerBlocks, Teachers, cut, whole_chunk
from kernels.objective import accumulation_dtype, active_runs, split
from kernels.output_layer import LayerGradients, OutputLayer
from kernels.partials import Joined


@dataclass(frozen=True, slots=True)
class LinearJob:
    base: sweep.Job
    teachers: Teachers
    """Its tensors are constants; backward takes them from autograd's hands, so that a change in place is noticed."""
    chunk_tokens: int | None
    main_grad: Tensor | None

    def blocks(self, hidden: Tensor, weight: Tensor, weights: Tensor | None, teachers: Teachers) -> LayerBlocks:
        layer = OutputLayer(hidden, weight, self.base.shard.rows, accumulation_dtype(hidden.dtype))
        fused = None if self.base.stats else fused_layers(self.base.kernels)
        if fused is not None and fused.fits(self.base.objective, teachers, hidden):
            return fused.FusedBlocks(layer, teachers, self.chunk_tokens, weights, self.base.objective)
        slabs, chunks = cut(len(hidden), len(layer.weight), hidden.shape[1], self.chunk_tokens, weights)
        return LayerBlocks(layer, teachers, slabs, chunks, self.base.objective.temperature)

    def restored(self, tensors: tuple[Tensor, ...]) -> Teachers:
        count = len(tensors) // 2
        return Teachers(tensors[:count], tensors[count:], self.teachers.bounds, self.teachers.mixture)


def _savable(tensor: Tensor) -> Tensor:
    """Teachers are scored in inference mode; autograd refuses to keep such a tensor, but takes a copy."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def _report(job: LinearJob, joined: Joined, dtype: torch.dtype) -> Tensor:
    """[6, T] with statistics, else [T] the student's entropy."""
    if job.base.stats:
        return sweep.statistics(job.base, joined, dtype)
    return joined.student_entropy().to(dtype)


def _collector(ctx: Any, job: LinearJob, layer: OutputLayer, weight: Tensor) -> LayerGradients:
    return LayerGradients(
        layer, weight, hidden=ctx.needs_input_grad[0], weight=ctx.needs_input_grad[1], main_grad=job.main_grad
    )


def _weight_gradient(job: LinearJob, weight: Tensor, gradients: LayerGradients) -> Tensor | None:
    if job.main_grad is not None and hasattr(weight, "grad_added_to_main_grad"):
        # Megatron's hook waits for a gradient, and with this flag does not look at it.
        weight.grad_added_to_main_grad = True
        return weight.new_zeros(1).expand_as(weight)
    return gradients.weight_gradient()


class Keep(torch.autograd.Function):
    """Few logits, one teacher: forward leaves them to backward, which then has four matrix products instead of six."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, weights: None, job: LinearJob, *teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        layer = OutputLayer(hidden, weight, job.base.shard.rows, accumulation_dtype(hidden.dtype))
        tokens, rows = slice(0, len(hidden)), slice(0, len(layer.weight))
        blocks = LayerBlocks(layer, job.teachers, (rows,), (tokens,), job.base.objective.temperature)
        held = sweep.Held(blocks.student(rows, tokens), blocks.teacher(rows, tokens))
        result = sweep.forward(job.base, held, None)
        ctx.save_for_backward(hidden, weight, held.z, held.t, result.joined.sums, result.pair)
        ctx.job = job
        report = _report(job, result.joined, blocks.dtype)
        ctx.mark_non_differentiable(report)
        return result.value.to(blocks.dtype), report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, z, t, sums, pair = ctx.saved_tensors
        job: LinearJob = ctx.job
        layer = OutputLayer(hidden, weight, job.base.shard.rows, z.dtype)
        rows = sweep.coefficients(job.base, (sums, pair), upstream, z.dtype)
        dlogits = sweep.gradient(job.base, z, t, rows, torch.empty_like(z, dtype=layer.dlogits_dtype))
        gradients = _collector(ctx, job, layer, weight)
        every = slice(0, len(layer.weight))
        gradients.add(every, slice(0, len(hidden)), dlogits)
        gradients.finish_slab(every)
        weight_gradient = _weight_gradient(job, weight, gradients)
        return gradients.hidden_gradient(), weight_gradient, None, None, *[None] * len(job.teachers.tensors())


class Recompute(torch.autograd.Function):
    """No logits survive forward: the memory floor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, weights: Tensor | None, job: LinearJob, *teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        blocks = job.blocks(hidden, weight, weights, job.teachers)
        result = sweep.forward(job.base, blocks, weights)
        saved = map(_savable, teacher)
        ctx.save_for_backward(hidden, weight, weights, result.joined.sums, result.pair, *saved)
        ctx.job = job
        report = _report(job, result.joined, blocks.dtype)
        ctx.mark_non_differentiable(report)
        return result.value.to(blocks.dtype), report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, weights, sums, pair, *teacher = ctx.saved_tensors
        job: LinearJob = ctx.job
        blocks = job.blocks(hidden, weight, weights, job.restored(tuple(teacher)))
        scale = upstream if weights is None else upstream * weights
        rows = sweep.coefficients(job.base, (sums, pair), scale, blocks.dtype)
        gradients = _collector(ctx, job, blocks.layer, weight)
        sweep.backward(job.base, blocks, rows, gradients)
        weight_gradient = _weight_gradient(job, weight, gradients)
        return gradients.hidden_gradient(), weight_gradient, None, None, *[None] * len(teacher)


class InForward(torch.autograd.Function):
    """The gradient of the logits chunk by chunk while they are there; backward has the matrix products.

    What is kept is whichever is smaller: dlogits of all tokens, in 16 bits where the layer multiplies those, or dW.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, weights: Tensor | None, job: LinearJob, *teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        base, dtype = job.base, accumulation_dtype(hidden.dtype)
        layer = OutputLayer(hidden, weight, base.shard.rows, dtype)
        # From what all ranks know, so that all have the same chunks: there is a collective in each.
        size = job.chunk_tokens or whole_chunk(-(-base.shard.vocab_size // base.shard.ranks), hidden.device)
        runs, every = active_runs(weights, len(hidden)), slice(0, len(layer.weight))
        blocks = LayerBlocks(layer, job.teachers, (every,), split(runs, size), base.objective.temperature)
        value = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        report = value.new_zeros((6, len(hidden)) if base.stats else len(hidden))
        gradients = _collector(ctx, LinearJob(base, job.teachers, None, None), layer, weight)
        kept = _room_for_dlogits(layer)
        for chunk in blocks.chunks:
            held = sweep.Held(blocks.student(every, chunk), blocks.teacher(every, chunk))
            ids = None if base.token_ids is None else base.token_ids[chunk]
            part = sweep.Job(base.objective, base.shard, base.kernels, ids, base.stats)
            unit = torch.ones_like(value[chunk]) if weights is None else weights[chunk].to(dtype)
            result = sweep.forward(part, held, unit)
            value[chunk] = result.value.to(dtype)
            report[..., chunk] = _report(LinearJob(part, job.teachers, None, None), result.joined, dtype)
            rows = sweep.coefficients(part, (result.joined.sums, result.pair), unit, dtype)
            room = layer.room(held.z) if kept is None else kept[chunk]
            dlogits = sweep.gradient(part, held.z, held.t, rows, room)
            if kept is None:
                gradients.add(every, chunk, dlogits)
        ctx.job, ctx.gradients, ctx.kept, ctx.runs = job, gradients, kept, runs
        ctx.save_for_backward(hidden, weight, weights)
        ctx.mark_non_differentiable(report)
        return value, report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _hidden, weight, weights = ctx.saved_tensors
        job, found, layer = ctx.job, ctx.gradients, ctx.gradients.layer
        factor = _uniform(upstream, weights) if found.want_weight else None
        if ctx.kept is not None:
            found = _products_of_kept(ctx, layer, weight, factor)
        hidden_gradient = weight_gradient = None
        if found.hidden_sum is not None:
            hidden_gradient = (found.hidden_sum * upstream[:, None]).to(layer.hidden.dtype)
        elif found.want_hidden:
            hidden_gradient = torch.zeros_like(layer.hidden)
        if factor is not None:
            whole = found
            if ctx.kept is None:
                whole = LayerGradients(layer, weight, hidden=False, weight=True, main_grad=job.main_grad)
                whole.take(found, factor)
            weight_gradient = _weight_gradient(job, weight, whole)
        return hidden_gradient, weight_gradient, None, None, *[None] * len(job.teachers.tensors())


def _room_for_dlogits(layer: OutputLayer) -> Tensor | None:
    """[T, rows], unless dW in the accumulation dtype is smaller."""
    tokens, (rows, width) = len(layer.hidden), layer.weight.shape
    if tokens * layer.dlogits_dtype.itemsize > width * layer.dtype.itemsize:
        return None
    return torch.empty(tokens, rows, dtype=layer.dlogits_dtype, device=layer.hidden.device)


def _products_of_kept(ctx: Any, layer: OutputLayer, weight: Tensor, factor: Tensor | None) -> LayerGradients:
    """dX without the upstream gradient, and dW with it."""
    gradients = _collector(ctx, ctx.job, layer, weight)
    if factor is not None and (factor.is_cuda or factor != 1.0):  # looking at it would stall a GPU
        gradients.weight_factor = factor
    slabs, _ = cut(len(layer.hidden), len(layer.weight), layer.hidden.shape[1], None, None)
    for slab in slabs:
        for run in ctx.runs:
            gradients.add(slab, run, ctx.kept[run, slab])
        gradients.finish_slab(slab)
    return gradients


def _uniform(upstream: Tensor, weights: Tensor | None) -> Tensor:
    """The one value of `upstream` [T] where the weights are not zero."""
    active = upstream if weights is None else upstream[weights != 0]
    if not active.numel():
        return upstream.new_zeros(())
    low, high = active.aminmax()
    if low != high:
        raise ValueError(
            f"gradient='in_forward' took the weight's gradient for one upstream gradient of all rows, but it is "
            f"{float(low)} to {float(high)}: pass the factors of the rows as `weights`, or gradient='recompute'"
        )
    return low

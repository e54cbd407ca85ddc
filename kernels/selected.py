"""Log-probs of k given tokens a row, vocabulary-parallel: behind `token_logprob` (k = 1) and `topk_divergence`.

With sums m, Z, A as in `rows_torch` about the global maximum: log p_i = z_i - m - log Z, entropy = log Z - A/Z, and
with h_i the upstream gradient of log p_i    dz_j = sum_i h_i 1[j = i] - p_j sum_i h_i, over the temperature.
An id of -1 is an unused place: log-prob -inf, no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import RowKernels
from kernels.divergence import LogitBlocks
from kernels.layer_blocks import LayerBlocks, Teachers, cut
from kernels.objective import accumulation_dtype
from kernels.output_layer import LayerGradients, OutputLayer
from kernels.partials import PACKETS, combine_tokens
from kernels.rows_torch import EMPTY_SHARD_MAX
from kernels.shard import VocabShard


@dataclass(frozen=True, slots=True)
class TokenJob:
    """What all passes of one call share."""

    shard: VocabShard
    kernels: RowKernels
    temperature: float
    chunk_tokens: int | None = None
    top: bool = False
    """Whether the most likely token is wanted."""
    inplace: bool = False

    def layer_blocks(self, hidden: Tensor, weight: Tensor) -> LayerBlocks:
        layer = OutputLayer(hidden, weight, self.shard.rows, accumulation_dtype(hidden.dtype))
        slabs, chunks = cut(len(hidden), len(layer.weight), hidden.shape[1], self.chunk_tokens, None)
        return LayerBlocks(layer, Teachers((), ()), slabs, chunks, self.temperature)

    def local(self, ids: Tensor, slab: slice) -> tuple[Tensor, Tensor]:
        """[C, k] places of global ids in the slab (some place if not there), and whether they are there."""
        local = ids.long() - (self.shard.start + slab.start)
        owned = (ids >= 0) & (local >= 0) & (local < slab.stop - slab.start)
        return local.clamp_(0, max(slab.stop - slab.start - 1, 0)), owned


def join(job: TokenJob, blocks: LayerBlocks | LogitBlocks, ids: Tensor) -> Tensor:
    """[3 + k (+ 1), T] float64 of ids [T, k]: m, Z, A, the z, perhaps the top id. One all-gather."""
    k = ids.shape[1]
    parts: list[Tensor] = []
    for slab in blocks.slabs:
        packet = torch.zeros(3 + k + job.top, blocks.tokens, dtype=blocks.dtype, device=blocks.device)
        for chunk in blocks.chunks:
            logits = blocks.student(slab, chunk)
            local, owned = job.local(ids[chunk], slab)
            if k == 1:
                packet[:4, chunk] = job.kernels.token_sums(logits, local[:, 0].contiguous(), owned[:, 0].contiguous())
            elif logits.shape[1]:
                first, nowhere = local.new_zeros(len(local)), owned.new_zeros(len(owned))
                packet[:3, chunk] = job.kernels.token_sums(logits, first, nowhere)[:3]
                packet[3 : 3 + k, chunk] = torch.where(owned, logits.gather(1, local).to(blocks.dtype), 0.0).t()
            else:
                packet[0, chunk] = EMPTY_SHARD_MAX
            if job.top and logits.shape[1]:
                packet[-1, chunk] = (logits.argmax(-1) + (job.shard.start + slab.start)).to(blocks.dtype)
        parts.append(packet.double())
        if len(parts) == PACKETS:
            parts = [combine_tokens(torch.stack(parts), job.top)]
    own = parts[0] if len(parts) == 1 else combine_tokens(torch.stack(parts), job.top)
    return combine_tokens(job.shard.gather(own.to(blocks.dtype)), job.top)


def outputs(job: TokenJob, sums: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """log-probs [T, k], entropy [T], top id [T] int64 (empty if not asked for)."""
    log_z = sums[1].log()
    logprobs = (sums[3 : 3 + ids.shape[1]] - sums[0] - log_z).t()
    logprobs = torch.where(ids >= 0, logprobs, -torch.inf)
    top = sums[-1].long() if job.top else ids.new_empty(0)
    return logprobs.to(dtype), (log_z - sums[2] / sums[1]).to(dtype), top


def gradient(job: TokenJob, logits: Tensor, local: Tensor, owned: Tensor, m: Tensor, z: Tensor, h: Tensor,
             out: Tensor) -> Tensor:  # fmt: skip
    """dlogits of a block into `out` (perhaps `logits`): h [C, k] upstream over the temperature, m and z [C]."""
    if logits.shape[1] == 0:
        return out
    dtype = accumulation_dtype(logits.dtype)
    one = h.shape[1] == 1
    rows = torch.stack((m, -h.sum(-1) / z, h[:, 0] if one else torch.zeros_like(m))).to(dtype)
    ids = local[:, 0].contiguous() if one else local.new_zeros(len(local))
    here = owned[:, 0].contiguous() if one else owned.new_zeros(len(owned))
    exact = one or out.dtype == dtype
    # Where p is near 1, h - p sum h is small: p's part must not be rounded to bf16 first. `out` may be `logits`.
    places = None if exact else (logits.gather(1, local).to(dtype) - rows[0, :, None]).exp_().mul_(rows[1, :, None])
    job.kernels.token_gradient(logits, ids, here, rows, out)
    if not one:  # p's part is in `out`
        hits = torch.where(owned, h, 0.0).to(dtype)
        if places is None:
            out.scatter_add_(1, local, hits)
        else:
            out.scatter_(1, local, _sum_at(local, places, hits).to(out.dtype))
    return out


def _sum_at(local: Tensor, places: Tensor, hits: Tensor) -> Tensor:
    """places plus all hits of the same place: ids that are not here share place 0 or the last with nothing to add."""
    same = local[:, :, None] == local[:, None, :]
    return places + (same * hits[:, None, :]).sum(-1)


def _scaled(job: TokenJob, upstream: Tensor, ids: Tensor) -> Tensor:
    return torch.where(ids >= 0, upstream.double(), 0.0) / job.temperature


class FromLayer(torch.autograd.Function):
    """hidden [T, H], weight [rows, H], ids [T, k] -> log-probs [T, k], entropy [T], top ids."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, job: TokenJob
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        blocks = job.layer_blocks(hidden, weight)
        sums = join(job, blocks, ids)
        ctx.save_for_backward(hidden, weight, ids, sums)
        ctx.job = job
        logprobs, entropy, top = outputs(job, sums, ids, blocks.dtype)
        ctx.mark_non_differentiable(entropy, top)
        return logprobs, entropy, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, sums = ctx.saved_tensors
        job: TokenJob = ctx.job
        blocks = job.layer_blocks(hidden, weight)
        h = _scaled(job, upstream, ids)
        wanted = ctx.needs_input_grad
        gradients = LayerGradients(blocks.layer, weight, hidden=wanted[0], weight=wanted[1])
        for slab in blocks.slabs:
            for chunk in blocks.chunks:
                logits = blocks.student(slab, chunk)
                local, owned = job.local(ids[chunk], slab)
                room = gradients.room(logits)
                part = gradient(job, logits, local, owned, sums[0, chunk], sums[1, chunk], h[chunk], room)
                gradients.add(slab, chunk, part)
            gradients.finish_slab(slab)
        return gradients.hidden_gradient(), gradients.weight_gradient(), None, None


class Keep(torch.autograd.Function):
    """`FromLayer` of few logits: forward leaves them to backward, which then has two matrix products, not three."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, job: TokenJob
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        blocks = job.layer_blocks(hidden, weight)
        logits = blocks.student(slice(0, job.shard.rows), slice(0, len(hidden)))
        sums = join(job, LogitBlocks(logits, logits, None, 1.0, False), ids)
        ctx.save_for_backward(hidden, weight, ids, sums, logits)
        ctx.job = job
        logprobs, entropy, top = outputs(job, sums, ids, blocks.dtype)
        ctx.mark_non_differentiable(entropy, top)
        return logprobs, entropy, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids, sums, logits = ctx.saved_tensors
        job: TokenJob = ctx.job
        layer = job.layer_blocks(hidden, weight).layer
        rows = slice(0, job.shard.rows)
        local, owned = job.local(ids, rows)
        room = torch.empty_like(logits, dtype=layer.dlogits_dtype)
        dlogits = gradient(job, logits, local, owned, sums[0], sums[1], _scaled(job, upstream, ids), room)
        wanted = ctx.needs_input_grad
        gradients = LayerGradients(layer, weight, hidden=wanted[0], weight=wanted[1])
        gradients.add(rows, slice(0, len(hidden)), dlogits)
        gradients.finish_slab(rows)
        return gradients.hidden_gradient(), gradients.weight_gradient(), None, None


class FromLogits(torch.autograd.Function):
    """logits [T, columns], ids [T, k] -> log-probs [T, k], entropy [T], top ids."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, ids: Tensor, job: TokenJob) -> tuple[Tensor, Tensor, Tensor]:
        logits = padded[:, : job.shard.rows]
        blocks = LogitBlocks(logits, logits, None, job.temperature, job.top)
        sums = join(job, blocks, ids)
        ctx.save_for_backward(padded, ids, sums)
        ctx.job, ctx.spent = job, False
        logprobs, entropy, top = outputs(job, sums, ids, blocks.dtype)
        ctx.mark_non_differentiable(entropy, top)
        return logprobs, entropy, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise ValueError("second backward through an in-place gradient: it has replaced the logits")
        padded, ids, sums = ctx.saved_tensors
        job: TokenJob = ctx.job
        logits = padded[:, : job.shard.rows]
        blocks = LogitBlocks(logits, logits, None, job.temperature, False)
        h = _scaled(job, upstream, ids)
        with torch.no_grad():
            out = padded if job.inplace else torch.empty_like(padded)
            ctx.spent = job.inplace
            out[:, job.shard.rows :] = 0
            for chunk in blocks.chunks:
                local, owned = job.local(ids[chunk], blocks.slabs[0])
                target = out[chunk, : job.shard.rows]
                block = blocks.student(blocks.slabs[0], chunk)
                written = block if job.temperature != 1.0 else target
                gradient(job, block, local, owned, sums[0, chunk], sums[1, chunk], h[chunk], written)
                if written is not target:
                    target.copy_(written)
            if job.inplace:
                torch.autograd.graph.increment_version(padded)
        return out, None, None

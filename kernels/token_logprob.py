"""Log-probability of given tokens from hidden states or logits, without a [T, vocab] tensor of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import Implementation, row_kernels
from kernels.layer_blocks import KEPT_ELEMENTS
from kernels.objective import FLOATS, accumulation_dtype, check_temperature, check_tokens
from kernels.output_layer import LayerGradients, check_layer
from kernels.partials import combine_tokens
from kernels.rows_torch import EMPTY_SHARD_MAX, token_terms
from kernels.selected import FromLayer, FromLogits, TokenJob
from kernels.shard import VocabShard


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per row, in nats; fp32 (float64 for float64 inputs)."""

    logprob: Tensor
    """[T] differentiable in hidden states and weight, or in the logits."""
    entropy: Tensor
    """[T] of the same (tempered) distribution, detached."""
    top: Tensor | None = None
    """[T] int64, the most likely token (of equals the lowest id), if asked for."""


def token_logprob(
    hidden: Tensor,
    weight: Tensor | None,
    token_ids: Tensor,
    *,
    shard: VocabShard | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    top: bool = False,
    impl: Implementation = "auto",
    inplace: bool = False,
) -> TokenStats:
    """log softmax(z / temperature) at `token_ids`, and the entropy of that distribution, for z = X W^T.

    Shapes: hidden [T, H], weight [rows, H] of this rank (`shard`; None: the whole vocabulary), token_ids [T]
    integers in [0, vocab_size), the same on every rank. **weight None: `hidden` are the logits** [T, columns].

    Gradient: dz_j = g (1[j = id] - p_j) / temperature; dW = dz^T X; dX = dz W. **dX is this rank's share: the
    caller sums it over `shard.group`.** dW is complete. Both are summed in fp32 and come in the dtype of their
    inputs. From logits, inplace=True overwrites them with dz, and a second backward raises ValueError.

    Collectives: one all-gather of [4, T] ([5, T] with `top`) in forward if `shard.group` has several ranks, none in
    backward.

    Raises ValueError when shapes, dtypes or devices do not fit, and for a token id outside the vocabulary.
    """
    shard = shard or VocabShard.whole((hidden if weight is None else weight.t()).shape[-1])
    if weight is not None:
        check_layer("", hidden, weight, shard)
    else:
        check_logits(hidden, shard, inplace=inplace)
    check_tokens(token_ids, hidden.shape[0], hidden.device, shard.vocab_size)
    check_temperature(temperature)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if inplace and weight is not None:
        raise ValueError("inplace is for logits: hidden states are not overwritten")
    elements = len(hidden) * shard.rows
    dtype = accumulation_dtype(hidden.dtype) if weight is not None else hidden.dtype
    job = TokenJob(shard, row_kernels(impl, hidden.device, dtype, elements), temperature, chunk_tokens, top, inplace)
    few = elements <= KEPT_ELEMENTS and (chunk_tokens is None or chunk_tokens >= len(hidden))
    if weight is None:
        logprobs, entropy, tops = _from_logits(hidden, token_ids[:, None], job)
    elif few and not top and impl in ("auto", "torch") and torch.is_grad_enabled():
        return TokenStats(*_keep(hidden, weight, token_ids, job))
    else:
        logprobs, entropy, tops = _from_layer(hidden, weight, token_ids[:, None], job)
    return TokenStats(logprobs[:, 0], entropy, tops if top else None)


def check_logits(logits: Tensor, shard: VocabShard, *, inplace: bool = False) -> None:
    if logits.ndim != 2 or logits.dtype not in FLOATS:
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}: expected [T, columns] of a floating dtype")
    if inplace and logits.stride(-1) != 1:
        raise ValueError(f"inplace needs logits whose rows are contiguous, got strides {logits.stride()}")
    shard.check_rows(logits.shape[1], f"logits {tuple(logits.shape)}")


class _Keep(torch.autograd.Function):
    """Few logits: forward leaves its exponentials to backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, job: TokenJob) -> tuple[Tensor, Tensor]:
        blocks = job.layer_blocks(hidden, weight)
        rows, everything = slice(0, job.shard.rows), slice(0, len(hidden))
        local, owned = job.local(token_ids, rows)
        logits = blocks.student(rows, everything)
        if logits.shape[1]:
            own, exponentials = token_terms(logits, local, owned)
        else:
            own, exponentials = logits.new_zeros(4, len(hidden)), logits
            own[0] = EMPTY_SHARD_MAX
        m, z, cross, chosen = combine_tokens(job.shard.gather(own), False)
        log_z = z.log()
        probability = ((own[0] - m).exp() / z).to(blocks.dtype)
        ctx.save_for_backward(hidden, weight, local, owned, probability, exponentials)
        ctx.job = job
        entropy = (log_z - cross / z).to(blocks.dtype)
        ctx.mark_non_differentiable(entropy)
        return (chosen - m - log_z).to(blocks.dtype), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, owned, probability, exponentials = ctx.saved_tensors
        job: TokenJob = ctx.job
        blocks = job.layer_blocks(hidden, weight)
        wanted = ctx.needs_input_grad
        gradients = LayerGradients(blocks.layer, weight, hidden=wanted[0], weight=wanted[1])
        scale = upstream / job.temperature
        dlogits = exponentials * (-scale * probability)[:, None]
        rows = slice(0, job.shard.rows)
        if job.shard.rows:
            dlogits.scatter_add_(1, local[:, None], (scale * owned)[:, None])
        gradients.add(rows, slice(0, len(hidden)), dlogits)
        gradients.finish_slab(rows)
        return gradients.hidden_gradient(), gradients.weight_gradient(), None, None


_keep = cast(Callable[..., tuple[Tensor, Tensor]], _Keep.apply)
_from_layer = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], FromLayer.apply)
_from_logits = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], FromLogits.apply)

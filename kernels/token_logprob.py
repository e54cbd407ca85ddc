"""Log-probability of given tokens from hidden states, without a [T, vocab] tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.output_layer import LayerGradients, OutputLayer, Plan, accumulation_dtype, check_layer, make_plan
from kernels.partials import merge_token, token_terms
from kernels.shard import VocabShard


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Per row, in nats; fp32 (float64 for float64 hidden states)."""

    logprob: Tensor
    """[T] differentiable in hidden states and weight."""
    entropy: Tensor
    """[T] of the same (tempered) distribution, detached."""


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    shard: VocabShard | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> TokenStats:
    """log softmax(X W^T / temperature) at `token_ids`, and the entropy of that distribution.

    Shapes: hidden [T, H], weight [rows, H] of this rank (`shard`; None: the whole vocabulary), token_ids [T]
    integers in [0, vocab_size), the same on every rank.

    Gradient: dz_j = g (1[j = id] - p_j) / temperature; dW = dz^T X; dX = dz W. **dX is this rank's share: the
    caller sums it over `shard.group`.** dW is complete. Both are summed in fp32 and come in the dtype of
    their inputs.

    Collectives: one all-gather of [4, T] in forward if `shard.group` has several ranks, none in backward.

    Raises ValueError when shapes, dtypes or devices do not fit, and for a token id outside the vocabulary.
    """
    if shard is None:
        shard = VocabShard.whole(weight.shape[0])
    check_layer("", hidden, weight, shard)
    _check_tokens(hidden, token_ids, shard.vocab_size)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    plan = make_plan(shard, chunk_tokens, hidden, weight)
    logprob, entropy = _token_logprob(hidden, weight, token_ids, temperature, plan)
    return TokenStats(logprob, entropy)


def _check_tokens(hidden: Tensor, token_ids: Tensor, vocab_size: int) -> None:
    if token_ids.shape != hidden.shape[:1] or token_ids.dtype not in (torch.int64, torch.int32):
        given = f"{tuple(token_ids.shape)} {token_ids.dtype}"
        raise ValueError(
            f"token_ids are {given}: expected ({hidden.shape[0]},) of torch.int64, one for each hidden state"
        )
    if token_ids.device != hidden.device:
        raise ValueError(f"token_ids are on {token_ids.device}, hidden on {hidden.device}")
    if token_ids.numel():
        low, high = (int(bound) for bound in token_ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        shard, dtype = plan.shard, accumulation_dtype(hidden.dtype)
        layer = OutputLayer(hidden, weight, shard.rows, dtype)
        local = token_ids.long() - shard.start
        owned = (local >= 0) & (local < shard.rows)
        local = local.clamp_(0, max(shard.rows - 1, 0))
        packet = torch.empty(4, hidden.shape[0], dtype=dtype, device=hidden.device)
        for chunk in plan.chunks:
            terms = token_terms(_tempered(layer.logits(chunk), temperature), local[chunk], owned[chunk])
            packet[:, chunk] = terms.sums
        logprob, entropy, rows = merge_token(shard.gather(packet), packet)
        ctx.save_for_backward(hidden, weight, local, owned, rows, *(terms[1:] if plan.keep else ()))
        ctx.plan, ctx.temperature = plan, temperature
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, owned, rows, *kept = ctx.saved_tensors
        plan: Plan = ctx.plan
        layer = OutputLayer(hidden, weight, plan.shard.rows, rows.dtype)
        gradients = LayerGradients(layer, hidden=ctx.needs_input_grad[0], weight=ctx.needs_input_grad[1])
        m, probability = rows[:, :, None].unbind(0)
        scale = grad[:, None] / ctx.temperature
        hit, miss = scale * owned[:, None], -scale * probability
        for chunk in plan.chunks:
            if plan.keep:
                dlogits = kept[0] * miss
            else:
                x = _tempered(layer.logits(chunk), ctx.temperature).sub_(m[chunk])
                dlogits = x.exp_().mul_(miss[chunk])
            if plan.shard.rows:
                dlogits.scatter_add_(1, local[chunk, None], hit[chunk])
            gradients.add(chunk, dlogits)
        return gradients.hidden_gradient(), gradients.weight_gradient(weight), None, None, None


_token_logprob: Callable[..., tuple[Tensor, Tensor]] = _TokenLogprob.apply


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)

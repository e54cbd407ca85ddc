"""Log-probability of given tokens from hidden states or logits, without a [T, vocab] tensor of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kernels.dispatch import Implementation, row_kernels
from kernels.layer_blocks import KEPT_ELEMENTS
from kernels.objective import FLOATS, accumulation_dtype, check_temperature, check_tokens
from kernels.output_layer import check_layer
from kernels.selected import FromLayer, FromLogits, Keep, TokenJob
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
    else:
        function = _keep if few and torch.is_grad_enabled() else _from_layer
        logprobs, entropy, tops = function(hidden, weight, token_ids[:, None], job)
    return TokenStats(logprobs[:, 0], entropy, tops if top else None)


def check_logits(logits: Tensor, shard: VocabShard, *, inplace: bool = False) -> None:
    if logits.ndim != 2 or logits.dtype not in FLOATS:
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}: expected [T, columns] of a floating dtype")
    if inplace and logits.stride(-1) != 1:
        raise ValueError(f"inplace needs logits whose rows are contiguous, got strides {logits.stride()}")
    shard.check_rows(logits.shape[1], f"logits {tuple(logits.shape)}")


_keep = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], Keep.apply)
_from_layer = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], FromLayer.apply)
_from_logits = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], FromLogits.apply)

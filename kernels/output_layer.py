"""Logits of a token chunk and the gradients they send back, in the accumulation dtype.

Logits are never rounded to bf16: at a KL of 1e-3 that alone makes the reverse-KL gradient 96 % wrong.
bf16 operands are multiplied exactly and summed in fp32, on tensor cores where there are any.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.shard import VocabShard

CHUNK_ELEMENTS = 1 << 24
"""Logits in a default chunk: 64 MiB in fp32, whatever the vocabulary."""

KEPT_ELEMENTS = 1 << 20
"""Up to here (4 MiB in fp32) backward keeps forward's exponentials: cheaper than making the logits again."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays what it is (tests); everything else accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_layer(name: str, hidden: Tensor, weight: Tensor, shard: VocabShard) -> None:
    """ValueError unless hidden [T, H] and weight [rows, H] fit one another and the shard."""
    shapes = f"{name}hidden {tuple(hidden.shape)}, {name}weight {tuple(weight.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{shapes}: expected [T, H] and [rows, H]")
    if hidden.dtype != weight.dtype or hidden.dtype not in FLOATS:
        raise ValueError(f"{name}hidden is {hidden.dtype}, {name}weight {weight.dtype}: expected one floating dtype")
    if hidden.device != weight.device:
        raise ValueError(f"{name}hidden is on {hidden.device}, {name}weight on {weight.device}")
    surplus = weight.shape[0] - shard.rows
    if surplus < 0 or (surplus > 0 and shard.stop < shard.vocab_size):
        held = f"rows [{shard.start}, {shard.stop}) of {shard.vocab_size}"
        raise ValueError(f"{shapes}: the shard holds {held}, padding is allowed only after the last")


class Plan(NamedTuple):
    """How one call walks through its tokens."""

    shard: VocabShard
    chunks: tuple[slice, ...]
    """Of [0, T); at least one, which is empty if there are no tokens."""
    keep: bool
    """Whether forward leaves its exponentials to backward: few of them, and a backward may come."""


def make_plan(shard: VocabShard, chunk_tokens: int | None, hidden: Tensor, weight: Tensor) -> Plan:
    """Chunks of `chunk_tokens` rows of `hidden` [T, H], by default of about `CHUNK_ELEMENTS` logits."""
    tokens = hidden.shape[0]
    size = max(1, CHUNK_ELEMENTS // max(1, shard.rows)) if chunk_tokens is None else chunk_tokens
    if size < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    chunks = tuple(slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size))
    few = len(chunks) == 1 and tokens * shard.rows <= KEPT_ELEMENTS
    return Plan(shard, chunks, few and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad))


class OutputLayer:
    """The counted rows of one weight, and the hidden states it turns into logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.on_tensor_cores = hidden.is_cuda and hidden.dtype.itemsize == 2 and dtype == torch.float32
        self.hidden = hidden
        self.weight = weight[:rows]
        if not self.on_tensor_cores:  # once per call; the hidden states are converted chunk by chunk
            self.weight = self.weight.to(dtype)

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, summed and returned in `dtype`."""
        if self.on_tensor_cores:
            return torch.mm(left.to(self.hidden.dtype), right, out_dtype=self.dtype)
        return torch.mm(left.to(self.dtype), right.to(self.dtype))

    def logits(self, chunk: slice) -> Tensor:
        """[C, rows], a fresh tensor that the caller may overwrite."""
        return self.multiply(self.hidden[chunk], self.weight.t())


class LayerGradients:
    """dX = dz W and dW = dz^T X, collected over token chunks; either can be switched off."""

    def __init__(self, layer: OutputLayer, *, hidden: bool, weight: bool) -> None:
        self.layer, self.want_hidden, self.want_weight = layer, hidden, weight
        self.hidden_parts: list[Tensor] = []
        self.weight_sum: Tensor | None = None

    def add(self, chunk: slice, dlogits: Tensor) -> None:
        """dlogits [C, rows] of the chunk, in the accumulation dtype."""
        layer = self.layer
        if self.want_hidden:
            self.hidden_parts.append(layer.multiply(dlogits, layer.weight).to(layer.hidden.dtype))
        if self.want_weight:
            part = layer.multiply(dlogits.t(), layer.hidden[chunk])
            self.weight_sum = part if self.weight_sum is None else self.weight_sum.add_(part)

    def hidden_gradient(self) -> Tensor | None:
        """[T, H] in the dtype of the hidden states: this rank's share, to be summed over the vocab shards."""
        if not self.want_hidden:
            return None
        return self.hidden_parts[0] if len(self.hidden_parts) == 1 else torch.cat(self.hidden_parts)

    def weight_gradient(self, weight: Tensor) -> Tensor | None:
        """Shape and dtype of the local `weight`; complete, with zeros in the padded rows."""
        if self.weight_sum is None:
            return None
        return pad(self.weight_sum, (0, 0, 0, weight.shape[0] - self.weight_sum.shape[0])).to(weight.dtype)

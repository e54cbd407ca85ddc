"""Qwen3 and Qwen3-MoE for decoding: plain torch with a KV cache, independent of Megatron's layout.

Written for few operations per token: one matmul for q, k and v, experts stacked, prompts packed without
padding. Same mathematics as `transformers` (Qwen3 report, arXiv 2505.09388): pre-norm blocks, RMSNorm on
each query and key head, rotary positions, SwiGLU, softmax-then-top-k routing.

Letters in shapes: T packed tokens, U distinct prompts, B rows (sequences), P slots of a prompt, L slots of
the cache, Q query heads, G key/value heads, D head size, H hidden size, E experts, K experts per token,
F expert (or MLP) size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mopd.rollout.decoder_weights import DecoderWeights, LayerWeights
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.types import IntArray

_PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, that go through the model at once: bounds the memory of long prompts."""
_DENSE_MOE_WORK = 256
"""Up to this many (row, expert) pairs, every expert for every row is faster than sorting rows by expert."""


class KVCache:
    """Keys and values of B sequences that all end at the same slot: prompts are padded on the left.

    `keys[layer]`, `values[layer]`: [B, G, L, D], of which `length` slots are in use. `bias` [B, L] is -inf at
    padding, `positions` [B] the position of each row's next token.
    """

    def __init__(self, arch: Architecture, positions: Tensor, *, slots: int, capacity: int, dtype: torch.dtype) -> None:
        """`positions` [B] int64: the length of each row's prompt; the longest takes all `slots`."""
        shape = (len(positions), arch.num_kv_heads, capacity, arch.head_dim)
        # Zeros, not empty: padding is multiplied by an attention weight of 0, which a NaN would survive.
        self.keys = [positions.new_zeros(shape, dtype=dtype) for _ in range(arch.num_layers)]
        self.values = [positions.new_zeros(shape, dtype=dtype) for _ in range(arch.num_layers)]
        self.positions = positions
        self.length = slots
        self.bias = positions.new_zeros((len(positions), capacity), dtype=dtype)
        padding = torch.arange(slots, device=positions.device) < slots - positions.unsqueeze(1)
        self.bias[:, :slots].masked_fill_(padding, float("-inf"))

    def advance(self) -> Tensor:
        """Open the next slot in every row; return the positions [B] of the tokens that go there."""
        capacity = self.bias.shape[1]
        if self.length == capacity:
            self.keys = [F.pad(keys, (0, 0, 0, capacity)) for keys in self.keys]
            self.values = [F.pad(values, (0, 0, 0, capacity)) for values in self.values]
            self.bias = F.pad(self.bias, (0, capacity))
        positions = self.positions
        self.positions = positions + 1
        self.length += 1
        return positions

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows [B'], in this order (ascending); the storage is reused."""
        count, used = len(rows), self.length
        for store in (self.keys, self.values):
            for index, old in enumerate(store):
                new = old[:count]
                new[:, :, :used] = old[rows, :, :used]
                store[index] = new
        self.bias, self.positions = self.bias[rows], self.positions[rows]


@dataclass(frozen=True, slots=True)
class _PackedPrompts:
    """Index maps between T packed tokens and the padded forms of U prompts that B rows continue."""

    tokens: Tensor
    """[T]"""
    positions: Tensor
    """[T]"""
    right_padded: Tensor
    """[U, P] packed index of each slot, prompts starting at slot 0; padding repeats a real token."""
    packed: Tensor
    """[T] index into U * P right-padded slots."""
    left_padded: Tensor
    """[B, P] packed index of each slot, prompts ending at slot P - 1; padding repeats a real token."""
    last: Tensor
    """[U] packed index of each prompt's last token."""
    owner: Tensor
    """[B] the prompt that each row continues."""


class Decoder:
    """The student's forward pass for generation. `weights` are undefined until their first `load`."""

    def __init__(self, arch: Architecture, *, dtype: torch.dtype, device: torch.device) -> None:
        self.arch, self.dtype, self.device = arch, dtype, device
        self.weights = DecoderWeights(arch, dtype=dtype, device=device)
        pairs = torch.arange(0, arch.head_dim, 2, dtype=torch.int64).float() / arch.head_dim
        self._inverse_frequency = (1.0 / arch.rope_theta**pairs).to(device)
        self.on_routing: Callable[[Tensor], None] | None = None
        """Is told the experts [rows, K] of every MoE layer, layer by layer: the audit compares them."""
        self._expert_ids = torch.arange(arch.num_experts, device=device)
        # grouped_mm takes rows that are multiples of 16 bytes.
        self._can_group = all(size * dtype.itemsize % 16 == 0 for size in (arch.hidden_size, arch.expert_ffn_size))

    def prefill(self, prompts: Sequence[IntArray], copies: Sequence[int], *, capacity: int) -> tuple[Tensor, KVCache]:
        """Run U prompts once each and give `copies[u]` consecutive rows to prompt u.

        Returns the logits [B, V] fp32 of each row's next token and the cache, with room for `capacity` more
        tokens before it has to grow. Prompts sorted by length waste the least padding.
        """
        lengths = [len(prompt) for prompt in prompts]
        positions = torch.from_numpy(np.repeat(np.asarray(lengths, dtype=np.int64), copies)).to(self.device)
        slots = max(lengths)
        cache = KVCache(self.arch, positions, slots=slots, capacity=slots + capacity, dtype=self.dtype)
        logits, row = [], 0
        for chunk in _chunks(lengths, _PREFILL_TOKENS):
            rows = slice(row, row + sum(copies[chunk]))
            logits.append(self._prefill_chunk(self._pack(prompts[chunk], copies[chunk]), cache, rows))
            row = rows.stop
        return torch.cat(logits), cache

    def _pack(self, prompts: Sequence[IntArray], copies: Sequence[int]) -> _PackedPrompts:
        lengths = np.asarray([len(prompt) for prompt in prompts], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        owner = np.repeat(np.arange(len(prompts)), copies)
        slots, total = np.arange(lengths.max()), int(lengths.sum())
        right = np.minimum(starts[:, None] + slots, total - 1)
        left = starts[:, None] + np.maximum(slots - (lengths.max() - lengths)[:, None], 0)
        arrays = (
            np.concatenate(prompts),
            np.arange(total) - np.repeat(starts, lengths),
            right,
            np.flatnonzero(slots < lengths[:, None]),
            left[owner],
            starts + lengths - 1,
            owner,
        )
        return _PackedPrompts(*(torch.from_numpy(array).to(self.device) for array in arrays))

    def _prefill_chunk(self, batch: _PackedPrompts, cache: KVCache, rows: slice) -> Tensor:
        slots = slice(cache.length - batch.left_padded.shape[1], cache.length)
        rope = self._rope(batch.positions)
        x = F.embedding(batch.tokens, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            query, key, value = self._project(layer, x, rope)
            cache.keys[index][rows, :, slots] = _take(key, batch.left_padded)
            cache.values[index][rows, :, slots] = _take(value, batch.left_padded)
            # Padding is on the right here, where a causal mask alone hides it.
            query, key, value = (_take(heads, batch.right_padded) for heads in (query, key, value))
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            attended = attended.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, batch.packed)
            if index == self.arch.num_layers - 1:
                x, attended = x[batch.last], attended[batch.last]
            x = x + F.linear(attended, layer.output)
            x = x + self._mlp(layer, x)
        return self._logits(x)[batch.owner]

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token [B] to every row of the cache; return the logits [B, V] fp32 of the next one."""
        rope = self._rope(cache.advance())
        rows, groups, size = len(tokens), self.arch.num_kv_heads, self.arch.head_dim
        slot, used = cache.length - 1, cache.length
        bias = cache.bias[:, :used].repeat_interleave(groups, dim=0).unsqueeze(1)
        x = F.embedding(tokens, self.weights.embedding)
        for layer, keys, values in zip(self.weights.layers, cache.keys, cache.values, strict=True):
            query, key, value = self._project(layer, x, rope)
            keys[:, :, slot], values[:, :, slot] = key, value
            # Row-major [B * G] matrices: the query heads of a group share its keys and values.
            query = query.reshape(rows * groups, -1, size)
            scores = torch.baddbmm(bias, query, keys.flatten(0, 1)[:, :used].transpose(1, 2), alpha=size**-0.5)
            attended = torch.bmm(scores.softmax(dim=-1), values.flatten(0, 1)[:, :used])
            x = x + F.linear(attended.view(rows, -1), layer.output)
            x = x + self._mlp(layer, x)
        return self._logits(x)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.arch.rms_norm_eps)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, D] of positions [T]; the sign of the half rotation is in the sine."""
        angles = positions.unsqueeze(1) * self._inverse_frequency
        cos, sin = angles.cos(), angles.sin()
        return (
            torch.cat((cos, cos), dim=-1).unsqueeze(1).to(self.dtype),
            torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(self.dtype),
        )

    def _project(self, layer: LayerWeights, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> queries [T, Q, D], keys [T, G, D] (both normalised and rotated), values [T, G, D]."""
        heads, groups, size = self.arch.num_heads, self.arch.num_kv_heads, self.arch.head_dim
        qkv = F.linear(self._norm(x, layer.input_norm), layer.qkv).view(-1, heads + 2 * groups, size)
        turning = self._norm(qkv[:, : heads + groups], None).mul_(layer.head_norm)
        cos, sin = rope
        turned = turning.roll(size // 2, dims=-1).mul_(sin).addcmul_(turning, cos)
        return turned[:, :heads], turned[:, heads:], qkv[:, heads + groups :]

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        x = self._norm(x, layer.mlp_norm)
        if layer.router is None:
            return _swiglu(F.linear(x, layer.gate_up[0])) @ layer.down[0]
        # As transformers: softmax over all experts in fp32, then the top k, then (optionally) renormalised.
        weights, experts = F.linear(x, layer.router).softmax(-1, dtype=torch.float32).topk(self.arch.experts_per_token)
        if self.on_routing is not None:
            self.on_routing(experts)
        if self.arch.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if x.shape[0] * self.arch.num_experts <= _DENSE_MOE_WORK or not self._can_group:
            return _moe_dense(x, layer, weights.to(x.dtype), experts)
        return self._moe_grouped(x, layer, weights.to(x.dtype), experts)

    def _moe_grouped(self, x: Tensor, layer: LayerWeights, weights: Tensor, experts: Tensor) -> Tensor:
        """Sort the (token, expert) pairs by expert and multiply each run by its expert's weights."""
        top_k = experts.shape[1]
        ids, order = experts.flatten().sort()
        ends = torch.searchsorted(ids, self._expert_ids, right=True, out_int32=True)
        up = F.grouped_mm(x.index_select(0, order // top_k), layer.gate_up.transpose(1, 2), offs=ends)
        down = F.grouped_mm(_swiglu(up), layer.down, offs=ends)
        # Back to token order by a permutation: unlike adding into rows, deterministic on every device.
        down = down.index_select(0, order.argsort()).view(-1, top_k, x.shape[1])
        return (down * weights.unsqueeze(-1)).sum(dim=1)

    def _logits(self, x: Tensor) -> Tensor:
        """[U, V] fp32: rounded to bf16, logits near 30 would be off by 0.06, and sampling with them."""
        x, head = self._norm(x, self.weights.final_norm), self.weights.head
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, head.t(), out_dtype=torch.float32)
        return F.linear(x.float(), head.float())


def _take(heads: Tensor, index: Tensor) -> Tensor:
    """heads [T, N, D], index [U, P] -> [U, N, P, D]"""
    return heads.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _swiglu(x: Tensor) -> Tensor:
    """[..., 2F] (gate, up) -> [..., F]"""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _moe_dense(x: Tensor, layer: LayerWeights, weights: Tensor, experts: Tensor) -> Tensor:
    """Every expert for every row; summing over the experts is part of the second matmul's contraction."""
    count, ffn, _ = layer.down.shape
    routing = x.new_zeros(len(x), count).scatter_(1, experts, weights)
    up = _swiglu(F.linear(x, layer.gate_up.flatten(0, 1)).view(-1, count, 2 * ffn)) * routing.unsqueeze(-1)
    return up.flatten(1) @ layer.down.flatten(0, 1)


def _chunks(lengths: Sequence[int], limit: int) -> Iterator[slice]:
    """Consecutive prompts whose padded size stays within `limit` tokens; a longer prompt goes alone."""
    start, longest = 0, 0
    for stop, length in enumerate(lengths):
        longest = max(longest, length)
        if stop > start and (stop + 1 - start) * longest > limit:
            yield slice(start, stop)
            start, longest = stop, length
    yield slice(start, len(lengths))

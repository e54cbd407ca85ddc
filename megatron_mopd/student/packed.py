"""Packed sequences through Megatron's layers where Transformer Engine is not there: norm, RoPE and core attention.

On a GPU Transformer Engine reads `cu_seqlens` in the "thd" format. Here the same `PackedSeqParams` carries, besides the
boundaries, the indices that unpack S tokens into [N, L] rows, made once per micro-batch and used by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_mopd.student.replay import TokenRouting
from megatron_mopd.types import MicroBatch


@dataclass
class PackedSequences(PackedSeqParams):
    """Boundaries of N sequences in S packed tokens, and where each token lies in the padded [N, L] view."""

    position_ids: Tensor | None = None
    """[S]"""
    padded_slots: Tensor | None = None
    """[S] row-major index into [N, L]."""
    routing: TokenRouting | None = None
    """Where a model with `RoutingReplay` sends the tokens; None: where its routers say."""


def packed_sequences(batch: MicroBatch, thd: bool, routing: TokenRouting | None = None) -> PackedSequences:
    """What the model's layers need to know of a micro-batch; `thd` for Transformer Engine, else for this module."""
    cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
    common: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "routing": routing,
    }
    if thd:
        return PackedSequences(qkv_format="thd", **common)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return PackedSequences(
        qkv_format="packed",
        position_ids=batch.position_ids,
        padded_slots=sequence * longest + batch.position_ids,
        **common,
    )


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron sums its gradient over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedRotaryEmbedding(RotaryEmbedding):
    """RoPE angles of every packed token: positions restart at each sequence. Returns [S, 1, 1, head_dim]."""

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedSequences | None = None,
        **unused: Any,
    ) -> Tensor:
        """Megatron hands the result of this to `forward`; here that is the positions instead of a length."""
        assert packed_seq_params is not None and packed_seq_params.position_ids is not None
        return packed_seq_params.position_ids

    def forward(self, position_ids: Tensor, **unused: Any) -> Tensor:
        angles = torch.outer(position_ids.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence, by torch's scaled_dot_product_attention on the padded view."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **unused: Any):
        super().__init__(config=config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSequences | None = None,
        **unused: Any,
    ) -> Tensor:
        """query [S, 1, heads, d], key and value [S, 1, kv_heads, d] -> [S, 1, heads * d]."""
        assert packed_seq_params is not None and packed_seq_params.padded_slots is not None
        slots, longest = packed_seq_params.padded_slots, packed_seq_params.max_seqlen_q
        num_sequences = len(packed_seq_params.cu_seqlens_q) - 1

        def pad(states: Tensor) -> Tensor:
            padded = states.new_zeros(num_sequences * longest, *states.shape[2:])
            padded = padded.index_copy(0, slots, states.squeeze(1))
            return padded.view(num_sequences, longest, *states.shape[2:]).transpose(1, 2)

        # Right padding and a causal mask: no real token ever sees a padding token.
        out = F.scaled_dot_product_attention(pad(query), pad(key), pad(value), is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2).reshape(num_sequences * longest, -1)
        return out.index_select(0, slots).unsqueeze(1)

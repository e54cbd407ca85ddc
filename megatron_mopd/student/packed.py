"""Packed sequences through Megatron's layers where Transformer Engine is not there: norm, RoPE and core attention.

On a GPU Transformer Engine reads `cu_seqlens` in the "thd" format. Here the same `PackedSeqParams` carries, besides the
boundaries, the indices that unpack tokens into [N, L] rows, made once per micro-batch and used by every layer.

Of C context ranks each holds S of the C S tokens (`token_layout.py`). Transformer Engine sends keys and values around
in a ring, chunk after chunk; here every rank gathers all of them (as Llama 3 does, arXiv 2407.21783 sec. 3.3.2), and
only the queries stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_mopd.student.replay import TokenRouting
from megatron_mopd.token_layout import held_tokens
from megatron_mopd.types import MicroBatch


@dataclass
class PackedSequences(PackedSeqParams):
    """Boundaries of N sequences in C S packed tokens, and where each token lies in padded views of them."""

    position_ids: Tensor | None = None
    """[S]"""
    query_slots: Tensor | None = None
    """[S] row-major index into [N, L / C]: what this rank holds of each sequence, one row a sequence."""
    key_slots: Tensor | None = None
    """[C S] row-major index into [N, L] of the tokens of all context ranks, one rank after the other."""
    mask: Tensor | None = None
    """[N, 1, L / C, L] added to the scores: 0 for the keys that a query attends to, else -inf. None: C is 1, and causal
    is enough."""
    routing: TokenRouting | None = None
    """Where a model with `RoutingReplay` sends the tokens; None: where its routers say."""


def packed_sequences(
    batch: MicroBatch, dtype: torch.dtype, *, thd: bool, routing: TokenRouting | None = None
) -> PackedSequences:
    """What the model's layers, which compute in `dtype`, need to know of a micro-batch; `thd` for Transformer Engine,
    else for this module."""
    cu_seqlens, longest = batch.cu_seqlens, batch.max_seqlen
    common: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        # Padding is part of its sequence: it comes last, so no real token attends to it. Told as the very same tensors,
        # Transformer Engine sees no padding between sequences, which most of its backends cannot leave out.
        "cu_seqlens_q_padded": cu_seqlens,
        "cu_seqlens_kv_padded": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "routing": routing,
    }
    if thd:
        return PackedSequences(qkv_format="thd", **common)
    context = int(cu_seqlens[-1]) // len(batch.token_ids)
    sequences = torch.arange(len(cu_seqlens) - 1)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    # A token's slot is its index, moved by what the rows of the sequences before are longer than these are.
    moved = (sequences * (longest // context) - starts // context).repeat_interleave(lengths // context)
    query_slots = torch.arange(len(batch.token_ids)) + moved
    key_slots = torch.arange(int(cu_seqlens[-1])) + (sequences * longest - starts).repeat_interleave(lengths)
    mask = None
    if context > 1:
        bounds = cu_seqlens.long().numpy()
        held = [torch.from_numpy(held_tokens(bounds, context, rank)) for rank in range(context)]
        key_slots = key_slots[torch.cat(held)]
        last_seen = query_slots.new_zeros(len(sequences) * (longest // context))
        last_seen[query_slots] = batch.position_ids
        hidden = torch.arange(longest) > last_seen.view(len(sequences), 1, -1, 1)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return PackedSequences(
        qkv_format="packed",
        position_ids=batch.position_ids,
        query_slots=query_slots,
        key_slots=key_slots,
        mask=mask,
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
    """Causal attention within each packed sequence, by torch's scaled_dot_product_attention on padded views."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ):
        super().__init__(config=config)
        self._context = pg_collection.cp

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
        layout = packed_seq_params
        assert layout is not None and layout.query_slots is not None and layout.key_slots is not None
        num_sequences = len(layout.cu_seqlens_q) - 1
        if layout.mask is not None:
            # Gathered forward; backward every rank gets the sum of what all of them have for its keys and values.
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self._context)
            key, value = both.chunk(2, dim=-1)

        def pad(states: Tensor, slots: Tensor, longest: int) -> Tensor:
            padded = states.new_zeros(num_sequences * longest, *states.shape[2:])
            padded = padded.index_copy(0, slots, states.squeeze(1))
            return padded.view(num_sequences, longest, *states.shape[2:]).transpose(1, 2)

        longest = layout.max_seqlen_kv
        queries = pad(query, layout.query_slots, longest * len(query) // len(key))
        # Right padding and a causal mask: no real token ever sees a padding token.
        out = F.scaled_dot_product_attention(
            queries,
            pad(key, layout.key_slots, longest),
            pad(value, layout.key_slots, longest),
            attn_mask=layout.mask,
            is_causal=layout.mask is None,
            enable_gqa=True,
        )
        out = out.transpose(1, 2).reshape(-1, query.shape[2] * query.shape[3])
        return out.index_select(0, layout.query_slots).unsqueeze(1)

"""The most likely tokens of a frozen model, from its hidden states, without a [R, vocabulary] tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import Support, VocabShard, support
from kernels.layer_blocks import whole_chunk
from kernels.output_layer import OutputLayer


@torch.no_grad()
def top_tokens(hidden: Tensor, weight: Tensor, k: int, shard: VocabShard, *, chunk_rows: int | None = None) -> Support:
    """The k most likely tokens of every row over all vocabulary shards, likeliest first, with their log-probs (fp32).

    Shapes: hidden [R, H], weight [rows, H] of this rank's `shard` -> ids [R, k] int64, logprobs [R, k].
    Collectives: `kernels.support`'s, once a chunk of rows; all ranks of the shard's group have as many chunks.
    """
    layer = OutputLayer(hidden, weight, shard.rows, torch.float32)
    tokens = len(hidden)
    size = chunk_rows or whole_chunk(-(-shard.vocab_size // shard.ranks), hidden.device)
    parts = []
    for start in range(0, max(tokens, 1), size):
        logits = layer.logits(slice(0, shard.rows), slice(start, min(start + size, tokens)))
        parts.append(support(None, logits, k, shard=shard))
    return Support(torch.cat([part.ids for part in parts]), torch.cat([part.logprobs for part in parts]))

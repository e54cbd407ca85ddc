"""Output-layer operations of distillation: exact, vocabulary-parallel, never a [tokens, vocabulary] tensor.

`reference` is the specification; the functions below are what the trainer calls. Imports nothing but torch.

The name is also that of a Hugging Face package which SGLang imports: never put the root of this repository on
the path of an inference server (start it with `python -P` from another folder).
"""

from kernels.linear_divergence import DivergenceKind, DivergenceStats, linear_divergence
from kernels.shard import VocabShard
from kernels.token_logprob import TokenStats, token_logprob

__all__ = [
    "DivergenceKind",
    "DivergenceStats",
    "TokenStats",
    "VocabShard",
    "linear_divergence",
    "token_logprob",
]

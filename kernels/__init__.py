"""Output-layer operations of distillation: exact, vocabulary-parallel, never a [tokens, vocabulary] tensor.

`reference` is the specification; the functions below are what the trainer calls. Imports nothing but torch.

The name is also that of a Hugging Face package which SGLang imports: never put the root of this repository on
the path of an inference server (start it with `python -P` from another folder).
"""

from kernels.divergence import DivergenceStats, divergence
from kernels.linear_divergence import linear_divergence
from kernels.objective import DivergenceKind, Objective
from kernels.shard import VocabShard
from kernels.support import Support, linear_support, support
from kernels.token_logprob import TokenStats, token_logprob
from kernels.topk_divergence import TopkStats, topk_divergence

__all__ = [
    "DivergenceKind",
    "DivergenceStats",
    "Objective",
    "Support",
    "TokenStats",
    "TopkStats",
    "VocabShard",
    "divergence",
    "linear_divergence",
    "linear_support",
    "support",
    "token_logprob",
    "topk_divergence",
]

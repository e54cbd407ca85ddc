"""The rollout engines' memory: the one in the process, which holds a whole student on every rank, and servers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mopd.plan.count import ModelCount
from megatron_mopd.plan.workload import Workload
from megatron_mopd.rollout.decoder import _PREFILL_TOKENS as PREFILL_TOKENS
from megatron_mopd.rollout.in_process import _CACHE_CHUNK as CACHE_CHUNK
from megatron_mopd.student.architecture import Architecture


def cache_bytes_per_token(arch: Architecture, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcessMemory:
    """Of one rank."""

    weights: int
    cache: int
    """At its largest, while it grows."""
    prefill: int
    slots: int
    """Tokens per sequence that the cache ends up with room for."""


def in_process_memory(
    count: ModelCount, workload: Workload, batch_size: int, ranks: int, itemsize: int
) -> InProcessMemory:
    """`rollout/in_process.py` on one of `ranks` ranks, when every answer gets as long as it may."""
    arch = count.arch
    sequences = max(1, min(batch_size, -(-workload.rollouts // ranks)))
    prompt = max(domain.longest_prompt for domain in workload.domains)
    slots = prompt + CACHE_CHUNK
    grown = False
    while slots < workload.longest:
        slots, grown = 2 * slots, True
    # Growing copies all keys, then all values: the new ones are there beside the old ones.
    held = 2.5 / 2 if grown else 1.0
    k, f = (arch.experts_per_token, arch.expert_ffn_size) if arch.is_moe else (1, arch.ffn_size)
    tokens = min(max(PREFILL_TOKENS, prompt), sequences * prompt)
    qkv = (2 * arch.num_heads + 4 * arch.num_kv_heads) * arch.head_dim
    return InProcessMemory(
        weights=count.parameters * itemsize,
        cache=round(held * sequences * slots * cache_bytes_per_token(arch, itemsize)),
        prefill=tokens * (k * (2 * arch.hidden_size + 3 * f) + qkv) * itemsize + 4 * sequences * arch.vocab_size,
        slots=slots,
    )


SERVER_FRACTION = 0.88
"""Assumed share of a server's GPU for weights and cache: SGLang's `mem_fraction_static` is of that order by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMemory:
    """Of one GPU of a server that holds one copy of the student on `tensor` GPUs."""

    weights: float
    cache: float
    """What is left for keys and values; negative: the weights do not fit."""
    tokens: float
    """That fit into the cache of one copy."""
    sequences: float
    """Of mean length that run at once in one copy."""


def server_memory(count: ModelCount, workload: Workload, tensor: int, gpu_bytes: float, itemsize: int) -> ServerMemory:
    """A server that splits weights and heads over `tensor` GPUs, keys and values of a head that more GPUs than heads
    share being kept by each of them."""
    arch = count.arch
    weights = count.parameters * itemsize / tensor
    cache = SERVER_FRACTION * gpu_bytes - weights
    per_token = cache_bytes_per_token(arch, itemsize) / min(tensor, arch.num_kv_heads)
    tokens = max(0.0, cache) / per_token
    mean = workload.tokens / workload.rollouts
    return ServerMemory(weights=weights, cache=cache, tokens=tokens, sequences=tokens / mean)

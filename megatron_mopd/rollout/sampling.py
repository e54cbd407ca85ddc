"""Drawing tokens: counter-based random numbers and the inverse CDF. Pure functions.

Letters in shapes: B rows that are decoded together, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_mopd.rollout.engine import Sampling


def _signed(value: int) -> int:
    """The int64 with the bits of this uint64; torch multiplies int64 modulo 2^64."""
    return value - (1 << 64) if value >= 1 << 63 else value


# SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """A 64-bit key (as int64) for the random numbers of one rollout, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{sample}\0{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def random_bits(keys: Tensor, position: int) -> Tensor:
    """[B] int64: output `position` of the SplitMix64 streams that start at `keys` [B] int64."""
    state = keys + _signed((position + 1) * _GAMMA % (1 << 64))
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def uniforms(keys: Tensor, position: int) -> Tensor:
    """[B] float64 in [0, 1), a pure function of the row's key and the token's index in the response."""
    # 52 bits, not 53: then u * total < total also after rounding, for any float64 total.
    return _shift_right(random_bits(keys, position), 12).double() * 2.0**-52


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def truncate(probabilities: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Zero the tokens outside top-k, then outside top-p of what is left. [B, V] -> [B, V], not renormalised.

    Top-p keeps the fewest tokens, most probable first, whose share of the top-k mass reaches `top_p`. Of
    equally probable tokens the lower id goes first.
    """
    if top_k == 0 and top_p == 1.0:
        return probabilities
    values, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k:
        values[:, top_k:] = 0
    if top_p < 1.0:
        mass = values.cumsum(dim=-1)
        # A token stays when the mass before it has not reached the target yet; the first one always does.
        values = torch.where(mass - values < top_p * mass[:, -1:], values, 0)
    return torch.zeros_like(probabilities).scatter_(1, order, values)


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the first token whose cumulative mass exceeds uniform * total. [B, V], [B] -> [B] int64.

    Probabilities need not sum to one; a token of probability 0 is never picked.
    """
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    threshold = (uniform * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample a token per row. fp32 [B, V], float64 [B] -> tokens [B] int64, log-probabilities [B] fp32.

    The log-probability is that of softmax(logits / temperature) before truncation; greedy: softmax(logits).
    """
    greedy = sampling.temperature == 0
    scaled = logits if greedy or sampling.temperature == 1 else logits / sampling.temperature
    logprobs = scaled.log_softmax(dim=-1)
    if greedy:
        tokens = logprobs.argmax(dim=-1)
    else:
        tokens = pick(truncate(logprobs.exp(), top_k=sampling.top_k, top_p=sampling.top_p), uniform)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)

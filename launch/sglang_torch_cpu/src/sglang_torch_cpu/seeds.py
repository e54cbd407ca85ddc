"""Lets `--enable-deterministic-inference`, and with it `sampling_seed`, work on the CPU.

SGLang hashes a request's seed with a compiled operator and swaps matrix products for Triton kernels. Here the hash is
torch's, with the same values, and the products stay torch's: seeds are honoured; the last bit of a logit may still
depend on which requests share its batch.
"""

import torch

_MASK = 0xFFFFFFFF


def _multiply(a: torch.Tensor, b: int) -> torch.Tensor:
    """a * b modulo 2**32 with a in [0, 2**32): by halves, so that nothing leaves int64."""
    return ((a * (b & 0xFFFF)) + (((a * (b >> 16)) & 0xFFFF) << 16)) & _MASK


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """One round of MurmurHash3 (x86, 32 bits)."""
    word = _multiply(_rotate(_multiply(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_multiply(_rotate(state ^ word, 13), 5) + 0xE6546B64) & _MASK


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of 16 bytes (seed low, seed high, position, column) -> int64 [requests, columns] in [0, 2**32).

    The same bytes and values as `sglang/kernels/ops/sampling/murmur_hash.py`.
    """
    seed = seed.view(torch.int64)
    state = _mix(torch.zeros_like(seed), seed & _MASK)
    state = _mix(state, (seed >> 32) & _MASK)
    state = _mix(state, positions.to(torch.int64) & _MASK)
    state = _mix(state[:, None], (col_indices.to(torch.int64) & _MASK)[None, :]) ^ 16
    state = _multiply(state ^ (state >> 16), 0x85EBCA6B)
    state = _multiply(state ^ (state >> 13), 0xC2B2AE35)
    return state ^ (state >> 16)


def _nothing(*args, **kwargs) -> None:
    return None


def register() -> None:
    """SGLang's hook for plugins: replaces the two functions, where this package's platform is the one in use."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if type(current_platform).__name__ != "TorchCpuPlatform":
        return
    HookRegistry.register("sglang.srt.layers.sampler.murmur_hash32", murmur_hash32, HookType.REPLACE)
    HookRegistry.register("sglang.srt.batch_invariant_ops.enable_batch_invariant_mode", _nothing, HookType.REPLACE)

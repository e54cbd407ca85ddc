"""What autograd keeps of a forward pass until the backward pass, per token of a micro-batch and layer.

Two ledgers, one per layer spec of `student/model.py`. That of the local spec (CPU) was written down from autograd's
saved tensors and is compared with them, and with the allocator's peak, in a test. That of Transformer Engine (GPU) is
the same method by reading (Megatron-Core 0.19, Transformer Engine 2.20; cf. Korthikanti et al., arXiv 2205.05198
sec. 4): it has not been measured on a GPU.

Letters: H hidden, Q = query heads x head size, K = key/value heads x head size, d head size, E experts, k experts of a
token, F width of an expert (or of the dense MLP, with k = 1), t tensor ranks. Sequence parallelism divides by t what
tensor parallelism does not (`transformer_config` switches it on with t > 1); experts are not cut by t, but each tensor
rank dispatches its own S/t tokens. Context parallelism leaves a rank its share of the tokens; on a CPU it keeps the
keys and values of all. Routing is taken as balanced: with expert parallelism a rank that is sent more tokens than the
average needs more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mopd.config import ParallelSpec
from megatron_mopd.student.architecture import Architecture

LayerSpec = Literal["local", "transformer_engine"]


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes per token of one part of a layer, on one rank."""

    part: str
    bytes: float


def kept_by_layer(
    arch: Architecture, spec: LayerSpec, itemsize: int, tensor: int, context: int = 1
) -> tuple[Kept, ...]:
    """The ledger of one layer. Bytes per token of the context rank (all of its tokens, not the tensor rank's share)."""
    parts = _local(arch, itemsize, context) if spec == "local" else _transformer_engine(arch, itemsize)
    return tuple(Kept(name, size / tensor) for name, size in parts)


def _local(arch: Architecture, b: int, context: int) -> list[tuple[str, float]]:
    h, d = arch.hidden_size, arch.head_dim
    q, kv = arch.num_heads * d, arch.num_kv_heads * d
    gathered = kv if context == 1 else 2 * context * kv
    parts: list[tuple[str, float]] = [
        ("input norm: input, normalised, scale", (2 * h + 1) * b),
        ("qkv: input", h * b),
        ("query norm: input, normalised, scale", (2 * q + arch.num_heads) * b),
        ("key norm: all of qkv, normalised, scale", (q + 3 * kv + arch.num_kv_heads) * b),
        ("rotary: sine and cosine, twice", 4 * d * b),
        ("padding: queries and keys; with several context ranks what was gathered", (q + gathered) * b),
        (
            "attention: padded queries, keys, values, result, log-sum-exp",
            (2 * q + 2 * context * kv + arch.num_heads) * b,
        ),
        ("projection: input", q * b),
        ("second norm: input, normalised, scale", (2 * h + 1) * b),
    ]
    if not arch.is_moe:
        return [*parts, ("MLP: input", h * b), ("MLP: gate, up, and their product", 5 * arch.ffn_size * b)]
    e, k, f = arch.num_experts, arch.experts_per_token, arch.expert_ffn_size
    return [
        *parts,
        ("router: input", h * b),
        # Probabilities and logits as [E]; ids, as [k], in 64 bits.
        ("router: probabilities and indices", 8 * e + 5 * k * 8),
        ("experts: inputs", k * h * b),
        ("experts: gate and up, silu, up + 0, product, times probability", k * (6 * f + 1) * b),
    ]


def _transformer_engine(arch: Architecture, b: int) -> list[tuple[str, float]]:
    h, d = arch.hidden_size, arch.head_dim
    q, kv = arch.num_heads * d, arch.num_kv_heads * d
    parts: list[tuple[str, float]] = [
        ("norm and qkv: input, normalised, scale (fp32)", 2 * h * b + 4),
        ("query and key norm: all of qkv, scales (fp32)", (q + 2 * kv) * b + 4 * (arch.num_heads + arch.num_kv_heads)),
        ("attention: rotated queries and keys, values", (q + 2 * kv) * b),
        ("attention: result, which the projection takes; log-sum-exp (fp32)", q * b + 4 * arch.num_heads),
    ]
    if not arch.is_moe:
        f = arch.ffn_size
        return [
            *parts,
            ("norm and MLP: input, normalised, scale (fp32)", 2 * h * b + 4),
            ("MLP: gate and up, product", 3 * f * b),
        ]
    e, k, f = arch.num_experts, arch.experts_per_token, arch.expert_ffn_size
    return [
        *parts,
        ("second norm: input, normalised, scale (fp32)", 2 * h * b + 4),
        ("router: scores and probabilities (fp32), map", (4 + 4 + 1) * e),
        ("dispatch: row ids, probabilities (fp32)", k * (4 + 4)),
        ("experts: inputs", k * h * b),
        ("experts: gate and up, product", k * 3 * f * b),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationShape:
    """What the kept bytes of a pipeline stage depend on besides the model."""

    parallel: ParallelSpec
    spec: LayerSpec
    itemsize: int
    tokens: int
    """Of the largest micro-batch, on one context rank."""
    microbatches: int
    """Of an update, per data-parallel rank."""


def in_flight(parallel: ParallelSpec, stage: int, microbatches: int) -> int:
    """Micro-batches whose activations a stage holds at once under 1F1B (arXiv 2104.04473 sec. 2.2)."""
    return max(1, min(parallel.pipeline - stage, microbatches))


def activation_bytes(arch: Architecture, shape: ActivationShape, stage: int) -> float:
    """Kept by one rank of `stage` when most is alive. With recomputation: the input of every layer, and one layer."""
    parallel = shape.parallel
    kept = kept_by_layer(arch, shape.spec, shape.itemsize, parallel.tensor, parallel.context)
    layer = sum(part.bytes for part in kept)
    layers = arch.num_layers // parallel.pipeline
    held = in_flight(parallel, stage, shape.microbatches)
    hidden = arch.hidden_size * shape.itemsize / parallel.tensor
    per_token = held * layers * hidden + layer if parallel.recompute else held * layers * layer
    if stage == parallel.pipeline - 1:  # the final norm, as the layers' own
        per_token += (2 * arch.hidden_size * shape.itemsize + 4) / parallel.tensor
    return shape.tokens * per_token


def working_bytes(arch: Architecture, shape: ActivationShape) -> float:
    """What the backward pass of one layer needs beside the kept: gradients of its input and of what its experts got
    and made. An allowance, not a ledger."""
    k, f = (arch.experts_per_token, arch.expert_ffn_size) if arch.is_moe else (1, arch.ffn_size)
    per_token = (k + 1) * arch.hidden_size + (2 * k * f if shape.spec == "transformer_engine" else 0)
    return shape.tokens * per_token * shape.itemsize / shape.parallel.tensor

"""The decoder's weights: fused storage that is allocated once and filled from Hugging Face tensors.

Letters in shapes: Q query heads, G key/value heads, D head size, H hidden size, E experts, F expert (or MLP)
size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mopd.student.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm: Tensor
    """[H]"""
    qkv: Tensor
    """[(Q + 2G) D, H]"""
    head_norm: Tensor
    """[Q + G, D]: q_norm for each query head, then k_norm for each key head."""
    output: Tensor
    """[H, Q D]"""
    mlp_norm: Tensor
    """[H]"""
    router: Tensor | None
    """[E, H]; None in the dense family, which is one expert that takes every token."""
    gate_up: Tensor
    """[E, 2F, H]: gate rows, then up rows."""
    down: Tensor
    """[E, F, H]: transposed, so that the same storage serves one big matmul and one per expert."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one Hugging Face tensor goes: a view of fused storage, and the shape that is expected."""

    target: Tensor
    shape: tuple[int, ...]


class DecoderWeights:
    """All tensors of one model, full on every rank. Undefined until the first `load`."""

    def __init__(self, arch: Architecture, *, dtype: torch.dtype, device: torch.device) -> None:
        self._arch, self._dtype, self._device = arch, dtype, device
        self.embedding = self._empty(arch.vocab_size, arch.hidden_size)
        self.head = self.embedding if arch.tie_embeddings else self._empty(arch.vocab_size, arch.hidden_size)
        self.final_norm = self._empty(arch.hidden_size)
        self.layers = [self._empty_layer() for _ in range(arch.num_layers)]
        self._slots = dict(self._name_slots())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The Hugging Face name and shape of every tensor that `load` wants."""
        return {name: slot.shape for name, slot in self._slots.items()}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy full tensors into the existing storage, converting dtype and device.

        Raises ValueError naming a tensor that is missing, unexpected, repeated or of the wrong shape.
        """
        missing = dict(self._slots)
        for name, tensor in weights:
            slot = missing.pop(name, None)
            if slot is None:
                why = "came twice" if name in self._slots else "is not part of this model"
                raise ValueError(f"weight '{name}' {why}")
            if tuple(tensor.shape) != slot.shape:
                raise ValueError(f"weight '{name}' has shape {tuple(tensor.shape)}, expected {slot.shape}")
            slot.target.copy_(tensor.detach())
        if missing:
            more = ", ..." if len(missing) > 8 else ""
            raise ValueError(f"{len(missing)} weights are missing: {', '.join(list(missing)[:8])}{more}")

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _empty_layer(self) -> LayerWeights:
        arch = self._arch
        hidden, heads, groups, size = arch.hidden_size, arch.num_heads, arch.num_kv_heads, arch.head_dim
        experts, ffn = (arch.num_experts, arch.expert_ffn_size) if arch.is_moe else (1, arch.ffn_size)
        return LayerWeights(
            input_norm=self._empty(hidden),
            qkv=self._empty((heads + 2 * groups) * size, hidden),
            head_norm=self._empty(heads + groups, size),
            output=self._empty(hidden, heads * size),
            mlp_norm=self._empty(hidden),
            router=self._empty(experts, hidden) if arch.is_moe else None,
            gate_up=self._empty(experts, 2 * ffn, hidden),
            down=self._empty(experts, ffn, hidden),
        )

    def _name_slots(self) -> Iterator[tuple[str, _Slot]]:
        yield "model.embed_tokens.weight", _whole(self.embedding)
        for index, layer in enumerate(self.layers):
            for name, slot in self._name_layer_slots(layer):
                yield f"model.layers.{index}.{name}.weight", slot
        yield "model.norm.weight", _whole(self.final_norm)
        if not self._arch.tie_embeddings:
            yield "lm_head.weight", _whole(self.head)

    def _name_layer_slots(self, layer: LayerWeights) -> Iterator[tuple[str, _Slot]]:
        arch = self._arch
        heads, size, ffn = arch.num_heads, arch.head_dim, layer.down.shape[1]
        query, key, value = layer.qkv.split([heads * size, arch.num_kv_heads * size, arch.num_kv_heads * size])
        yield "input_layernorm", _whole(layer.input_norm)
        yield "self_attn.q_proj", _whole(query)
        yield "self_attn.k_proj", _whole(key)
        yield "self_attn.v_proj", _whole(value)
        # One HF vector, broadcast over the heads it belongs to.
        yield "self_attn.q_norm", _Slot(layer.head_norm[:heads], (size,))
        yield "self_attn.k_norm", _Slot(layer.head_norm[heads:], (size,))
        yield "self_attn.o_proj", _whole(layer.output)
        yield "post_attention_layernorm", _whole(layer.mlp_norm)
        if layer.router is not None:
            yield "mlp.gate", _whole(layer.router)
        for expert, (gate_up, down) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
            mlp = f"mlp.experts.{expert}" if arch.is_moe else "mlp"
            yield f"{mlp}.gate_proj", _whole(gate_up[:ffn])
            yield f"{mlp}.up_proj", _whole(gate_up[ffn:])
            yield f"{mlp}.down_proj", _whole(down.T)


def _whole(target: Tensor) -> _Slot:
    return _Slot(target, tuple(target.shape))

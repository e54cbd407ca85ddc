"""Which Hugging Face tensors make which Megatron parameter, and how tensor parallelism cuts it.

One table per family, used in both directions. A layout is two pure functions: `split` makes one rank's
parameter from whole Hugging Face tensors, `join` makes the tensors from all ranks' parameters.

Letters of the shapes: V vocabulary, H hidden, Q query heads x head size, K key/value heads x head size,
D head size, F dense intermediate, X expert intermediate, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.student.architecture import Architecture


class Layout(Enum):
    """How a Megatron parameter lies over the tensor-parallel ranks."""

    REPLICATED = auto()
    COLS = auto()
    """Split on dim 1: the input of a row-parallel linear layer."""
    QKV = auto()
    """Split by key/value head; rows of head g: its query heads, k_g, v_g."""
    GATED = auto()
    """Each rank holds [its rows of gate; its rows of up]."""
    VOCAB = auto()
    """Split on dim 0 after padding with zero rows to a multiple of the ranks."""


@dataclass(frozen=True, slots=True)
class HFTensor:
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter and the Hugging Face tensors it holds, as patterns over {layer} and {expert}."""

    layout: Layout
    megatron: tuple[str, ...]
    """Its spellings: that of the local spec, then that of the Transformer Engine spec where they differ."""
    hf: tuple[tuple[str, str], ...]
    """(name, shape letters) of each tensor."""
    copy: bool = False
    """A second copy of tensors that another row holds: loaded where the parameter exists, never exported."""

    @property
    def is_expert(self) -> bool:
        return "{expert}" in self.hf[0][0]


@dataclass(frozen=True, slots=True)
class Table:
    first: tuple[Row, ...]
    layer: tuple[Row, ...]
    expert: tuple[Row, ...]
    last: tuple[Row, ...]


_MEGATRON_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _row(layout: Layout, megatron: str | tuple[str, ...], *hf: tuple[str, str], layer: bool = True) -> Row:
    spellings = (megatron,) if isinstance(megatron, str) else megatron
    if layer:
        spellings = tuple(_MEGATRON_LAYER + name for name in spellings)
        hf = tuple((_HF_LAYER + name, shape) for name, shape in hf)
    return Row(layout, spellings, hf)


_ATTENTION = (
    _row(
        Layout.REPLICATED,
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("input_layernorm.weight", "H"),
    ),
    _row(
        Layout.QKV,
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "QH"),
        ("self_attn.k_proj.weight", "KH"),
        ("self_attn.v_proj.weight", "KH"),
    ),
    _row(Layout.REPLICATED, "self_attention.q_layernorm.weight", ("self_attn.q_norm.weight", "D")),
    _row(Layout.REPLICATED, "self_attention.k_layernorm.weight", ("self_attn.k_norm.weight", "D")),
    _row(Layout.COLS, "self_attention.linear_proj.weight", ("self_attn.o_proj.weight", "HQ")),
    _row(
        Layout.REPLICATED,
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("post_attention_layernorm.weight", "H"),
    ),
)
_DENSE = (
    _row(Layout.GATED, "mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "FH"), ("mlp.up_proj.weight", "FH")),
    _row(Layout.COLS, "mlp.linear_fc2.weight", ("mlp.down_proj.weight", "HF")),
)
_ROUTER = (_row(Layout.REPLICATED, "mlp.router.weight", ("mlp.gate.weight", "EH")),)
# Experts are not cut by tensor parallelism (expert_tensor_parallel_size = 1): GATED and COLS with one rank.
_EXPERT = (
    _row(
        Layout.GATED,
        ("mlp.experts.local_experts.{expert}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{expert}"),
        ("mlp.experts.{expert}.gate_proj.weight", "XH"),
        ("mlp.experts.{expert}.up_proj.weight", "XH"),
    ),
    _row(
        Layout.COLS,
        ("mlp.experts.local_experts.{expert}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{expert}"),
        ("mlp.experts.{expert}.down_proj.weight", "HX"),
    ),
)
_EMBEDDING = _row(Layout.VOCAB, "embedding.word_embeddings.weight", ("model.embed_tokens.weight", "VH"), layer=False)
_NORM = _row(Layout.REPLICATED, "decoder.final_layernorm.weight", ("model.norm.weight", "H"), layer=False)
_HEAD = _row(Layout.VOCAB, "output_layer.weight", ("lm_head.weight", "VH"), layer=False)
# With tied embeddings only a last pipeline stage that is not also the first has an output layer of its own.
_TIED_HEAD = Row(Layout.VOCAB, _HEAD.megatron, _EMBEDDING.hf, copy=True)

_LAYERS = {"qwen3": (_ATTENTION + _DENSE, ()), "qwen3_moe": (_ATTENTION + _ROUTER, _EXPERT)}


def table_of(arch: Architecture) -> Table:
    layer, expert = _LAYERS[arch.family]
    head = _TIED_HEAD if arch.tie_embeddings else _HEAD
    return Table(first=(_EMBEDDING,), layer=layer, expert=expert, last=(_NORM, head))


def hf_tensors(row: Row, arch: Architecture, layer: int = 0, expert: int = 0) -> tuple[HFTensor, ...]:
    """The Hugging Face tensors of a row; `layer` and `expert` are global indices."""
    sizes = {
        "V": arch.vocab_size,
        "H": arch.hidden_size,
        "Q": arch.num_heads * arch.head_dim,
        "K": arch.num_kv_heads * arch.head_dim,
        "D": arch.head_dim,
        "F": arch.ffn_size,
        "X": arch.expert_ffn_size,
        "E": arch.num_experts,
    }
    return tuple(
        HFTensor(name.format(layer=layer, expert=expert), tuple(sizes[letter] for letter in shape))
        for name, shape in row.hf
    )


def first_tensors(arch: Architecture) -> Iterator[HFTensor]:
    """The tensors before the first layer."""
    for row in table_of(arch).first:
        yield from hf_tensors(row, arch)


def layer_tensors(arch: Architecture, layer: int) -> Iterator[HFTensor]:
    """The tensors of one decoder layer in the order of export: as the layer computes, expert by expert."""
    table = table_of(arch)
    for row in table.layer:
        yield from hf_tensors(row, arch, layer)
    for expert in range(arch.num_experts):
        for row in table.expert:
            yield from hf_tensors(row, arch, layer, expert)


def last_tensors(arch: Architecture) -> Iterator[HFTensor]:
    """The tensors after the last layer."""
    for row in table_of(arch).last:
        if not row.copy:
            yield from hf_tensors(row, arch)


def model_tensors(arch: Architecture) -> Iterator[HFTensor]:
    """Every tensor of the published format, in the order of export."""
    yield from first_tensors(arch)
    for layer in range(arch.num_layers):
        yield from layer_tensors(arch, layer)
    yield from last_tensors(arch)


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a parameter is meant: that of tensor-parallel rank `rank` of `size`."""

    rank: int
    size: int
    rows: int = 0
    """Rows of the parameter on each rank, padding included; read for VOCAB only."""


def split(layout: Layout, tensors: Sequence[Any], arch: Architecture, shard: Shard) -> Tensor:
    """One rank's parameter from the whole `tensors` (in the row's order).

    Each tensor needs `[slices]` only, so a lazy file slice serves too and just the rank's part is read.
    """
    match layout:
        case Layout.REPLICATED:
            return tensors[0][:]
        case Layout.COLS:
            return tensors[0][:, _part(_shape(tensors[0])[1], shard)]
        case Layout.GATED:
            return torch.cat([tensor[_part(_shape(tensor)[0], shard), :] for tensor in tensors])
        case Layout.QKV:
            parts = [tensor[_part(_shape(tensor)[0], shard), :] for tensor in tensors]
            groups = arch.num_kv_heads // shard.size
            by_group = [part.view(groups, -1, arch.head_dim, part.shape[1]) for part in parts]
            return torch.cat(by_group, dim=1).view(-1, parts[0].shape[1])
        case Layout.VOCAB:
            rows, columns = _shape(tensors[0])
            begin = min(shard.rank * shard.rows, rows)
            own = tensors[0][begin : min(begin + shard.rows, rows), :] if begin < rows else None
            if own is not None and own.shape[0] == shard.rows:
                return own
            padding = torch.zeros(shard.rows - (0 if own is None else own.shape[0]), columns)
            return padding if own is None else torch.cat([own, padding.to(own)])


def join(layout: Layout, shards: Sequence[Tensor], arch: Architecture) -> tuple[Tensor, ...]:
    """The inverse of `split`: the whole tensors from the ranks' parameters in order; views where possible."""
    match layout:
        case Layout.REPLICATED:
            return (shards[0],)
        case Layout.COLS:
            return (_cat(shards, dim=1),)
        case Layout.GATED:
            halves = [shard.chunk(2) for shard in shards]
            return tuple(_cat([half[i] for half in halves]) for i in (0, 1))
        case Layout.QKV:
            groups, hidden = arch.num_kv_heads, shards[0].shape[1]
            by_group = _cat(shards).view(groups, -1, arch.head_dim, hidden)
            query, key, value = by_group.split([by_group.shape[1] - 2, 1, 1], dim=1)
            return tuple(part.reshape(-1, hidden) for part in (query, key, value))
        case Layout.VOCAB:
            return (_cat(shards)[: arch.vocab_size],)


def _part(length: int, shard: Shard) -> slice:
    size = length // shard.size
    return slice(shard.rank * size, (shard.rank + 1) * size)


def _shape(tensor: Any) -> list[int]:
    return list(tensor.shape) if isinstance(tensor, Tensor) else tensor.get_shape()


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The tensors joined; without a copy where they adjoin in memory anyway, as after an all-gather of one."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    adjoin = dim == 0 and all(
        tensor.is_contiguous()
        and tensor.shape == first.shape
        and tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and tensor.storage_offset() == first.storage_offset() + index * first.numel()
        for index, tensor in enumerate(tensors)
    )
    if adjoin:
        return first.as_strided((len(tensors) * first.shape[0], *first.shape[1:]), first.stride())
    return torch.cat(list(tensors), dim=dim)

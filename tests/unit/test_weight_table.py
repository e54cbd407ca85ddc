"""Layouts checked by hand-written numbers, then as inverses of each other for every kind and degree."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_mopd.student.architecture import Architecture, parse_architecture
from megatron_mopd.student.weight_table import Layout, Row, Shard, join, model_tensors, split, table_of
from tests import qwen3_30b_a3b

ARCH = Architecture(
    family="qwen3",
    vocab_size=5,
    hidden_size=3,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=1,
    ffn_size=4,
    expert_ffn_size=0,
    num_experts=0,
    experts_per_token=0,
    norm_topk_prob=False,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=64,
    tie_embeddings=False,
)


def test_the_table_of_qwen3_30b_a3b_is_the_published_index() -> None:
    arch = parse_architecture(qwen3_30b_a3b.CONFIG, "test")
    shapes = {tensor.name: tensor.shape for tensor in model_tensors(arch)}
    assert shapes == qwen3_30b_a3b.index()
    assert len(shapes) == 18_867
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == qwen3_30b_a3b.PARAMETERS
    assert qwen3_30b_a3b.BYTES == 61_064_245_248


def _column(*rows: int) -> torch.Tensor:
    return torch.tensor(rows)[:, None]


def test_qkv_rows_are_grouped_by_key_value_head() -> None:
    # 4 query heads of size 1 share 2 key/value heads: q0 q1 go with k0 v0, q2 q3 with k1 v1.
    tensors = (_column(0, 1, 2, 3), _column(10, 11), _column(20, 21))
    whole = split(Layout.QKV, tensors, ARCH, Shard(0, 1))
    assert whole.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert split(Layout.QKV, tensors, ARCH, Shard(1, 2)).flatten().tolist() == [2, 3, 11, 21]


def test_qkv_keeps_the_rows_of_a_head_together() -> None:
    arch = dataclasses.replace(ARCH, num_heads=2, num_kv_heads=1, head_dim=2)
    whole = split(Layout.QKV, (_column(0, 1, 2, 3), _column(10, 11), _column(20, 21)), arch, Shard(0, 1))
    assert whole.flatten().tolist() == [0, 1, 2, 3, 10, 11, 20, 21]


def test_gated_is_gate_then_up_on_each_rank() -> None:
    tensors = (_column(0, 1, 2, 3), _column(10, 11, 12, 13))
    assert split(Layout.GATED, tensors, ARCH, Shard(0, 1)).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert split(Layout.GATED, tensors, ARCH, Shard(1, 2)).flatten().tolist() == [2, 3, 12, 13]


def test_cols_cut_the_second_dimension() -> None:
    tensor = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert split(Layout.COLS, (tensor,), ARCH, Shard(1, 2)).tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize(
    ("rank", "rows", "expected"),
    [(0, 3, [1, 2, 3]), (1, 3, [4, 5, 0]), (1, 5, [0, 0, 0, 0, 0]), (2, 4, [0, 0, 0, 0])],
)
def test_vocab_is_padded_with_zero_rows(rank: int, rows: int, expected: list[int]) -> None:
    part = split(Layout.VOCAB, (_column(1, 2, 3, 4, 5),), ARCH, Shard(rank, 4, rows))
    assert part.flatten().tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", list(Layout))
def test_join_undoes_split(layout: Layout, size: int) -> None:
    arch = dataclasses.replace(ARCH, num_heads=8, num_kv_heads=4, head_dim=2, ffn_size=8, vocab_size=10)
    shapes: dict[Layout, list[tuple[int, ...]]] = {
        Layout.REPLICATED: [(3,)],
        Layout.COLS: [(3, 8)],
        Layout.QKV: [(16, 3), (8, 3), (8, 3)],
        Layout.GATED: [(8, 3), (8, 3)],
        Layout.VOCAB: [(10, 3)],
    }
    tensors = [torch.randn(shape) for shape in shapes[layout]]
    rows = -(-arch.vocab_size // size)
    shards = [split(layout, tensors, arch, Shard(rank, size, rows)) for rank in range(size)]
    for whole, tensor in zip(join(layout, shards, arch), tensors, strict=True):
        assert torch.equal(whole, tensor)


def test_one_rank_joins_without_a_copy_where_rows_stay_in_place() -> None:
    fused = torch.randn(8, 3)
    gate, up = join(Layout.GATED, [fused], ARCH)
    assert gate.data_ptr() == fused.data_ptr()
    assert up.data_ptr() == fused[4:].data_ptr()


def test_names_are_those_of_the_published_models() -> None:
    moe = dataclasses.replace(ARCH, family="qwen3_moe", num_experts=2, expert_ffn_size=6, num_layers=1)
    shapes = {tensor.name: tensor.shape for tensor in model_tensors(moe)}
    assert next(iter(shapes)) == "model.embed_tokens.weight"
    assert list(shapes)[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (4, 3)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (3, 4)
    assert shapes["model.layers.0.mlp.gate.weight"] == (2, 3)
    assert shapes["model.layers.0.mlp.experts.1.down_proj.weight"] == (3, 6)
    assert len(shapes) == 1 + (8 + 1 + 2 * 3) + 2


# As Megatron-Core 0.19.2 with Transformer Engine 2.20.2 lists them for layer 0 (two experts of eight shown).
_TE_MOE_LAYER = """
self_attention.linear_proj.weight
self_attention.linear_qkv.layer_norm_weight
self_attention.linear_qkv.weight
self_attention.q_layernorm.weight
self_attention.k_layernorm.weight
pre_mlp_layernorm.weight
mlp.router.weight
mlp.experts.linear_fc1.weight0
mlp.experts.linear_fc1.weight1
mlp.experts.linear_fc2.weight0
mlp.experts.linear_fc2.weight1
"""
_TE_DENSE_MLP = "mlp.linear_fc1.layer_norm_weight mlp.linear_fc1.weight mlp.linear_fc2.weight"


def test_every_transformer_engine_name_is_a_spelling_of_one_row() -> None:
    prefix = "decoder.layers.0."
    moe = table_of(dataclasses.replace(ARCH, family="qwen3_moe", num_experts=2))
    patterns = [(row, expert) for row in moe.layer for expert in (0,)]
    patterns += [(row, expert) for row in moe.expert for expert in (0, 1)]
    matches = [
        [name for name in _TE_MOE_LAYER.split() if prefix + name in _spellings(row, expert)] for row, expert in patterns
    ]
    assert all(len(match) == 1 for match in matches)
    assert {name for [name] in matches} == set(_TE_MOE_LAYER.split())
    dense = {name for row in table_of(ARCH).layer for name in _spellings(row, 0)}
    assert {prefix + name for name in _TE_DENSE_MLP.split()} <= dense


def _spellings(row: Row, expert: int) -> list[str]:
    return [name.format(layer=0, expert=expert) for name in row.megatron]


def test_a_tied_output_layer_is_loaded_but_not_exported() -> None:
    tied = dataclasses.replace(ARCH, tie_embeddings=True)
    assert "lm_head.weight" not in {tensor.name for tensor in model_tensors(tied)}
    assert table_of(tied).last[1].hf == (("model.embed_tokens.weight", "VH"),)

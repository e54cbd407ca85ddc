"""The GPU path's models, made from Transformer Engine's Python code on the meta device: names, shapes, checkpoint keys.

Construction only. No number of Transformer Engine is computed anywhere in these tests: that needs a GPU.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.student.architecture import Architecture, parse_architecture
from megatron_mopd.student.weight_table import Row, hf_tensors, table_of
from tests import qwen3_30b_a3b, tiny

ROOT = Path(__file__).parents[2]
WHEEL = Path(sys.prefix) / "transformer_engine"
"""Where launch/setup.sh unpacks the pinned wheel: not on the path of anything but these tests."""

pytestmark = [
    pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine itself is installed"),
    pytest.mark.skipif(
        not WHEEL.is_dir(), reason=f"{WHEEL} is missing: launch/setup.sh could not download transformer-engine"
    ),
]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """What `tests/te/list_modules.py` says of each of its models."""
    command = [sys.executable, "-m", "tests.te.list_modules", str(WHEEL)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_the_wheel_is_the_pinned_one() -> None:
    pinned = re.findall(r"^transformer-engine==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert [path.name for path in WHEEL.glob("*.dist-info")] == [f"transformer_engine-{pinned[0]}.dist-info"]


@pytest.mark.parametrize("name", ["moe", "moe_fp8", "moe_context", "dense", "tied", "qwen3_30b_a3b"])
def test_nothing_takes_memory_and_every_parameter_has_its_row(name: str, models: dict[str, Any]) -> None:
    found = models[name]
    assert found["devices"] == ["meta"]
    assert found["rows"] == len(found["parameters"]) > 0


def test_layers_are_transformer_engines(models: dict[str, Any]) -> None:
    kinds = {
        "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
        "self_attention.core_attention": "TEDotProductAttention",
        "self_attention.linear_proj": "TERowParallelLinear",
        "mlp.router": "TopKRouter",
        "mlp.experts": "TEGroupedMLP",
        "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear",
        "mlp.experts.linear_fc2": "TERowParallelGroupedLinear",
    }
    for name in ("moe", "moe_fp8"):
        modules = models[name]["modules"]
        assert {key: modules[f"decoder.layers.1.{key}"] for key in kinds} == kinds


def test_fp8_is_set_in_the_student_where_asked_for(models: dict[str, Any]) -> None:
    assert models["moe_fp8"]["fp8"] == ["e4m3", "blockwise"]
    assert models["moe"]["fp8"][0] is None
    assert models["moe_fp8"]["parameters"] == models["moe"]["parameters"]  # they stay bfloat16


def test_attention_sends_keys_and_values_around_the_context_ranks(models: dict[str, Any]) -> None:
    assert models["moe_context"]["context"] == ["p2p", "p2p"]  # of both layers
    assert models["moe"]["context"] == []
    for key in ("parameters", "modules", "sharded"):
        assert models["moe_context"][key] == models["moe"][key]


@pytest.mark.parametrize("name", ["moe", "qwen3_30b_a3b"])
def test_a_parameter_has_as_many_numbers_as_its_hugging_face_tensors(name: str, models: dict[str, Any]) -> None:
    raw = tiny.MOE | {"num_hidden_layers": 2, "num_experts": 4} if name == "moe" else qwen3_30b_a3b.CONFIG
    arch = parse_architecture(raw, "test")
    found = {key: math.prod(shape) for key, shape in models[name]["parameters"].items()}
    counted = 0
    for row, layer, expert in all_rows(arch):
        [spelling] = {text.format(layer=layer, expert=expert) for text in row.megatron} & found.keys()
        assert found[spelling] == sum(math.prod(tensor.shape) for tensor in hf_tensors(row, arch)), spelling
        counted += found[spelling]
    assert counted == sum(found.values())
    if name == "qwen3_30b_a3b":
        assert counted == qwen3_30b_a3b.PARAMETERS


def all_rows(arch: Architecture) -> Iterator[tuple[Row, int, int]]:
    """(row, layer, expert) of every parameter."""
    table = table_of(arch)
    yield from ((row, 0, 0) for row in (*table.first, *table.last))
    for layer in range(arch.num_layers):
        yield from ((row, layer, 0) for row in table.layer)
        yield from ((row, layer, expert) for expert in range(arch.num_experts) for row in table.expert)


def test_a_checkpoint_with_extra_states_loads(models: dict[str, Any]) -> None:
    """As `checkpoint.load` does it: every key is expected, none is missing."""
    assert all(models[name]["loads"] for name in ("moe", "moe_fp8", "dense", "tied"))


def test_checkpoint_keys(models: dict[str, Any]) -> None:
    """As Megatron-Core 0.19.2 with the compiled Transformer Engine 2.20.2 named them; the layer is an axis."""
    keys = {
        "self_attention.linear_qkv.layer_norm_weight": "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
        "self_attention.q_layernorm.weight": "self_attention.q_layernorm.weight",
        "pre_mlp_layernorm.weight": "pre_mlp_layernorm.weight",
        "mlp.router.weight": "mlp.router.weight",
        "mlp.experts.linear_fc1.weight3": "mlp.experts.experts.linear_fc1.weight",
        "mlp.experts.linear_fc2.weight0": "mlp.experts.experts.linear_fc2.weight",
    }
    sharded = models["moe"]["sharded"]
    for layer in (0, 1):
        found = {name: sharded[f"decoder.layers.{layer}.{name}"] for name in keys}
        assert found == {name: f"decoder.layers.{key}" for name, key in keys.items()}
    dense = models["dense"]["sharded"]
    norm = "mlp.linear_fc1.layer_norm_weight"
    assert dense[f"decoder.layers.1.{norm}"] == f"decoder.layers.{norm}"
    for name in ("moe", "dense", "tied"):
        weights = {key for key in models[name]["sharded"] if "_extra_state" not in key}
        # A tied model of one stage has no output layer of its own, but its key is in the checkpoint.
        assert weights - {"output_layer.weight"} == set(models[name]["parameters"]) - {"output_layer.weight"}
        assert sum("_extra_state" in key for key in models[name]["sharded"]) > 0

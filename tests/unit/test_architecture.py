"""config.json: both spellings that transformers has used, and what cannot be trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_mopd.config import ParallelSpec
from megatron_mopd.student.architecture import check_architecture, parse_architecture, read_architecture
from megatron_mopd.yaml_config import ConfigError
from tests import tiny


def test_both_spellings_are_the_same_model() -> None:
    new = {key: value for key, value in tiny.MOE.items() if key not in ("num_experts", "rope_theta")}
    new |= {"num_local_experts": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert parse_architecture(new, "new") == parse_architecture(dict(tiny.MOE), "old")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported; supported: qwen3, qwen3_moe"),
        ({"num_hidden_layers": None}, "num_layers: expected a whole number, got None"),
        ({"hidden_size": "96"}, "hidden_size: expected a whole number, got '96'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number > 0, got 0"),
        ({"rope_theta": "x"}, "a number is expected"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers=[1] is not supported"),
    ],
)
def test_what_cannot_be_used_is_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"here: {message}")):
        parse_architecture({**tiny.MOE, **change}, "here")


def test_a_missing_key_a_list_and_broken_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="here: missing key 'hidden_size'"):
        parse_architecture({k: v for k, v in tiny.MOE.items() if k != "hidden_size"}, "here")
    for text, message in (("[]", "expected a JSON object, got list"), ("{", "not valid JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
            read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.DENSE))
    assert not read_architecture(tmp_path).is_moe


@pytest.mark.parametrize(
    ("config", "parallel", "message"),
    [
        (tiny.MOE, ParallelSpec(tensor=4), "parallel.tensor: 4 does not divide a's 4 heads and 2 key/value heads"),
        (tiny.MOE, ParallelSpec(pipeline=3), "parallel.pipeline: 3 does not divide a's 4 layers"),
        (tiny.MOE, ParallelSpec(expert=3), "parallel.expert: 3 does not divide a's 8 experts"),
        (tiny.DENSE, ParallelSpec(expert=2), "parallel.expert: 2, but a's model has no experts"),
        ({**tiny.DENSE, "intermediate_size": 63}, ParallelSpec(tensor=2), "a's intermediate_size 63"),
    ],
)
def test_layouts_that_do_not_fit(config: dict, parallel: ParallelSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_architecture(parse_architecture(dict(config), "x"), parallel, "a's")

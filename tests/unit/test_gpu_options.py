"""What the configuration can ask of a GPU, and what is told where its packages are missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from megatron_mopd import preflight
from megatron_mopd.config import ModelSpec
from megatron_mopd.yaml_config import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp8": "e4m3", "dtype": "float32"}, r"^fp8: weights .* are bfloat16, not float32; set dtype: bfloat16$"),
        ({"fp8_recipe": "delayed"}, r"^fp8_recipe: 'delayed', but fp8 is off; set fp8 or remove it$"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec(hf_config="folder", **options)


@pytest.mark.parametrize(
    ("options", "package", "message"),
    [
        ({"fp8": "e4m3"}, "transformer_engine", r"^model\.fp8: 'e4m3' needs a GPU and Transformer Engine, "),
        (
            {"gradient_accumulation_fusion": True},
            "fused_weight_gradient_mlp_cuda",
            r"^model\.gradient_accumulation_fusion: NVIDIA's apex .* is not installed; .* or set it to false$",
        ),
    ],
)
def test_a_missing_package_is_told_in_one_line(
    options: dict[str, Any], package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = set[str]()
    monkeypatch.setattr(
        preflight, "find_spec", lambda name: importlib.util.find_spec("json") if name in installed else None
    )
    with pytest.raises(ConfigError, match=message):
        preflight.check_gpu_packages(ModelSpec(hf_config="folder", **options))
    installed.add(package)
    preflight.check_gpu_packages(ModelSpec(hf_config="folder", **options))
    preflight.check_gpu_packages(ModelSpec(hf_config="folder"))


def test_fp8_needs_sixteen_tokens_of_each_rank() -> None:
    assert ModelSpec(hf_config="folder").tokens_multiple == 1
    assert ModelSpec(hf_config="folder", fp8="hybrid", fp8_recipe="tensorwise").tokens_multiple == 16

"""What a Hugging Face config.json says about a Qwen3 or Qwen3-MoE model, as a frozen dataclass.

Imports neither torch nor Megatron: the pre-flight checks and the rollout engine read it too.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.config import ParallelSpec
from megatron_mopd.yaml_config import ConfigError, read_text

FAMILIES = ("qwen3", "qwen3_moe")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shapes of one decoder. `num_experts == 0` is the dense family."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    """Intermediate size of the dense MLP."""
    expert_ffn_size: int
    num_experts: int
    experts_per_token: int
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tie_embeddings: bool
    init_std: float = 0.02

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0


def read_architecture(folder: Path) -> Architecture:
    """Parse `folder`/config.json. Raises ConfigError naming the file and the key."""
    path = folder / "config.json"
    try:
        raw = json.loads(read_text(path, "model configuration"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    return parse_architecture(raw, str(path))


def parse_architecture(raw: dict[str, Any], origin: str) -> Architecture:
    """Turn the contents of a config.json into an `Architecture`; `origin` is named in errors."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: expected a JSON object, got {type(raw).__name__}")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{origin}: model_type '{family}' is not supported; supported: {', '.join(FAMILIES)}")
    unsupported = {
        "attention_bias": bool(raw.get("attention_bias")),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "mlp_only_layers": bool(raw.get("mlp_only_layers")),
        "decoder_sparse_step": raw.get("decoder_sparse_step", 1) != 1,
        "rope_scaling": _rope(raw).get("rope_type", "default") != "default",
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
    }
    for key, bad in unsupported.items():
        if bad:
            raise ConfigError(f"{origin}: {key}={raw.get(key)!r} is not supported by this program")
    moe = family == "qwen3_moe"
    try:
        arch = Architecture(
            family=family,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            ffn_size=raw["intermediate_size"],
            expert_ffn_size=raw["moe_intermediate_size"] if moe else 0,
            num_experts=_num_experts(raw) if moe else 0,
            experts_per_token=raw["num_experts_per_tok"] if moe else 0,
            norm_topk_prob=bool(raw.get("norm_topk_prob", False)),
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(_rope(raw).get("rope_theta") or raw["rope_theta"]),
            max_positions=raw["max_position_embeddings"],
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            init_std=raw.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConfigError(f"{origin}: missing key {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: a number is expected: {error}") from None
    for field in dataclasses.fields(arch):
        value = getattr(arch, field.name)
        if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ConfigError(f"{origin}: {field.name}: expected a whole number, got {value!r}")
        if field.type == "float" and not (isinstance(value, int | float) and value > 0):
            raise ConfigError(f"{origin}: {field.name}: expected a number > 0, got {value!r}")
    return arch


def _num_experts(raw: dict[str, Any]) -> int:
    """transformers 5 writes `num_local_experts`, earlier releases and the published models `num_experts`."""
    return int(raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"])


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, earlier releases `rope_scaling` and a top-level rope_theta."""
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def check_architecture(arch: Architecture, parallel: ParallelSpec, whose: str = "the student's") -> None:
    """Raise ConfigError when the model cannot be cut into this layout."""
    tp, pp, ep = parallel.tensor, parallel.pipeline, parallel.expert
    if arch.num_heads % tp or arch.num_kv_heads % tp:
        heads = f"{arch.num_heads} heads and {arch.num_kv_heads} key/value heads"
        raise ConfigError(f"parallel.tensor: {tp} does not divide {whose} {heads}; use a common divisor of both")
    if not arch.is_moe and arch.ffn_size % tp:
        raise ConfigError(f"parallel.tensor: {tp} does not divide {whose} intermediate_size {arch.ffn_size}")
    if arch.num_layers % pp:
        raise ConfigError(f"parallel.pipeline: {pp} does not divide {whose} {arch.num_layers} layers; use a divisor")
    if ep > 1 and not arch.is_moe:
        raise ConfigError(f"parallel.expert: {ep}, but {whose} model has no experts; set it to 1")
    if arch.is_moe and arch.num_experts % ep:
        raise ConfigError(f"parallel.expert: {ep} does not divide {whose} {arch.num_experts} experts; use a divisor")

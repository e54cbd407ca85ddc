"""Shapes of published models, for plans of runs whose model is not here yet. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.config import RunConfig
from megatron_mopd.hub import MANIFEST, MODEL_FOLDER
from megatron_mopd.student.architecture import Architecture, parse_architecture, read_architecture
from megatron_mopd.yaml_config import ConfigError

_QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 65536,
}
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "qwen3-30b-a3b": _QWEN3_MOE
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
    },
    "qwen3-235b-a22b": _QWEN3_MOE
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
    },
    "1t-a32b": _QWEN3_MOE
    | {
        "vocab_size": 163840,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_experts": 384,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
    },
}
"""The first two are Qwen3's config.json (arXiv 2505.09388), with positions for 65,536 tokens. `1t-a32b` is not a model
that exists: width, depth, vocabulary and experts of Kimi K2 (arXiv 2507.20534) in the Qwen3-MoE family that this
program trains: 8 key/value heads where Kimi K2 has latent attention, no shared expert, no dense first layer."""


@dataclass(frozen=True, slots=True)
class Shapes:
    arch: Architecture
    origin: str


def published(name: str) -> Shapes:
    return Shapes(parse_architecture(PUBLISHED[name], name), f"published shapes of {name}")


def student_shapes(config: RunConfig, file: Path, model: str | None) -> Shapes:
    """`--model` if given, else the model of the configuration if it is here, else `model/` beside the file or above.

    Never asks the Hub: a plan downloads nothing. Raises ConfigError.
    """
    if model is not None:
        if model in PUBLISHED:
            return published(model)
        folder = _folder(model)
        if folder is None:
            names = ", ".join(PUBLISHED)
            raise ConfigError(f"--model {model}: no folder with config.json, and none of the published: {names}")
        return Shapes(read_architecture(folder), str(folder))
    source = config.model.source
    for name in (source, str(file.parent / "model"), str(file.parent.parent / "model")):
        folder = _folder(name)
        if folder is not None:
            return Shapes(read_architecture(folder), str(folder))
    raise ConfigError(
        f"model: {source} is not here, nor a folder `model` beside {file} or above it; name the shapes: "
        f"--model FOLDER, or --model {' or '.join(PUBLISHED)}"
    )


def teacher_shapes(config: RunConfig, student: Shapes) -> tuple[Shapes, ...]:
    """One per teacher; those that are not here yet are taken to be shaped as the student."""
    found = []
    for teacher in config.teachers.values():
        folder = None if teacher.checkpoint == "self" else _folder(teacher.checkpoint)
        found.append(student if folder is None else Shapes(read_architecture(folder), str(folder)))
    return tuple(found)


def _folder(name: str) -> Path | None:
    """The folder with config.json that a configuration's name stands for, if it is on this machine."""
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        path = path / MODEL_FOLDER
    return path if (path / "config.json").is_file() else None

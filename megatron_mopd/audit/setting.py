"""The configuration that an audit of a run works with."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from megatron_mopd.audit.options import Options
from megatron_mopd.config import ObjectiveSpec, RunConfig, TeacherSpec
from megatron_mopd.hub import resolve_folder
from megatron_mopd.student.architecture import Architecture, read_architecture
from megatron_mopd.student.weight_table import model_tensors
from megatron_mopd.yaml_config import ConfigError

TEACHER = "self"
"""The name, and the checkpoint, of the one teacher of an audit."""


def audit_config(config: RunConfig, settings: Options) -> RunConfig:
    """`config` with the student as its only teacher, and a folder of its own inside `run_dir`: servers of a run that is
    under way are then refused as somebody else's. Raises ConfigError where there is nothing to compare."""
    if not config.generates:
        what = f"stage '{config.stage}'" if config.stage == "sft" else "rollout.engine 'dataset'"
        raise ConfigError(f"audit: {what} samples no answers, so there is no engine to compare; use a mopd or rl run")
    if config.model.checkpoint is None:
        raise ConfigError("model.checkpoint: missing; an audit compares models that were loaded from the same weights")
    folder = resolve_folder(config.model.checkpoint, "model.checkpoint")
    arch = read_architecture(folder)
    if settings.reference:
        _check_reference(arch)
    rollout = replace(config.rollout, routing_replay="off")
    if rollout.sglang is not None and (config.rollout.routing_replay == "R3" or rollout.sglang.launch) and arch.is_moe:
        rollout = replace(rollout, routing_replay="R3")  # so that servers report the experts
    return replace(
        config,
        run_dir=str(Path(config.run_dir) / "audit"),
        stage="mopd",
        teachers={TEACHER: TeacherSpec(checkpoint=TEACHER)},
        domains={name: replace(domain, teacher=TEACHER) for name, domain in config.domains.items()},
        objective=ObjectiveSpec(kind="sampled"),
        rollout=rollout,
    )


def _check_reference(arch: Architecture) -> None:
    needed = sum(math.prod(tensor.shape) for tensor in model_tensors(arch)) * 4 / 1e9
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed > present / 2:
        raise ConfigError(
            f"--reference: {needed:.0f} GB of float32 weights are more than half of this machine's {present:.0f} GB; "
            "leave it out"
        )


def in_float32(config: RunConfig) -> RunConfig:
    """The same with weights and activations in float32."""
    return replace(config, model=replace(config.model, dtype="float32", fp8=None, fp8_recipe="blockwise"))

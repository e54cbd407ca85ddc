"""Which teachers a run learns from: written into every checkpoint, compared when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mopd.config import RunConfig
from megatron_mopd.parallel.runtime import World
from megatron_mopd.preflight import Inputs
from megatron_mopd.student.hf_files import content_hash
from megatron_mopd.yaml_config import ConfigError


def teacher_manifest(config: RunConfig, inputs: Inputs, world: World) -> dict[str, dict[str, Any]]:
    """teacher -> where it came from and hashes of what it is; plain values, for JSON.

    The main rank reads the files, once; the others are told. Collective.
    """
    own = {name: content_hash(folder) for name, (_, folder) in inputs.teachers.items()} if world.is_main else {}
    hashes = world.all_gather_objects(own)[0]
    return {
        name: {
            "checkpoint": config.teachers[name].checkpoint,
            "weights": hashes[name],
            "vocabulary": inputs.tokenizer.fingerprint.vocab_hash,
            "chat_template": inputs.tokenizer.fingerprint.template_hash,
        }
        for name in inputs.teachers
    }


def teacher_weights(config: RunConfig, manifest: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """domain -> hash of its teacher's weights; {} without teachers."""
    return {name: manifest[spec.teacher]["weights"] for name, spec in config.domains.items() if spec.teacher}


def check_same_teachers(
    saved: Mapping[str, Mapping[str, Any]], current: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Raise ConfigError, with the difference, when a checkpoint was trained with other teachers.

    The path of a teacher may change as long as its contents do not.
    """
    differences = [f"teachers.{name} was not there" for name in current.keys() - saved.keys()]
    differences += [f"teachers.{name} is gone" for name in saved.keys() - current.keys()]
    for name in sorted(saved.keys() & current.keys()):
        for key in ("weights", "vocabulary", "chat_template"):
            old, new = saved[name][key], current[name][key]
            if old != new:
                place = f"{saved[name]['checkpoint']} -> {current[name]['checkpoint']}"
                differences.append(f"teachers.{name}: {key} {old[:12]} -> {new[:12]} ({place})")
    if differences:
        raise ConfigError(
            f"{path}: this run was trained with other teachers: {'; '.join(sorted(differences))}. "
            "Restore them, or start a new run in another run_dir"
        )

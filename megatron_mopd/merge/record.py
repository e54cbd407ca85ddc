"""merge.json: what a merged folder says of itself, compared before anything is merged a second time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_mopd.merge.plan import Checkpoint, Plan
from megatron_mopd.student.checkpoint_files import free_bytes
from megatron_mopd.student.hf_files import DTYPES, read_headers
from megatron_mopd.yaml_config import ConfigError, read_text

RECORD = "merge.json"
_SPARE_BYTES = 64 << 20
"""For headers, the tokenizer and what the file system needs."""


def settings(plan: Plan) -> dict[str, Any]:
    """The part of merge.json that says how; plain values."""
    recipe = plan.recipe
    return {
        "version": 1,
        "method": recipe.method,
        "scaling": recipe.scaling,
        "density": recipe.density,
        "seed": recipe.seed,
        "weights": recipe.weights,
        "dtype": plan.dtype,
        "vocabulary": plan.fingerprint.vocab_hash,
        "chat_template": plan.fingerprint.template_hash,
    }


def origins(plan: Plan, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The part of merge.json that says what; `hashes` is by configuration key."""
    return {
        "base": _origin(plan.base, hashes),
        "models": {name: _origin(model, hashes) for name, model in plan.models.items()},
    }


def _origin(checkpoint: Checkpoint | None, hashes: Mapping[str, str]) -> dict[str, str] | None:
    if checkpoint is None:
        return None
    return {"checkpoint": checkpoint.name, "content": hashes[checkpoint.key]}


def check_out(plan: Plan) -> dict[str, Any] | None:
    """The merge.json that is in `out` already, None where `out` is new or empty. ConfigError for anything else."""
    out = plan.out
    if not out.exists():
        return None
    if not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file()):
        raise ConfigError(f"out: {out} exists and is not a merged model; name a new folder")
    if not (out / RECORD).is_file():
        return None
    try:
        found = json.loads(read_text(out / RECORD, "record of the merge"))
    except ValueError as error:
        raise ConfigError(f"out: {out / RECORD} is not valid JSON ({error}); delete {out}, or name a new one") from None
    if not isinstance(found, dict):
        raise ConfigError(f"out: {out / RECORD} is not a JSON object; delete {out}, or name a new one")
    return found


def check_same(plan: Plan, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the first difference, unless what lies in `out` is `wanted`, and all of it."""
    for key, value in wanted.items():
        change = _difference(found.get(key), value, key)
        if change is not None:
            raise ConfigError(f"out: {plan.out} is another merge: {change}; name a new folder, or delete it")
    stored = {name: (tensor.shape, DTYPES[tensor.dtype]) for name, tensor in read_headers(plan.out).items()}
    if stored != {spec.name: (spec.shape, spec.dtype) for spec in plan.specs}:
        raise ConfigError(f"out: the weights in {plan.out} are not those of its {RECORD}; delete the folder")


def _difference(found: Any, wanted: Any, key: str) -> str | None:
    """In words; None where they are the same merge. The place of a checkpoint may change."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        if found.keys() == wanted.keys() == {"checkpoint", "content"}:
            return _difference(found["content"], wanted["content"], f"{key}.content")
        both = dict.fromkeys([*wanted, *found])
        changes = (_difference(found.get(name), wanted.get(name), f"{key}.{name}") for name in both)
        return next((change for change in changes if change is not None), None)
    return None if found == wanted else f"{key} was {_short(found)}, is {_short(wanted)}"


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    if isinstance(value, Mapping):
        return "there"
    return value[:12] if isinstance(value, str) else str(value)


def check_room(plan: Plan) -> None:
    """Raise ConfigError when the disk of `out` has too little room, or `out` cannot be created."""
    needed, free = plan.num_bytes + _SPARE_BYTES, free_bytes(plan.out)
    if free < needed:
        raise ConfigError(
            f"out: {plan.out} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; make room, or name"
            " a folder on another disk"
        )

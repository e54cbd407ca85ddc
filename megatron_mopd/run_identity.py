"""What makes a run folder's run the same run: compared on resume, so that nothing is continued as something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_mopd.config import RunConfig, Split
from megatron_mopd.domains.dataset import Dataset
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.yaml_config import ConfigError, to_tree


def run_identity(config: RunConfig, tokenizer: Tokenizer, dataset: Dataset | None = None) -> dict[str, Any]:
    """Plain values, for JSON. How fast and how long to train (steps, optim, parallel, log, ...) may change."""
    evaluation = {"seed": config.evaluation.seed, "prompts": config.evaluation.prompts}
    if config.evaluation.validation_prompts:  # named only where used: older checkpoints do not know it
        evaluation["validation_prompts"] = config.evaluation.validation_prompts
    return {
        "stage": config.stage,
        "seed": config.seed,
        "prompts_per_step": config.prompts_per_step,
        "domains": to_tree(config.domains),
        "domain_schedule": config.domain_schedule,
        # One domain after another: how many steps there are says whose turn it is.
        **({"steps": config.steps} if config.domain_schedule == "sequential" else {}),
        "objective": to_tree(config.objective),
        "rollout": _rollout_identity(config, dataset),
        "evaluation": evaluation,
        "vocabulary": tokenizer.fingerprint.vocab_hash,
        "chat_template": tokenizer.fingerprint.template_hash,
    }


def _rollout_identity(config: RunConfig, dataset: Dataset | None) -> dict[str, Any]:
    """A dataset is its contents: the file may move. Which servers sample, where they are, how far ahead and in
    which order, may change."""
    tree = to_tree(config.rollout) | {"dataset": dataset.fingerprint if dataset else None}
    left_out = {"sglang", "lag", "over_sample", "partial", "waves"} | (
        {"routing_replay"} if config.rollout.routing_replay == "off" else set()
    )
    return {key: value for key, value in tree.items() if key not in left_out}


def check_kept_out(saved: Mapping[str, Any], config: RunConfig, split: Split) -> None:
    """Raise ConfigError when the run of identity `saved` may have trained on a prompt of `split`.

    Files keep all of a split out of training; of a reasoning-gym task only the prompts that the run knew of.
    """
    kept = {"validation_prompts": 0, **saved["evaluation"]}
    shared = [domain for name, domain in config.domains.items() if name in saved["domains"]]
    endless = any(domain.source.reasoning_gym is not None for domain in shared)
    key = "prompts" if split == "held_out" else "validation_prompts"
    asked = getattr(config.evaluation, key)
    if endless and kept["seed"] != config.evaluation.seed:
        problem = f"evaluation.seed: is {config.evaluation.seed}, the checkpoint's run had {kept['seed']}"
    elif shared and kept[key] < asked and (endless or not kept[key]):
        problem = f"evaluation.{key}: is {asked}, the checkpoint's run kept {kept[key]} a domain out of training"
    else:
        return
    raise ConfigError(f"{problem}: it may have trained on the others; evaluate with the run's own value")


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError, with the differences, when the checkpoint `path` is of another run than the configuration."""
    differences = list(_differences(saved, current, ""))
    if differences:
        raise ConfigError(
            f"{path}: is of another run: {'; '.join(differences)}. Undo that, or start a new run in another run_dir"
        )


def _differences(saved: Any, current: Any, key: str) -> Iterator[str]:
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for name in dict.fromkeys([*saved, *current]):
            yield from _differences(saved.get(name), current.get(name), f"{key}.{name}" if key else name)
    elif saved != current:
        yield f"{key} was {saved!r}, is {current!r}"

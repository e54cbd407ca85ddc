"""What makes a run folder's run the same run: compared on resume, so that nothing is continued as something else."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_mopd.config import RunConfig
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.yaml_config import ConfigError, to_tree


def run_identity(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Plain values, for JSON. How fast and how long to train (steps, optim, parallel, log, ...) may change."""
    return {
        "stage": config.stage,
        "seed": config.seed,
        "prompts_per_step": config.prompts_per_step,
        "domains": to_tree(config.domains),
        "domain_schedule": config.domain_schedule,
        # One domain after another: how many steps there are says whose turn it is.
        **({"steps": config.steps} if config.domain_schedule == "sequential" else {}),
        "objective": to_tree(config.objective),
        "rollout": to_tree(config.rollout),
        "evaluation": {"seed": config.evaluation.seed, "prompts": config.evaluation.prompts},
        "vocabulary": tokenizer.fingerprint.vocab_hash,
        "chat_template": tokenizer.fingerprint.template_hash,
    }


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


def lock_run_folder(folder: Path) -> TextIO:
    """Hold `folder` for as long as the returned file is open. Raises ConfigError when another run does.

    Two runs in one folder would delete each other's unfinished checkpoints. The kernel drops the lock with the
    process, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir: {folder} cannot be written: {error.strerror}; choose another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        file.close()
        raise ConfigError(f"run_dir: {folder} is in use by {holder}; wait for it, or choose another folder") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file

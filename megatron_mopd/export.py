"""A checkpoint as a Hugging Face folder of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_mopd.config import RunConfig
from megatron_mopd.hub import resolve_folder
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.student.checkpoint_files import unfinished
from megatron_mopd.student.weights import check_hf
from megatron_mopd.yaml_config import ConfigError


def export(config: RunConfig, checkpoint: str, out: Path) -> None:
    """Copy the weights, config.json and tokenizer of `checkpoint` to `out`, which appears only when complete.

    Every checkpoint holds them as safetensors already, gathered from whatever layout it was trained in. Raises
    ConfigError when `out` exists, or when the checkpoint is not of the configuration's model.
    """
    source = resolve_folder(checkpoint, "--checkpoint")
    arch = read_architecture(source)
    check_hf(arch, source, "--checkpoint")
    expected = read_architecture(resolve_folder(config.model.source, "model"))
    if arch != expected:
        raise ConfigError(f"--checkpoint {checkpoint}: another architecture than model {config.model.source}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--hf {out}: exists and is not an empty folder; name a new one")
    partial = unfinished(out)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(f"--hf {out}: cannot be written: {error.strerror or error}") from None

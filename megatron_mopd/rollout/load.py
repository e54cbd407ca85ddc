"""In-process engines as a configuration wants them, empty or with the weights of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.rollout.in_process import InProcessEngine
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.hf_files import TensorReader, read_headers
from megatron_mopd.student.weight_table import model_tensors
from megatron_mopd.tokenizer import Tokenizer


def make_engine(config: RunConfig, arch: Architecture, tokenizer: Tokenizer, device: torch.device) -> InProcessEngine:
    """An engine without weights yet."""
    return InProcessEngine(
        arch,
        stop_ids=tokenizer.stop_ids,
        dtype=getattr(torch, config.model.dtype),
        device=device,
        batch_size=config.rollout.batch_size,
    )


def load_engine(
    config: RunConfig, arch: Architecture, tokenizer: Tokenizer, device: torch.device, folder: Path
) -> InProcessEngine:
    """An engine that samples from the model of a Hugging Face folder or checkpoint, `arch` being its architecture."""
    engine = make_engine(config, arch, tokenizer, device)
    engine.load_weights(_tensors(arch, folder), version=0)
    return engine


def _tensors(arch: Architecture, folder: Path) -> Iterator[tuple[str, Tensor]]:
    with TensorReader(read_headers(folder)) as reader:
        for tensor in model_tensors(arch):
            yield tensor.name, reader[tensor.name][:]

"""Accuracy on held-out prompts, the same ones for every run with the same `evaluation.seed`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.hub import resolve_folder
from megatron_mopd.parallel.runtime import start_world, stop_world
from megatron_mopd.rollout.collect import Collector
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.rollout.in_process import InProcessEngine
from megatron_mopd.student.architecture import Architecture, read_architecture
from megatron_mopd.student.hf_files import TensorReader, read_headers
from megatron_mopd.student.weight_table import model_tensors
from megatron_mopd.tokenizer import Tokenizer

FULL_SCORE = 1.0 - 1e-6


def evaluate(config: RunConfig, mixer: DomainMixer, collector: Collector) -> dict[str, float]:
    """domain -> share of right answers to `evaluation.prompts` held-out prompts x `evaluation.samples`. Collective.

    Right means the verifier's full score: partial credit, which some tasks give, is for RL only.
    """
    spec = config.evaluation
    accuracy = {}
    for name in config.domain_names:
        rollouts = collector.sample(
            mixer.held_out(name),
            seed=spec.seed,
            samples=spec.samples,
            sampling=Sampling(temperature=spec.temperature),
        )
        accuracy[name] = float(np.mean([rollout.reward >= FULL_SCORE for rollout in rollouts]))
    return accuracy


def evaluate_checkpoints(config: RunConfig, checkpoints: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """name -> domain -> accuracy of checkpoints or Hugging Face folders, on the domains of `config`. On every rank."""
    world = start_world(config.parallel, config.seed)
    accuracy = {}
    for name, checkpoint in checkpoints.items():
        folder = resolve_folder(checkpoint, name)
        arch, tokenizer = read_architecture(folder), Tokenizer.load(folder)
        engine = InProcessEngine(
            arch,
            stop_ids=tokenizer.stop_ids,
            dtype=getattr(torch, config.model.dtype),
            device=world.device,
            batch_size=config.rollout.batch_size,
        )
        engine.load_weights(_tensors(arch, folder), version=0)
        mixer = DomainMixer(config, tokenizer)
        accuracy[name] = evaluate(config, mixer, Collector(config, mixer, engine, tokenizer, world))
    stop_world()
    return accuracy


def _tensors(arch: Architecture, folder: Path) -> Iterator[tuple[str, Tensor]]:
    with TensorReader(read_headers(folder)) as reader:
        for tensor in model_tensors(arch):
            yield tensor.name, reader[tensor.name][:]

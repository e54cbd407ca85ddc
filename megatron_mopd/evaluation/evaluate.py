"""Answers the prompts of a split, grades them, and puts the figures together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_mopd.config import BenchmarkSpec, DomainSpec, RunConfig, Split
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.domains.splits import PromptSet
from megatron_mopd.domains.verifiers import FULL_SCORE
from megatron_mopd.evaluation.perplexity import checkpoint_perplexity
from megatron_mopd.evaluation.results import EvalResult, Score
from megatron_mopd.hub import resolve_folder
from megatron_mopd.parallel.runtime import World, start_world, stop_world
from megatron_mopd.rollout.collect import Collector
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.rollout.load import load_engine
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.tokenizer import Tokenizer


def evaluate(
    config: RunConfig,
    mixer: DomainMixer,
    collector: Collector,
    split: Split = "held_out",
    seed: int | None = None,
) -> dict[str, Score]:
    """domain -> its score on `split`. Collective."""
    spec = config.evaluation
    sampling = (spec.samples, spec.temperature)
    return {
        name: _score(mixer.split(name, split), domain, sampling, config, collector, seed)
        for name, domain in config.domains.items()
    }


def evaluate_benchmarks(
    config: RunConfig, mixer: DomainMixer, collector: Collector, group: str, seed: int | None = None
) -> dict[str, Score]:
    """name -> its score, of `evaluation.benchmarks` or `evaluation.out_of_domain`. Collective."""
    tasks: Mapping[str, BenchmarkSpec] = getattr(config.evaluation, group)
    return {
        name: _score(mixer.benchmark(group, name), task, config.evaluation.sampling_of(task), config, collector, seed)
        for name, task in tasks.items()
    }


def _score(
    found: PromptSet,
    spec: DomainSpec,
    sampling: tuple[int, float],
    config: RunConfig,
    collector: Collector,
    seed: int | None,
) -> Score:
    samples, temperature = sampling
    rollouts = collector.sample(
        found.prompts,
        seed=config.evaluation.seed if seed is None else seed,
        samples=samples,
        sampling=Sampling(temperature=temperature),
        domains={found.prompts[0].domain: spec},
    )
    right = np.array([rollout.reward >= FULL_SCORE for rollout in rollouts]).reshape(len(found.prompts), samples)
    return Score.of(
        right,
        ks=config.evaluation.pass_at,
        truncation_rate=float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
        too_long=found.too_long,
    )


def evaluate_checkpoints(
    config: RunConfig, checkpoints: Mapping[str, str], split: Split, seed: int | None
) -> dict[str, EvalResult]:
    """See `megatron_mopd.evaluation.evaluate_checkpoints`."""
    world = start_world(config.parallel, config.seed)
    folders = {name: resolve_folder(checkpoint, name) for name, checkpoint in checkpoints.items()}
    results = {name: _evaluate_folder(config, folder, world, split, seed) for name, folder in folders.items()}
    stop_world()
    return results


def _evaluate_folder(config: RunConfig, folder: Path, world: World, split: Split, seed: int | None) -> EvalResult:
    arch, tokenizer = read_architecture(folder), Tokenizer.load(folder)
    # Before the engine has its own copy of the weights: the two need not fit together.
    perplexity = None
    if config.evaluation.perplexity is not None:
        perplexity = checkpoint_perplexity(Path(config.evaluation.perplexity), config, arch, folder, tokenizer, world)
    engine = load_engine(config, arch, tokenizer, world.device, folder)
    mixer = DomainMixer(config, tokenizer)
    collector = Collector(config, mixer, engine, tokenizer, world)
    return EvalResult(
        split=split,
        domains=evaluate(config, mixer, collector, split, seed),
        perplexity=perplexity.value if perplexity else None,
        perplexity_tokens=perplexity.tokens if perplexity else 0,
        out_of_domain=evaluate_benchmarks(config, mixer, collector, "out_of_domain", seed),
        benchmarks=evaluate_benchmarks(config, mixer, collector, "benchmarks", seed),
    )

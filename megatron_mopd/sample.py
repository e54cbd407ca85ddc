"""`mopd sample`: what every teacher answers to its domains' training prompts, as a dataset to learn from off-policy."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_mopd.config import RunConfig
from megatron_mopd.domains.dataset import Cost, StoredAnswer, origin_of
from megatron_mopd.domains.dataset_writer import DatasetWriter
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.domains.verifiers import FULL_SCORE
from megatron_mopd.parallel.runtime import World, start_world, stop_world
from megatron_mopd.preflight import Inputs, check_writable, resolve_inputs
from megatron_mopd.progress import Progress
from megatron_mopd.rollout.collect import Collector
from megatron_mopd.rollout.load import load_engine
from megatron_mopd.run_identity import run_identity
from megatron_mopd.teachers.manifest import teacher_manifest, teacher_weights
from megatron_mopd.types import Rollout
from megatron_mopd.yaml_config import ConfigError

Keep = Literal["all", "correct"]


def sampling_config(config: RunConfig) -> RunConfig:
    """`config` as it is sampled for: the run that reads the dataset may be given, its prompts are the same."""
    rollout = replace(config.rollout, engine="in_process", dataset=None, sglang=None, routing_replay="off")
    return replace(config, rollout=rollout)


def check_sampling(config: RunConfig, out: Path, keep: Keep) -> None:
    """Raise ConfigError for what would stop `mopd sample` before `preflight.check` looks at the rest."""
    if config.stage != "mopd":
        raise ConfigError(f"stage: '{config.stage}' has no teachers to sample from; use the file of a mopd run")
    if config.steps == 0:
        raise ConfigError("steps: 0 steps have no prompts; steps x prompts_per_step prompts are sampled")
    if out.exists():
        raise ConfigError(f"--out {out}: exists; delete it, or name another file")
    check_writable(out.parent, "--out")
    for name, domain in config.domains.items():
        if domain.environment is not None:
            raise ConfigError(f"domains.{name}.environment: a dataset holds answers of one turn; remove it")
        if keep == "correct" and domain.verifier == "none":
            raise ConfigError(f"domains.{name}.verifier: 'none' cannot tell correct answers; use --keep all")


def sample(config: RunConfig, out: str, keep: Keep) -> dict[str, Any]:
    """Write `steps * prompts_per_step` prompts' answers to `out` and return a summary. Called on every rank.

    Every prompt of the run is answered by the teacher of its domain, `rollout.samples_per_prompt` times, with the
    run's sampling. One teacher after another, so that one is in memory at a time.
    """
    world = start_world(config.parallel, config.seed)
    inputs = resolve_inputs(config)
    weights = teacher_weights(config, teacher_manifest(config, inputs, world))
    settings = run_identity(config, inputs.tokenizer) | {"steps": config.steps}
    writer = world.on_main(lambda: DatasetWriter(Path(out), origin_of(inputs.tokenizer, weights, keep), settings))
    done = world.all_gather_objects(writer.so_far.steps if writer else None)[0]
    answers = _answers(config, inputs, world, done)
    if writer is None:
        for _ in answers:
            pass
        stop_world()
        return {}
    with writer:
        cost = write_answers(answers, writer, keep)
        try:
            _check_domains(config, cost)
        except ConfigError:
            writer.discard()
            raise
        writer.finish(cost)
    stop_world()
    return {"dataset": out, "answers": cost.answers, "sampled": cost.sampled, "left_out": cost.left_out,
            "generated_tokens": cost.generated_tokens, "seconds": cost.seconds}  # fmt: skip


def _check_domains(config: RunConfig, cost: Cost) -> None:
    for name in config.domains:
        if name not in cost.sampled:
            raise ConfigError(f"domains.{name}: has no prompt in so few steps; raise steps or prompts_per_step")
        if cost.left_out[name] == cost.sampled[name]:
            raise ConfigError(f"domains.{name}: none of {cost.sampled[name]} answers is correct; use --keep all")


def write_answers(answers: Iterable[Sequence[Rollout]], writer: DatasetWriter, keep: Keep) -> Cost:
    """Write them as they come, a step at a time, `correct`: those with the full score alone. What all of them cost,
    those that were there before among them, for the footer."""
    before = writer.so_far
    started, tokens = time.monotonic() - before.seconds, before.generated_tokens
    sampled, left_out = Counter(before.sampled), Counter(before.left_out)
    for rollouts in answers:
        for rollout in rollouts:
            sampled[rollout.domain] += 1
            tokens += int(rollout.loss_mask.sum())
            if keep == "correct" and rollout.reward < FULL_SCORE:
                left_out[rollout.domain] += 1
            else:
                writer.write(StoredAnswer.of(rollout))
        writer.end_step(sampled=sampled, left_out=left_out, tokens=tokens, seconds=time.monotonic() - started)
    return Cost(
        answers=sampled.total() - left_out.total(),
        sampled=dict(sampled),
        left_out={name: left_out[name] for name in sampled},
        generated_tokens=tokens,
        seconds=time.monotonic() - started,
    )


def _answers(config: RunConfig, inputs: Inputs, world: World, done: int) -> Iterator[list[Rollout]]:
    """The verified answers of every teacher, a step's prompts at a time, alike on every rank, without the first
    `done` steps. Collective."""
    total = len(config.teachers) * config.steps
    with Progress("sample", total=total, rank=world.rank, start=done) as progress:
        if done:
            progress.note(f"going on from step {done} of {total}")
        for place, (name, (arch, folder)) in enumerate(inputs.teachers.items()):
            first = max(0, done - place * config.steps)
            if first >= config.steps:
                continue
            engine = load_engine(config, arch, inputs.tokenizer, world.device, folder)
            # Read from the start for every teacher: rendering prompts again is cheaper than keeping them all.
            mixer = DomainMixer(config, inputs.tokenizer)
            collector = Collector(config, mixer, engine, inputs.tokenizer, world)
            for step in range(config.steps):
                prompts = mixer.draw(config.prompts_per_step, step)
                if step < first:
                    continue
                own = [prompt for prompt in prompts if config.domains[prompt.domain].teacher == name]
                yield collector.sample(own, seed=config.seed * 1_000_003 + step) if own else []
                progress.update(place * config.steps + step + 1, {})

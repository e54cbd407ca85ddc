"""The peak of what a student in training allocates, beside what the plan says. For the CPU, one rank.

    python -m megatron_mopd.plan.measure CONFIG --model FOLDER [key.path=value ...]

Random weights, and one update after another on the largest micro-batch of the plan. Counted are all allocations of
torch's CPU allocator from before the model is built to the end of the updates, as its profiler reports them: weights,
gradients, optimizer, activations, and whatever the operators need in between. Not counted: the micro-batch, the
teacher's scores and head, which are there before.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mopd.config import RunConfig, load_config
from megatron_mopd.packing import pack
from megatron_mopd.parallel.runtime import World, start_world, stop_world
from megatron_mopd.plan.count import ModelCount
from megatron_mopd.plan.memory import Setting, fullest
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.student import Student
from megatron_mopd.token_layout import padded_length
from megatron_mopd.types import MicroBatch, Prompt, Rollout, TeacherScores
from megatron_mopd.yaml_config import ConfigError


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes."""

    held: int
    """Still allocated at the end: weights, gradients, moments."""
    peak: int


def peak_of(work: Callable[[], object]) -> Peak:
    """What torch's CPU allocator had at most given out while `work` ran, beyond what it had before.

    What is held at the end is counted on the tensors that live: the profiler does not see what other threads free
    (those of gloo, and of a recomputation's backward pass), so that its running sum drifts upwards. By how much is
    known at the end, and is taken off in proportion to the events until then.
    """
    before = _live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    held = _live_bytes() - before
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    running = np.cumsum([event.nbytes() for event in events]).astype(np.float64)
    running -= np.linspace(0, running[-1] - held, len(running))
    del kept
    return Peak(held, int(running.max()))


def _live_bytes() -> int:
    """Of the distinct storages of all tensors that Python holds."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated objects that are only asked for their type
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_update(config: RunConfig, arch: Architecture, world: World, setting: Setting, updates: int = 2) -> Peak:
    """Train a student of random weights for `updates` updates on the plan's largest micro-batch. Collective."""
    batch, scores, heads = _largest(config, arch, world, setting)

    def work() -> Student:
        student = Student(config, arch, world, None)
        for step in range(updates):
            student.update([batch], [scores], heads, step)
        return student

    return peak_of(work)


def _largest(
    config: RunConfig, arch: Architecture, world: World, setting: Setting
) -> tuple[MicroBatch, TeacherScores, dict[str, torch.Tensor]]:
    """Answers at their longest, of the domain that makes the largest micro-batch."""
    packing = setting.packing
    domain = max(setting.workload.domains, key=lambda load: load.longest * load.rollouts)
    rng = np.random.default_rng(0)
    prompt, longest = domain.longest_prompt, domain.longest

    def rollout(index: int) -> Rollout:
        tokens = rng.integers(0, arch.vocab_size, longest)
        asked = Prompt(
            id=f"{domain.name}/{index}",
            domain=domain.name,
            token_ids=tokens[:prompt],
            answer="",
            max_response_tokens=domain.longest_response,
        )
        return Rollout(
            prompt=asked,
            sample=0,
            token_ids=tokens,
            loss_mask=np.arange(longest) >= prompt,
            rollout_logprobs=np.zeros(longest, np.float32),
            policy_version=0,
            finish_reason="length",
        )

    batch = pack(
        [rollout(index) for index in range(max(1, packing.tokens // padded_length(longest, world.context.size)))],
        domain.teacher,
        domain_names=config.domain_names,
        aggregation=config.objective.aggregation,
        multiple_of=world.tensor.size,
        device=world.device,
        context_ranks=world.context.size,
        context_rank=world.context.rank,
    )
    rows = len(batch.rows)
    top = config.objective.top_k
    scores = TeacherScores(
        logprobs=torch.zeros(rows) - 3,
        hidden=torch.randn(rows, arch.hidden_size),
        topk_ids=torch.arange(top).repeat(rows, 1) % arch.vocab_size,
        topk_logprobs=torch.full((rows, top), -5.0),
    )
    shard = -(-arch.vocab_size // world.tensor.size)
    return batch, scores, {name: torch.randn(shard, arch.hidden_size) for name in config.teachers}


def main(argv: Sequence[str] | None = None) -> int:
    """Print plan and measurement of one configuration; returns the exit code."""
    from megatron_mopd.plan.setting import setting_on_cpu

    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.plan.measure", description=__doc__)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--model", metavar="FOLDER", help="with config.json; default: the configuration's")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        config = load_config(arguments.config, overrides)
        config = replace(config, parallel=replace(config.parallel, ranks=1))
        setting = setting_on_cpu(config, Path(arguments.config), arguments.model, ranks=1)
        expected = fullest(setting)[1].update
        peak = _alone(config, setting.count, setting)
    except ConfigError as error:
        print(f"measure: error: {error}", file=sys.stderr)
        return 2
    print(
        f"plan {expected / 1e6:.2f} MB, measured peak {peak.peak / 1e6:.2f} MB, off by {expected / peak.peak - 1:+.1%}"
    )
    return 0


def _alone(config: RunConfig, count: ModelCount, setting: Setting) -> Peak:
    """On a world of one rank."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = start_world(config.parallel, config.seed)
    try:
        return measure_update(config, count.arch, world, setting)
    finally:
        stop_world()


if __name__ == "__main__":
    from megatron_mopd.environment import prepare_environment

    prepare_environment()
    sys.exit(main())

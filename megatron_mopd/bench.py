"""Timings of one training step, phase by phase.

    python -m megatron_mopd.bench step CONFIG [--steps 20] [key.path=value ...]

The run is the real one (`megatron_mopd.train`), in a temporary folder. A checkpoint that is not there, or is called
`random`, is replaced by random weights: then few answers end before `max_response_tokens`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_mopd.config import CheckpointSpec, EvalSpec, LogSpec, RunConfig, TeacherSpec, load_config
from megatron_mopd.environment import prepare_environment, world_size
from megatron_mopd.yaml_config import ConfigError

WARMUP_STEPS = 3
PHASES = ("rollout", "teacher", "update", "sync", "total")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark named on the command line; returns the exit code."""
    prepare_environment()
    parser = argparse.ArgumentParser(prog="python -m megatron_mopd.bench", description=__doc__)
    parser.add_argument("benchmark", choices=["step"])
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--steps", type=int, default=20, help="measured steps; a few more warm up first")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="mopd-bench-") as folder:
            return bench_step(load_config(arguments.config, overrides), arguments.steps, Path(folder))
    except ConfigError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


def bench_step(config: RunConfig, steps: int, folder: Path) -> int:
    """Train for a few steps and print the median seconds and tokens/s of each phase."""
    from megatron_mopd import preflight
    from megatron_mopd.launch import launch
    from megatron_mopd.metrics import read_records

    config = _for_bench(config, steps, folder)
    ranks = world_size(config.parallel)
    preflight.check(config, ranks)
    outcome = launch(config, _train)
    if outcome.exit_code:
        return outcome.exit_code
    records = read_records(Path(config.run_dir) / "metrics.jsonl")[WARMUP_STEPS:]
    rollouts = config.prompts_per_step * config.rollout.samples_per_prompt
    threads = os.environ["OMP_NUM_THREADS"]
    print(f"\n{ranks} rank(s) x {threads} thread(s), {rollouts} rollouts a step, median of {len(records)} steps")
    print(f"{'phase':10} {'seconds':>9} {'min':>9} {'max':>9}")
    for phase in PHASES:
        seconds = [record[f"seconds/{phase}"] for record in records]
        print(f"{phase:10} {statistics.median(seconds):9.3f} {min(seconds):9.3f} {max(seconds):9.3f}")
    for phase, what in (("rollout", "generated tokens/s while generating"), ("total", "tokens/s over the step")):
        rate = statistics.median(record[f"tokens_per_second/{phase}"] for record in records)
        print(f"{rate:,.0f} {what}")
    return 0


def _train(config: RunConfig) -> None:
    from megatron_mopd.train import train  # on the rank: the launcher must not load what may touch a GPU

    train(config)


def _for_bench(config: RunConfig, steps: int, folder: Path) -> RunConfig:
    """The same run in `folder`, without logs, evaluation and intermediate checkpoints."""
    from megatron_mopd.student.random_init import write_random_model

    source = Path(config.model.source)
    if not (source / "config.json").exists():
        source = Path("configs/tiny/model")

    def weights(checkpoint: str | None, seed: int) -> str | None:
        if checkpoint is None or checkpoint == "self" or Path(checkpoint).exists():
            return checkpoint
        write_random_model(folder / f"random-{seed}", source, seed)
        return str(folder / f"random-{seed}")

    student = weights(config.model.checkpoint, 0)
    teachers = {
        name: TeacherSpec(checkpoint=weights(teacher.checkpoint, seed) or "self")
        for seed, (name, teacher) in enumerate(config.teachers.items(), start=1)
    }
    total = WARMUP_STEPS + steps
    return dataclasses.replace(
        config,
        run_dir=str(folder / "run"),
        steps=total,
        model=dataclasses.replace(config.model, checkpoint=student),
        teachers=teachers,
        checkpoint=CheckpointSpec(every=total, keep_last=1),
        evaluation=EvalSpec(prompts=32),
        log=LogSpec(tensorboard=False),
    )


if __name__ == "__main__":
    sys.exit(main())

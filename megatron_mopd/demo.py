"""`mopd demo`: the whole of MOPD, small. sft -> one RL teacher per domain -> mopd -> held-out accuracy of all models.

Each stage is an ordinary run of an ordinary file in the configuration folder; only the run folders are moved below
the demo's own. A stage that is complete is not run again, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_mopd import preflight
from megatron_mopd.compute import read_compute
from megatron_mopd.config import RunConfig, load_config
from megatron_mopd.environment import world_size
from megatron_mopd.hub import resolve_folder
from megatron_mopd.launch import launch
from megatron_mopd.report import Comparison, accuracy_table, write_summary
from megatron_mopd.report_page.write import write_report
from megatron_mopd.student.checkpoint_files import find_latest, read_manifest
from megatron_mopd.student.hf_files import content_hash
from megatron_mopd.yaml_config import ConfigError, dump_yaml

BASE, STUDENT = "sft", "mopd"
"""Files of the configuration folder; `mopd demo --student` takes another student from the same base and teachers."""


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    config: RunConfig

    @property
    def checkpoint(self) -> str:
        return f"{self.config.run_dir}/checkpoints/latest"

    def fingerprint(self) -> str:
        """Of the configuration and of the weights it starts from and learns from."""
        inputs = [self.config.model.checkpoint, *(teacher.checkpoint for teacher in self.config.teachers.values())]
        hashes = [content_hash(resolve_folder(path, self.name)) for path in inputs if path]
        return hashlib.sha256("\n".join([dump_yaml(self.config), *hashes]).encode()).hexdigest()

    def is_complete(self) -> bool:
        latest = find_latest(Path(self.config.run_dir))
        return latest is not None and read_manifest(latest).step >= self.config.steps


def run_demo(config_dir: Path, run_dir: Path, overrides: Sequence[str], student: str = STUDENT) -> int:
    """Run what is missing of the demo and print its table. Returns the exit code; raises ConfigError."""
    console = Console()
    stages = _stages(config_dir, run_dir, overrides, student)
    state = _State(run_dir / "demo.json")
    for number, stage in enumerate(stages, start=1):
        heading = f"[{number}/{len(stages) + 1}] {stage.name}"
        state.check(stage, run_dir)
        if stage.is_complete():
            console.print(f"{heading}: already complete", markup=False, highlight=False)
            continue
        console.print(heading, markup=False, highlight=False)
        with state.timed(stage.name):
            preflight.check(stage.config, world_size(stage.config.parallel))
            outcome = launch(stage.config, _train)
        if outcome.exit_code:
            return outcome.exit_code
    console.print(f"[{len(stages) + 1}/{len(stages) + 1}] eval", markup=False, highlight=False)
    state.seconds.pop("eval", None)
    with state.timed("eval"):
        outcome = launch(stages[-1].config, _evaluate, {stage.name: stage.checkpoint for stage in stages})
    if outcome.exit_code:
        return outcome.exit_code
    _report(console, run_dir, stages, outcome.result, state.seconds)
    return 0


def _stages(config_dir: Path, run_dir: Path, overrides: Sequence[str], student: str) -> list[Stage]:
    """sft, the teachers in the order of the student's file, mopd; each reads the checkpoints of those before it."""
    mopd = load_config(config_dir / f"{student}.yaml", overrides)
    base = f"{run_dir}/{BASE}/checkpoints/latest"

    def stage(name: str, *moved: str) -> Stage:
        path = config_dir / f"{name}.yaml"
        return Stage(name, load_config(path, [*overrides, f"run_dir={run_dir}/{name}", *moved]))

    from_base = f"model.checkpoint={base}"
    teachers = {name: f"rl_{name}" for name in mopd.teachers}
    routes = [f"teachers.{name}.checkpoint={run_dir}/{run}/checkpoints/latest" for name, run in teachers.items()]
    return [
        stage(BASE),
        *(stage(run, from_base) for run in teachers.values()),
        stage(student, from_base, *routes),
    ]


# Imported on the ranks: on a machine with GPUs the launcher must not load what may touch them.


def _train(config: RunConfig) -> None:
    from megatron_mopd.train import train

    train(config)


def _evaluate(config: RunConfig, checkpoints: dict[str, str]) -> dict[str, dict[str, float]]:
    from megatron_mopd.evaluation import evaluate_checkpoints

    return {name: result.accuracy for name, result in evaluate_checkpoints(config, checkpoints).items()}


class _State:
    """What an interrupted demo remembers: what each stage was made of, and the seconds spent on it so far."""

    def __init__(self, path: Path):
        self._path = path
        saved = json.loads(path.read_text()) if path.exists() else {"seconds": {}, "fingerprints": {}}
        self.seconds: dict[str, float] = saved["seconds"]
        self._fingerprints: dict[str, str] = saved["fingerprints"]

    def check(self, stage: Stage, run_dir: Path) -> None:
        """Raise ConfigError when the stage was made, or begun, with other settings or from other weights."""
        known = self._fingerprints.setdefault(stage.name, stage.fingerprint())
        if known != stage.fingerprint():
            raise ConfigError(
                f"{run_dir}: its stage {stage.name} was run with another configuration or from other weights; "
                "name another --run-dir, or delete this one"
            )
        self._write()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to those of `name`, also when it is interrupted."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"seconds": self.seconds, "fingerprints": self._fingerprints}))


def _report(
    console: Console,
    run_dir: Path,
    stages: Sequence[Stage],
    accuracy: dict[str, dict[str, float]],
    seconds: dict[str, float],
) -> None:
    mopd, student = stages[-1].config, stages[-1].name
    # Another student's figures lie in its own folder: those of the demo proper stay.
    folder = run_dir if student == STUDENT else run_dir / student
    routed = {name: domain.teacher or "" for name, domain in mopd.domains.items()}
    comparison = Comparison(
        before=accuracy[BASE],
        teachers={name: accuracy[f"rl_{name}"] for name in mopd.teachers},
        after=accuracy[student],
        routed=routed,
    )
    stage_of = {"base": BASE, STUDENT: student} | {name: f"rl_{name}" for name in mopd.teachers}
    write_summary(
        folder / "summary.json",
        comparison,
        seed=mopd.seed,
        compute={name: read_compute(run_dir / stage) for name, stage in stage_of.items()},
        runs={STUDENT: str((run_dir / student).relative_to(folder))},
        seconds=seconds,
    )
    page = write_report([folder], folder / "report")
    console.print(accuracy_table(comparison))
    console.print(f"mean normalised score {comparison.normalised_mean:.3f}", highlight=False)
    console.print(f"run folder {run_dir}: summary.json and one folder per stage", highlight=False)
    console.print(f"report {page}", highlight=False)

"""The jobs of a whole study and what each waits for: `python -m megatron_mopd.cluster.pipeline FOLDER [key=value ...]`.

FOLDER holds one file per stage: sft.yaml, teacher_NAME.yaml or rl_NAME.yaml for every teacher of mopd.yaml, mopd.yaml,
and with --baselines those that are there of mix_rl.yaml, cascade_rl.yaml, off_policy.yaml, param_merge.yaml. Prints one
line per job, tab-separated: name, kind, names it waits for (commas; - for none), job name, `servers` if nodes for
rollout servers are of use to it (else -), then the arguments of launch/mopd.sh.

All files are loaded, checked as far as they can be without checkpoints, and compared: a stage must start from what the
stage before it writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mopd.config import RunConfig, load_config
from megatron_mopd.hub import resolve_folder
from megatron_mopd.merge.config import load_merge_config
from megatron_mopd.rank_process import EXIT_CONFIG
from megatron_mopd.yaml_config import ConfigError

FROM_BASE = ("mix_rl", "cascade_rl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    name: str
    kind: str
    """sft, teacher, mopd, baseline, sample, merge or eval: whose sbatch options are meant."""
    after: tuple[str, ...]
    folder: str
    """The run's."""
    arguments: tuple[str, ...]
    """Of launch/mopd.sh."""
    servers: bool = False
    """Whether nodes for rollout servers are of use to it."""

    def line(self) -> str:
        job_name = Path(self.folder).name + ("" if self.arguments[0] == "run" else f"-{self.arguments[0]}")
        servers = "servers" if self.servers else "-"
        return "\t".join([self.name, self.kind, ",".join(self.after) or "-", job_name, servers, *self.arguments])


def jobs(folder: Path, overrides: Sequence[str], *, baselines: bool) -> list[Job]:
    """In an order in which every job stands after those it waits for. Raises ConfigError."""
    sft = _load(folder / "sft.yaml", overrides)
    mopd = _load(folder / "mopd.yaml", overrides)
    _check_start("mopd.yaml: model.checkpoint", mopd.model.checkpoint, "sft.yaml", sft)
    result = [_run("sft", "sft", (), folder / "sft.yaml", sft, overrides)]
    for name, teacher in mopd.teachers.items():
        if teacher.checkpoint == "self":
            continue
        file = _teacher_file(folder, name)
        config = _load(file, overrides)
        _check_start(f"{file.name}: model.checkpoint", config.model.checkpoint, "sft.yaml", sft)
        _check_start(f"mopd.yaml: teachers.{name}.checkpoint", teacher.checkpoint, file.name, config)
        result.append(_run(f"teacher_{name}", "teacher", ("sft",), file, config, overrides))
    teachers = tuple(job.name for job in result if job.kind == "teacher")
    result += _with_eval(_run("mopd", "mopd", teachers or ("sft",), folder / "mopd.yaml", mopd, overrides), overrides)
    if baselines:
        result += _baselines(folder, overrides, sft, teachers)
    return result


def _baselines(folder: Path, overrides: Sequence[str], sft: RunConfig, teachers: tuple[str, ...]) -> list[Job]:
    result = []
    for name in FROM_BASE:
        file = folder / f"{name}.yaml"
        if file.exists():
            config = _load(file, overrides)
            _check_start(f"{file.name}: model.checkpoint", config.model.checkpoint, "sft.yaml", sft)
            result += _with_eval(_run(name, "baseline", ("sft",), file, config, overrides), overrides)
    file = folder / "off_policy.yaml"
    if file.exists():
        config = _load(file, overrides)
        answers = config.rollout.dataset
        if answers is None:
            raise ConfigError(f"{file}: rollout.dataset: missing; name the file for the teachers' answers")
        after = teachers
        if not Path(answers).exists():
            keep = ("--keep", "correct")
            arguments = ("sample", str(folder / "mopd.yaml"), "--out", answers, *keep, *overrides)
            result.append(Job(name="sample", kind="sample", after=teachers, folder=config.run_dir, arguments=arguments))
            after = ("sample",)
        result += _with_eval(_run("off_policy", "baseline", after, file, config, overrides), overrides)
    file = folder / "param_merge.yaml"
    if file.exists():
        out = load_merge_config(file, ()).out
        if not Path(out).exists():
            result.append(Job(name="merge", kind="merge", after=teachers, folder=out, arguments=("merge", str(file))))
    return result


def _with_eval(job: Job, overrides: Sequence[str]) -> list[Job]:
    arguments = ("eval", job.arguments[1], "--checkpoint", f"{job.folder}/checkpoints/latest", *overrides)
    return [job, Job(name=f"eval_{job.name}", kind="eval", after=(job.name,), folder=job.folder, arguments=arguments)]


def _run(name: str, kind: str, after: tuple[str, ...], file: Path, config: RunConfig, overrides: Sequence[str]) -> Job:
    servers = config.rollout.sglang is not None and config.rollout.sglang.launch is not None
    arguments = ("run", str(file), *overrides)
    return Job(name=name, kind=kind, after=after, folder=config.run_dir, arguments=arguments, servers=servers)


def _load(file: Path, overrides: Sequence[str]) -> RunConfig:
    if any(item.startswith("run_dir=") for item in overrides):
        raise ConfigError("run_dir: every stage has its own; set it in the files, not for all of them at once")
    return load_config(file, overrides)


def _teacher_file(folder: Path, name: str) -> Path:
    for file in (folder / f"teacher_{name}.yaml", folder / f"rl_{name}.yaml"):
        if file.exists():
            return file
    raise ConfigError(f"{folder}: no teacher_{name}.yaml or rl_{name}.yaml for mopd.yaml's teacher '{name}'; add it")


def _check_start(key: str, checkpoint: str | None, other: str, before: RunConfig) -> None:
    """Raise ConfigError unless `checkpoint` lies in the run folder of the stage before."""
    if checkpoint is None or not Path(checkpoint).absolute().is_relative_to(Path(before.run_dir).absolute()):
        raise ConfigError(
            f"{key}: {checkpoint} is not in {before.run_dir}, where {other} writes; "
            f"set it to {before.run_dir}/checkpoints/latest"
        )


def check_files(study: Sequence[Job], folder: Path, overrides: Sequence[str]) -> None:
    """Raise ConfigError for what can be found wrong before any checkpoint exists: data, verifiers, lengths, layouts."""
    from megatron_mopd import preflight  # imports torch

    model = resolve_folder(_load(folder / "sft.yaml", overrides).model.source, "sft.yaml: model")
    for job in study:
        if job.arguments[0] == "run":
            file = Path(job.arguments[1])
            config = _load(file, overrides)
            try:
                preflight.check_beforehand(config, model, config.parallel.ranks or config.parallel.default_ranks)
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the jobs; 2 after a ConfigError."""
    parser = argparse.ArgumentParser(prog="pipeline", allow_abbrev=False)
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.folder.is_dir():
            raise ConfigError(f"{arguments.folder}: no such folder; name the one with sft.yaml and mopd.yaml")
        study = jobs(arguments.folder, arguments.overrides, baselines=arguments.baselines)
        check_files(study, arguments.folder, arguments.overrides)
    except ConfigError as error:
        print(f"mopd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CONFIG
    for job in study:
        print(job.line())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where a run's numbers go: a JSONL file, TensorBoard, and W&B if asked for; and the clock of its phases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from megatron_mopd.config import LogSpec
from megatron_mopd.yaml_config import ConfigError

Kind = Literal["train", "eval"]


def check_log(log: LogSpec) -> None:
    """Raise ConfigError when W&B is asked for and not installed. Imports nothing heavy."""
    if log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "log.wandb: the package wandb is not installed; pip install 'megatron-mopd[wandb]' or set log.wandb=null"
        )


class _Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float], kind: Kind) -> None: ...
    def close(self) -> None: ...


class MetricLog:
    """`metrics.jsonl` in the run folder, one object a step, and the same numbers in TensorBoard and W&B.

    A line is {"step": k, "kind": "train" | "eval", "time": Unix seconds, <metric>: number or null}; null is a
    number that is not finite. A train line's step counts from 0, an eval line's is the number of steps done
    before it. Only rank 0 writes.

    A resumed run repeats the steps after its checkpoint: their old lines are removed first, so that each step
    is in the file once.
    """

    def __init__(self, run_dir: Path, log: LogSpec, *, rank: int, resume_step: int = 0) -> None:
        """
        Args:
            resume_step: steps done in the checkpoint that the run goes on from; 0 starts the file anew.
        Raises:
            ConfigError: W&B is asked for and not installed (on every rank).
        """
        check_log(log)
        self._folder = run_dir
        self._sinks: list[_Sink] = []
        if rank != 0:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_repeated(path, resume_step)
        self._sinks.append(_Jsonl(path))
        if log.tensorboard:
            tensorboard = _TensorBoard(run_dir / "tensorboard", resume_step)
            self._sinks.append(tensorboard)
            # TensorBoard hides all events from the resumed step on, also the evaluation before the save.
            for record in read_records(path, "eval"):
                if resume_step and record["step"] == resume_step:
                    tensorboard.write(resume_step, _numbers(record), "eval")
        if log.wandb is not None:
            self._sinks.append(_WandB(run_dir, log.wandb))

    def step(self, step: int, values: Mapping[str, float], kind: Kind = "train") -> None:
        """Record `values` of one step, or of one evaluation. Nothing happens on ranks other than 0."""
        try:
            for sink in self._sinks:
                sink.write(step, values, kind)
        except OSError as error:
            raise ConfigError(
                f"{self._folder}: metrics cannot be written: {error.strerror}; free some space and resume"
            ) from None

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path, kind: Kind = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a `metrics.jsonl` but for a half-written last one; [] without a file."""
    return [record for _, record in _records(path) if record["kind"] == kind]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # a killed run may leave half a line, always the last one
            yield line, json.loads(line)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key not in ("step", "kind", "time") and value is not None}


def _drop_repeated(path: Path, resume_step: int) -> None:
    """Remove what the resumed run writes again: train lines from that step on, and evaluations after it."""
    if not path.exists():
        return
    last = {"train": resume_step - 1, "eval": resume_step if resume_step else -1}
    kept = [line for line, record in _records(path) if record["step"] <= last[record["kind"]]]
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, path)


class _Jsonl:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1, encoding="utf-8")  # a line at a time: `tail -f` and kill -9

    def write(self, step: int, values: Mapping[str, float], kind: Kind) -> None:
        record: dict[str, Any] = {"step": step, "kind": kind, "time": round(time.time(), 3)}
        record |= {key: float(value) if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 0.1 s on top of torch

        self._writer = SummaryWriter(str(folder), purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, float], kind: Kind) -> None:
        prefix = "eval/" if kind == "eval" else ""
        for key, value in values.items():
            self._writer.add_scalar(prefix + key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path, project: str) -> None:
        import wandb

        remembered = run_dir / "wandb_id"
        if not remembered.exists():
            remembered.write_text(secrets.token_hex(4), encoding="utf-8")
        identity = remembered.read_text(encoding="utf-8")
        self._run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), id=identity, resume="allow")

    def write(self, step: int, values: Mapping[str, float], kind: Kind) -> None:
        prefix = "eval/" if kind == "eval" else ""
        self._run.log({prefix + key: value for key, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class PhaseTimer:
    """Seconds of each phase of a step.

        with timer("rollout"): ...
        timer.take(tokens={"rollout": 1200})  # {"seconds/rollout": .., "tokens_per_second/rollout": .., ...}

    Phases may be entered several times a step. `total` runs from the step's first phase to `take`, so that
    saving and evaluating between two steps do not count.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        """`synchronize` waits for the device: without it, GPU work counts in the phase that waits for it."""
        self._synchronize = synchronize or (lambda: None)
        self._seconds: dict[str, float] = defaultdict(float)
        self._first: float | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        self._first = started if self._first is None else self._first
        try:
            yield
            self._synchronize()
        finally:
            self._seconds[phase] += time.perf_counter() - started

    def take(self, tokens: Mapping[str, int] | None = None) -> dict[str, float]:
        """`seconds/<phase>`, and `tokens_per_second/<phase>` for the phases in `tokens`; then start over."""
        seconds = dict(self._seconds)
        if self._first is not None:
            seconds["total"] = time.perf_counter() - self._first
        self._seconds.clear()
        self._first = None
        report = {f"seconds/{phase}": value for phase, value in seconds.items()}
        for phase, count in (tokens or {}).items():
            if seconds.get(phase, 0.0) > 0:
                report[f"tokens_per_second/{phase}"] = count / seconds[phase]
        return report

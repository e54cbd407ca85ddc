"""What is written of a run's numbers, where, and how often; and what the progress line says."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mopd import progress as progress_module
from megatron_mopd.config import LogSpec
from megatron_mopd.metrics import MetricLog, PhaseTimer, check_log, read_records
from megatron_mopd.progress import Progress
from megatron_mopd.yaml_config import ConfigError

QUIET = LogSpec(tensorboard=False)


def _write(folder: Path, steps: range, log: LogSpec = QUIET, resume_step: int = 0, offset: float = 0.0) -> None:
    with MetricLog(folder, log, rank=0, resume_step=resume_step) as metrics:
        for step in steps:
            metrics.step(step, {"loss": step + offset})
            if step % 2:
                metrics.step(step + 1, {"accuracy/math": step + offset}, kind="eval")


def test_one_line_a_step_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = MetricLog(tmp_path, QUIET, rank=0)
    metrics.step(0, {"loss": 1.5, "grad_norm": math.inf})
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {key: record[key] for key in ("step", "kind", "loss", "grad_norm")} == {
        "step": 0,
        "kind": "train",
        "loss": 1.5,
        "grad_norm": None,
    }
    assert abs(record["time"] - time.time()) < 60
    metrics.close()


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    _write(tmp_path, range(5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "ki')  # killed while writing
    _write(tmp_path, range(2, 6), resume_step=2, offset=100.0)
    path = tmp_path / "metrics.jsonl"
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [
        *[(step, float(step)) for step in (0, 1)],
        *[(step, step + 100.0) for step in (2, 3, 4, 5)],
    ]
    # The evaluation after two steps was made before the checkpoint and is not made again.
    assert [(r["step"], r["accuracy/math"]) for r in read_records(path, "eval")] == [
        (2, 1.0),
        (4, 103.0),
        (6, 105.0),
    ]


def test_a_run_from_the_start_begins_a_new_file(tmp_path: Path) -> None:
    _write(tmp_path, range(4))
    _write(tmp_path, range(1), offset=7.0)
    assert [r["loss"] for r in read_records(tmp_path / "metrics.jsonl")] == [7.0]
    assert read_records(tmp_path / "metrics.jsonl", "eval") == []


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "run", LogSpec(), rank=1) as metrics:
        metrics.step(0, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_same_numbers_also_after_a_resume(tmp_path: Path) -> None:
    _write(tmp_path, range(4), LogSpec())
    _write(tmp_path, range(2, 5), LogSpec(), resume_step=2, offset=100.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(0, 0.0), (1, 1.0), (2, 102.0), (3, 103.0), (4, 104.0)]
    accuracy = [(event.step, event.value) for event in events.Scalars("eval/accuracy/math")]
    assert accuracy == [(2, 1.0), (4, 103.0)]


def test_wandb_that_is_not_installed_is_named_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^log.wandb: .*pip install 'megatron-mopd\[wandb\]'"):
        check_log(LogSpec(wandb="project"))
    with pytest.raises(ConfigError, match=r"^log.wandb"):
        MetricLog(tmp_path, LogSpec(wandb="project"), rank=3)
    check_log(LogSpec())


def test_importing_metrics_and_progress_is_quick() -> None:
    heavy = "{'torch', 'tensorboard', 'wandb', 'matplotlib'} & set(sys.modules)"
    modules = "megatron_mopd.metrics, megatron_mopd.progress, megatron_mopd.report"
    code = f"import sys, {modules}; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_phases_add_up_and_start_over() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.02)
    with timer("update"):
        time.sleep(0.01)
    report = timer.take(tokens={"rollout": 1000, "total": 4000, "teacher": 7})
    assert set(report) == {
        "seconds/rollout",
        "seconds/update",
        "seconds/total",
        "tokens_per_second/rollout",
        "tokens_per_second/total",
    }
    assert 0.04 <= report["seconds/rollout"] < 1
    assert report["seconds/total"] >= report["seconds/rollout"] + report["seconds/update"]
    assert report["tokens_per_second/rollout"] == 1000 / report["seconds/rollout"]
    assert report["tokens_per_second/total"] == 4000 / report["seconds/total"]
    assert timer.take() == {}


def test_a_phase_waits_for_the_device_and_survives_an_error() -> None:
    waited: list[int] = []
    timer = PhaseTimer(lambda: waited.append(1))
    with timer("update"):
        assert waited == []
    assert waited == [1]
    with pytest.raises(ValueError), timer("update"):
        raise ValueError
    assert timer.take()["seconds/update"] > 0


def _console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=160), out


def test_plain_progress_is_one_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    console, out = _console(terminal=False)
    with Progress("mopd try", total=8, rank=0, start=2, console=console) as progress:
        for done in range(3, 9):
            clock[0] += 2.0
            progress.update(done, {"loss": 0.5, "reverse_kl/a": 0.1, "reverse_kl/b": 0.02, "reward/a": 1.0})
        progress.note("saved")
    assert out.getvalue().splitlines() == [
        "mopd try  3/8  loss 0.5000  kl a 0.100 b 0.020  2.00 s/step  ETA 0:10",
        "mopd try  6/8  loss 0.5000  kl a 0.100 b 0.020  2.00 s/step  ETA 0:04",
        "mopd try  8/8  loss 0.5000  kl a 0.100 b 0.020  2.00 s/step  ETA 0:00",
        "saved",
    ]


def test_progress_shows_rewards_where_there_is_no_kl() -> None:
    console, out = _console(terminal=False)
    with Progress("rl", total=1, rank=0, console=console) as progress:
        progress.update(1, {"reverse_kl/a": 0.0, "reward/a": 0.25, "reward": 0.25})
    assert "reward a 0.250" in out.getvalue()
    assert "kl" not in out.getvalue()


def test_a_terminal_gets_a_live_line() -> None:
    console, out = _console(terminal=True)
    with Progress("sft", total=2, rank=0, console=console) as progress:
        progress.update(1, {"loss": 0.25})
        progress.update(2, {"loss": 0.125})
    assert "2/2  loss 0.1250" in out.getvalue()
    assert out.getvalue().count("\n") <= 2, "the line is drawn over, not repeated"


def test_other_ranks_show_nothing() -> None:
    console, out = _console(terminal=False)
    with Progress("sft", total=1, rank=1, console=console) as progress:
        progress.update(1, {"loss": 0.25})
        progress.note("x")
    assert out.getvalue() == ""

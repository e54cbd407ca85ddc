"""kill -9 of any rank at any moment, then the same command: the run ends in the very same weights."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mopd.metrics import read_records
from tests.e2e.conftest import run_tree, write_run

TIMEOUT_SECONDS = 240
KILLS = 5
STEPS = 20


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_mopd", "run", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output.decode()


def steps_logged(run_dir: Path) -> int:
    return len(read_records(run_dir / "metrics.jsonl")) if (run_dir / "metrics.jsonl").exists() else 0


def rank_pids(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def kill_a_rank(process: subprocess.Popen[bytes], run_dir: Path, rng: random.Random) -> int:
    """SIGKILL one rank, some milliseconds after the run has logged another one to three steps. Returns its pid.

    Once the log is nearly full, as soon as there are ranks: they are still starting then.
    """
    target = min(steps_logged(run_dir) + rng.randint(1, 3), STEPS - 2)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while steps_logged(run_dir) < target or not rank_pids(process.pid):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(rng.random() * 0.1)
    pid = rng.choice(rank_pids(process.pid))
    os.kill(pid, signal.SIGKILL)
    return pid


def final_bytes(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "latest" / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_five_times_and_the_same_to_the_last_bit(models: Path, tmp_path: Path) -> None:
    # gap_aware: what the domains' weights follow from is part of what a resume must bring back.
    changes = {"steps": STEPS, "objective": {"kind": "full_vocab", "domain_weights": {"kind": "gap_aware"}}}
    smooth = run_tree(models, tmp_path / "smooth") | changes
    code, output = finish(start(write_run(tmp_path / "smooth.yaml", smooth)))
    assert code == 0, output

    rng = random.Random(20260629)
    # A step takes some tens of milliseconds here: enough of them that five kills fall into the run.
    config = write_run(tmp_path / "rough.yaml", run_tree(models, tmp_path / "rough") | changes)
    kills = 0
    for _ in range(KILLS + 5):
        process = start(config)
        try:
            if kills < KILLS:
                pid = kill_a_rank(process, tmp_path / "rough", rng)
                kills += 1
                code, output = finish(process)
                assert code != 0
                assert "killed" in output.lower(), (pid, output)
                # The file may be complete by now (the last step's checkpoint); then the next start does nothing.
                continue
            code, output = finish(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert code == 0, output
        break
    assert kills == KILLS
    assert final_bytes(tmp_path / "rough") == final_bytes(tmp_path / "smooth")
    columns = ("step", "loss", "grad_norm", "lr", "reverse_kl/a", "reverse_kl/b", "reverse_kl/c", "reward/b")
    columns += ("domain_factor/a", "domain_factor/b")
    rough, calm = (
        [[record[c] for c in columns] for record in read_records(tmp_path / name / "metrics.jsonl")]
        for name in ("rough", "smooth")
    )
    assert rough == calm


def test_sigterm_saves_and_the_run_goes_on(models: Path, tmp_path: Path) -> None:
    tree = run_tree(models, tmp_path / "run") | {"steps": 400, "checkpoint": {"every": 400, "keep_last": 1}}
    config = write_run(tmp_path / "run.yaml", tree)
    process = start(config)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while steps_logged(tmp_path / "run") < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        code, output = finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert code == 128 + signal.SIGTERM, output
    done = int((tmp_path / "run" / "checkpoints" / "latest").resolve().name.removeprefix("step_"))
    assert 2 <= done < 400
    tree["steps"] = done + 2
    code, output = finish(start(write_run(config, tree)))
    assert code == 0, output
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == list(range(done + 2))

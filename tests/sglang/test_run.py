"""Whole runs with servers of their own: killed in every way, and nothing is lost or left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_mopd.metrics import read_records
from tests.e2e.conftest import write_run
from tests.sglang.trainer_side import run_file

SECONDS = 1200
STEPS = 60


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_mopd", "run", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def until(process: subprocess.Popen[bytes], done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def servers(launcher: int) -> list[int]:
    """Process ids of the servers that the run's first rank has started."""
    ranks = children(launcher)
    return [pid for rank in ranks for pid in children(rank) if "serve.py" in command_line(pid)]


def sessions(leaders: list[int]) -> set[int]:
    """All processes that live, zombies apart, in the sessions of these."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) in leaders and state != "Z":
                found.add(int(folder.name))
    return found


def logged(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    return [record["step"] for record in read_records(path)] if path.exists() else []


def saved(run_dir: Path) -> int:
    return int(json.loads((run_dir / "checkpoints" / "latest" / "manifest.json").read_text())["step"])


def test_both_servers_killed_then_the_trainer_then_it_finishes(models: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tree = run_file(models, run_dir, launch={"servers": 2}) | {
        "steps": STEPS,
        "checkpoint": {"every": 1000, "keep_last": 2},
        "evaluation": {"prompts": 16, "every": 0},
    }
    tree["domains"]["a"]["max_response_tokens"] = 16
    config = write_run(tmp_path / "run.yaml", tree)

    process = start(config)
    until(process, lambda: len(logged(run_dir)) >= 3)
    pids = servers(process.pid)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=SECONDS)[0].decode()
    assert process.returncode == 2, output
    assert "mopd: error: rollout.sglang: no server is left: http://127.0.0.1:" in output
    assert f"{saved(run_dir)} steps are saved; the same command goes on from there" in output
    assert saved(run_dir) == len(logged(run_dir))
    assert sessions(pids) == set()

    done = len(logged(run_dir))
    process = start(config)
    until(process, lambda: len(logged(run_dir)) >= done + 2)
    pids = servers(process.pid)
    workers = sessions(pids)
    assert len(workers) >= 6
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while (left := sessions(pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == set(), [command_line(pid) for pid in left]

    tree["rollout"]["sglang"]["launch"]["servers"] = 1  # which servers there are may change
    tree["steps"] = done + 4
    process = start(write_run(tmp_path / "run.yaml", tree))
    output = process.communicate(timeout=SECONDS)[0].decode()
    assert process.returncode == 0, output
    assert logged(run_dir) == list(range(done + 4))
    assert saved(run_dir) == done + 4
    assert all(record["rollouts"] == 24 for record in read_records(run_dir / "metrics.jsonl"))

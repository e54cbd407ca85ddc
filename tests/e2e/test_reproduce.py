"""`mopd reproduce` as a user calls it: killed and called again, changed under its feet, asked for parts."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.comparison import write_comparison

TIMEOUT_SECONDS = 240
NODES = 13


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_mopd", "reproduce", str(config), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def reproduce(config: Path, *arguments: str) -> tuple[int, str]:
    return finish(start(config, *arguments))


def done(config: Path) -> int:
    return len(list(config.parent.glob("run/seed0/*/node.json")))


def wait_until_done(config: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while done(config) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # a thread, or the process, that ends meanwhile
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(FileNotFoundError, ProcessLookupError):
                for child in map(int, children.read_text().split()):
                    found += [child, *descendants(child)]
    return found


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie that waits for its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def figures(config: Path) -> dict[str, Any]:
    """summary.json without what differs from one run to the next: seconds and folders."""
    summary: dict[str, Any] = json.loads((config.parent / "run" / "summary.json").read_text())
    for entry in (summary["base"], *summary["teachers"].values(), *summary["methods"].values()):
        del entry["compute"]["seconds"]
        entry.pop("runs", None)
    return summary


@pytest.fixture(scope="module")
def smooth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison that was never interrupted, one seed of it, and what was printed."""
    config = write_comparison(tmp_path_factory.mktemp("smooth") / "project")
    code, output = reproduce(config, "--seeds", "1")
    assert code == 0, output
    return config, output


def test_the_table_and_the_summary(smooth: tuple[Path, str]) -> None:
    config, output = smooth
    assert "budget, checked: 32 rollouts each: off, mopd; none: arithmetic" in output
    assert f"made {NODES} of {NODES} nodes" in output
    summary = figures(config)
    assert (summary["version"], summary["domains"], summary["seeds"]) == (1, ["a", "b"], [0])
    base, teacher = summary["base"]["domains"], summary["teachers"]["b"]["domains"]
    assert summary["teachers"]["b"]["domain"] == "b"
    for name, method in summary["methods"].items():
        scores = []
        for domain in "ab":
            accuracy = method["domains"][domain]["accuracy"]["mean"]
            low = base[domain]["accuracy"]["mean"]
            high = summary["teachers"][domain]["domains"][domain]["accuracy"]["mean"]
            assert high > low  # the comparison is of models that differ
            scores.append((accuracy - low) / (high - low))
            assert method["domains"][domain]["score"]["mean"] == pytest.approx(scores[-1])
        assert method["score"] == {
            "mean": pytest.approx(sum(scores) / 2),
            "interval": None,
            "per_seed": {"0": pytest.approx(sum(scores) / 2)},
        }
        assert method["rollouts"] == (0 if name == "arithmetic" else 32)
    assert summary["methods"]["arithmetic"]["compute"]["generated_tokens"] == 0
    # `off` pays for the answers of its dataset, MOPD for its own: 32 answers of 1 to 6 tokens.
    for name in ("off", "mopd"):
        assert 32 <= summary["methods"][name]["compute"]["generated_tokens"] <= 32 * 6
    assert summary["methods"]["off"]["compute"]["teacher_tokens"] == 0
    assert 0 <= teacher["a"]["accuracy"]["mean"] <= 1


def test_killed_three_times_and_the_same_to_the_last_digit(smooth: tuple[Path, str], tmp_path: Path) -> None:
    config = write_comparison(tmp_path / "project")
    rng = random.Random(20260629)
    # Ctrl-C first, then kills of the launcher alone, as the kernel's when memory runs out: some moment after so many
    # nodes of 13, and long before the last, as a run that is over cannot be killed.
    for nodes, stop in ((1, signal.SIGINT), (2, signal.SIGKILL), (4, signal.SIGKILL), (6, signal.SIGKILL)):
        process = start(config, "--seeds", "1")
        try:
            wait_until_done(config, nodes, process)
            time.sleep(rng.random() * 0.5)
            below = descendants(process.pid)
            os.kill(process.pid, stop)
            code, output = finish(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if stop == signal.SIGINT:
            assert "the same command goes on from here" in output
        assert code == (130 if stop == signal.SIGINT else -stop), output
        deadline = time.monotonic() + 10
        while any(map(is_running, below)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert done(config) < NODES
    code, output = reproduce(config, "--seeds", "1")
    assert code == 0, output
    assert figures(config) == figures(smooth[0])
    tables = [text[text.index("Two teachers:") : text.index("Used by")] for text in (output, smooth[1])]
    assert tables[0] == tables[1]


def test_killed_between_an_output_and_its_record(smooth: tuple[Path, str]) -> None:
    config, _ = smooth
    names = ("off.sample", "arithmetic", "arithmetic.eval", "off")  # a sample, a merge, an evaluation, a run
    records = [next(config.parent.glob(f"run/seed0/{name}-????????/node.json")) for name in names]
    before = figures(config)
    for record in records:
        record.unlink()
    code, output = reproduce(config, "--seeds", "1")
    assert code == 0, output
    assert f"made {len(names)} of {NODES} nodes" in output
    assert all(record.exists() for record in records)
    assert figures(config) == before


def test_a_second_call_does_nothing_and_says_so(smooth: tuple[Path, str]) -> None:
    config, output = smooth
    before = {path: path.stat().st_mtime_ns for path in config.parent.glob("run/seed*/**/*")}
    program = (
        "import sys; from megatron_mopd.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or int('torch' in sys.modules) * 99)"
    )
    command = [sys.executable, "-c", program, "reproduce", str(config), "--seeds", "1"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    assert again.returncode == 0, again.stderr
    assert f"nothing to do: all {NODES} nodes are cached" in again.stdout
    # Not the seconds, which come after it: another test has made some nodes again.
    tables = [text[text.index("Two teachers:") : text.index("Used by")] for text in (again.stdout, output)]
    assert tables[0] == tables[1]
    assert before == {path: path.stat().st_mtime_ns for path in config.parent.glob("run/seed*/**/*")}


def test_an_edited_dataset_is_found_and_the_reason_shown(smooth: tuple[Path, str], tmp_path: Path) -> None:
    config, _ = smooth
    shutil.copy(config.parent / "b.jsonl", tmp_path / "b.jsonl")
    with (config.parent / "b.jsonl").open("a") as file:
        file.write('{"prompt": "b again", "answer": "xy"}\n')
    code, output = reproduce(config, "--seeds", "1", "--dry-run")
    shutil.copy(tmp_path / "b.jsonl", config.parent / "b.jsonl")
    assert code == 0, output
    assert f"seed0/base: is made again: the content of {config.parent / 'b.jsonl'} has changed" in output
    assert f"{NODES} of {NODES} nodes to make" in output
    # The old results are still there for the old data.
    code, output = reproduce(config, "--seeds", "1")
    assert code == 0
    assert "nothing to do" in output


def test_one_method_alone_and_trials(smooth: tuple[Path, str]) -> None:
    config, _ = smooth
    code, output = reproduce(config, "--tune")
    assert code == 0, output
    tuning = json.loads((config.parent / "run" / "tuning.json").read_text())
    trials = tuning["methods"]["mopd"]["trials"]
    assert [trial["overrides"] for trial in trials] == [["optim.lr=0.001"], ["optim.lr=0.002"]]
    assert (tuning["seed"], tuning["split"]) == (9, "validation")
    assert trials[tuning["methods"]["mopd"]["best"]]["score"] == max(trial["score"] for trial in trials)
    evaluated = next(config.parent.glob("run/seed9/mopd_trial1.eval-*/result.json"))
    assert json.loads(evaluated.read_text())["domains"]["a"]["prompts"] == 8
    assert not list(config.parent.glob("run/seed9/off*")) + list(config.parent.glob("run/seed9/arithmetic*"))
    stale = config.parent / "run" / "seed0" / "mopd-00000000"
    stale.mkdir()
    code, output = reproduce(config, "--prune", "--seeds", "1")
    assert code == 0, output
    assert f"pruned 1 folders\n  {stale}" in output
    assert "nothing to do" in output


def test_a_failure_stops_the_rest_and_names_the_log(smooth: tuple[Path, str]) -> None:
    config, _ = smooth
    # So small a step changes no weight, and merging a teacher that is the base is refused.
    code, output = reproduce(config, "--only", "arithmetic", "--seeds", "1", 'teachers.a.overrides=["optim.lr=1e-30"]')
    assert code == 2, output
    line = next(line for line in output.splitlines() if "seed0/arithmetic failed with exit code 2" in line)
    assert "models.a: has the same weights as base" in line
    log = Path(line.rpartition("log: ")[2])
    assert log.read_text().startswith("$ mopd merge ")
    assert "Two teachers:" not in output

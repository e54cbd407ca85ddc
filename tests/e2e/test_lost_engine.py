"""Nothing answers any more: the run saves the steps it has done, says why it stops, and goes on to the same end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.cli import main
from megatron_mopd.metrics import read_records
from megatron_mopd.rollout.engine import RolloutFailure
from megatron_mopd.rollout.in_process import InProcessEngine
from megatron_mopd.student.checkpoint_files import find_latest, read_manifest
from tests.e2e.conftest import run_tree, write_run

DOMAINS = 3


def losing(call: int) -> Any:
    """`InProcessEngine.generate` that fails in its `call`-th call, counted from 0, as on every rank when servers go."""
    generate, calls = InProcessEngine.generate, 0

    def wrapped(self: InProcessEngine, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise RolloutFailure("rollout.sglang: no server is left: all gone")
        return generate(self, *args, **options)

    return wrapped


@pytest.fixture(scope="module")
def calm(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run when nothing happens."""
    folder = tmp_path_factory.mktemp("calm")
    assert main(["run", str(write_run(folder / "run.yaml", run_tree(models, folder / "run")))]) == 0
    return folder / "run"


# Calls: 0 the initial divergence, then one per domain and evaluation (before step 0, after 4, 8, 12), one per step.
@pytest.mark.parametrize(("call", "steps_done"), [(1 + DOMAINS + 5 + DOMAINS, 5), (1 + DOMAINS + 4 + 1, 4)])
def test_the_steps_done_are_saved_and_the_run_ends_as_if_nothing_had_happened(
    call: int,
    steps_done: int,
    models: Path,
    calm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tree = run_tree(models, tmp_path / "run") | {"checkpoint": {"every": 100, "keep_last": 2}}
    config = str(write_run(tmp_path / "run.yaml", tree))
    with monkeypatch.context() as patch:
        patch.setattr(InProcessEngine, "generate", losing(call))
        assert main(["run", config]) == 2
    captured = capfd.readouterr()
    assert captured.err.strip().splitlines()[-1] == "mopd: error: rollout.sglang: no server is left: all gone"
    assert f"{steps_done} steps are saved; the same command goes on from there" in captured.out
    latest = find_latest(tmp_path / "run")
    assert latest is not None
    assert read_manifest(latest).step == steps_done

    assert main(["run", config]) == 0
    assert evaluations(tmp_path / "run") == evaluations(calm)
    assert [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == list(range(12))
    assert final_bytes(tmp_path / "run") == final_bytes(calm)


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    records = read_records(run_dir / "metrics.jsonl", "eval")
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def final_bytes(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "latest" / "model" / "model.safetensors").read_bytes()

"""One Slurm for all tests, the models of a small project, and what is asked of jobs."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_mopd.metrics import read_records
from megatron_mopd.student.random_init import write_random_model
from tests.comparison import small_model
from tests.e2e.conftest import run_tree, write_run
from tests.slurm.cluster import Cluster, Missing, wait_until

ROOT = Path(__file__).parents[2]
MOPD = str(ROOT / "launch" / "mopd.sh")
SECONDS = 400
"""Ends a hang. Nothing is measured."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

STUB = """\
#!/usr/bin/env bash
# The program's Python, except that a rank is $STUB_RANK and that node $BAD_NODE answers no check.
case "$*" in
    "-m megatron_mopd "*) exec bash "$STUB_RANK" "${@:3}" ;;
    *cluster.node_check*) [[ ${BAD_NODE:-} == "$SLURMD_NODENAME" ]] && exit 1 ;;
esac
exec "$REAL_PYTHON" "$@"
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    environment = {"MOPD_SHARED_STORAGE": "yes", "PYTHON": sys.executable, "PREFLIGHT": "fast", "PYTHONPATH": str(ROOT)}
    try:
        # munge wants its socket in folders that all may enter, which pytest's are not.
        with tempfile.TemporaryDirectory(prefix="mopd-slurm-") as folder:
            Path(folder).chmod(0o755)
            with Cluster(Path(folder), nodes=4, environment=environment) as running:
                yield running
    except Missing as reason:
        pytest.skip(f"no Slurm here: {reason}")


@dataclass(frozen=True, slots=True)
class Project:
    folder: Path

    def tree(self, run_dir: Path, **changes: object) -> dict:
        return run_tree(self.folder, run_dir) | {"evaluation": {"prompts": 4, "every": 0}, **changes}

    def write(self, name: str, tree: dict) -> Path:
        return write_run(self.folder / f"{name}.yaml", tree)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    small_model(folder / "model")
    for seed, name in enumerate(("student", "a", "b", "c")):
        write_random_model(folder / name, folder / "model", seed)
    return Project(folder)


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """The environment in which ranks are `rank.sh` of the test's folder instead of the program."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    return {"PYTHON": str(python), "REAL_PYTHON": sys.executable, "STUB_RANK": str(tmp_path / "rank.sh")}


def weights(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "latest" / "model" / "model.safetensors").read_bytes()


def steps_logged(run_dir: Path) -> int:
    return len(read_records(run_dir / "metrics.jsonl")) if (run_dir / "metrics.jsonl").exists() else 0


def mopd_run(config: Path, *overrides: str) -> None:
    """`mopd run` without Slurm."""
    command = [sys.executable, "-m", "megatron_mopd", "run", str(config), *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def sbatch(cluster: Cluster, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Submit and return the job's number."""
    output = cluster.run("sbatch", "--output", str(cluster.folder / "%x-%j.out"), *arguments, env=env)
    found = re.search(r"Submitted batch job (\d+)", output)
    assert found, output
    return found[1]


def output_of(cluster: Cluster, job: str) -> str:
    return "".join(path.read_text() for path in sorted(cluster.folder.glob(f"*-{job}.out")))


def finish(cluster: Cluster, job: str) -> str:
    """Wait for the job's end, through requeues as they come, and return its last state."""

    def over() -> bool:
        if cluster.state(job) in ENDED and "COMPLETING" not in cluster.run("squeue", "-h", "-j", job, check=False):
            return True
        if cluster.job_field(job, "Reason") == "BeginTime":
            cluster.restart_now(job)
        return False

    wait_until(over, SECONDS, f"job {job} did not end:\n{output_of(cluster, job)}")
    return cluster.state(job)


def reasons(run_dir: Path) -> list[str]:
    """How each attempt ended, as its folder says; '-' for one that could not say."""
    folders = sorted((run_dir / "logs").glob("attempt_*"), key=lambda path: int(path.name.split("_")[1]))
    return [(path / "end").read_text().split()[0] if (path / "end").exists() else "-" for path in folders]

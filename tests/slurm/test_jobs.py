"""`sbatch launch/mopd.sh` on a real Slurm: the weights of `mopd run`, whatever happens on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import (
    MOPD,
    SECONDS,
    Project,
    finish,
    mopd_run,
    output_of,
    reasons,
    sbatch,
    steps_logged,
    weights,
)

STEPS = 120
TWO_NODES = ("-N2", MOPD, "--ranks-per-node=1")


def test_two_nodes_and_one_machine_reach_the_same_weights(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    """Also: every argument arrives as it was typed, and the dry run printed the lines that were run."""
    run_dir = tmp_path / """a run's "own" folder; $HOME * (1)"""
    config = project.write("two nodes", project.tree(tmp_path / "unused"))
    arguments = (str(config), f"run_dir={run_dir}", "optim.betas=[0.9, 0.99]")
    plan = cluster.run(MOPD, "--dry-run", "-N2", "--ranks-per-node=1", *arguments)
    assert cluster.run("squeue", "-h") == ""
    assert "train        2 nodes x 1 ranks = 2: node1,node2" in plan
    job = sbatch(cluster, *TWO_NODES, *arguments, env={"PREFLIGHT": "full"})
    assert finish(cluster, job) == "COMPLETED", output_of(cluster, job)
    attempt = run_dir / "logs" / "latest"
    submitted = (attempt / "commands.txt").read_text().splitlines()
    assert (
        submitted
        == [line.removeprefix("train").strip() for line in plan.splitlines() if line.startswith("train  ")][1:]
    )
    assert "commit: " in (attempt / "provenance.txt").read_text()
    for node in ("node1", "node2"):
        assert "GB/s" in (attempt / "nodes" / f"{node}.ok").read_text()
    assert (attempt / "rank1.log").exists()

    mopd_run(config, f"run_dir={tmp_path / 'here'}", arguments[-1])
    assert weights(run_dir) == weights(tmp_path / "here")

    job = sbatch(cluster, *TWO_NODES, *arguments)
    assert finish(cluster, job) == "COMPLETED"
    assert "complete at step 12; nothing to do" in output_of(cluster, job)


def test_everything_that_happens_to_a_job(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    """The time limit, a preemption, a killed rank, an admin's requeue and a lost node, one after the other."""
    tree = project.tree(tmp_path / "run", steps=STEPS, checkpoint={"every": 5, "keep_last": 2})
    config = project.write("rough", tree)
    run_dir = tmp_path / "run"
    job = sbatch(cluster, *TWO_NODES, str(config))

    def after_steps(more: int) -> None:
        """Wait until this attempt has logged `more` steps beyond the newest checkpoint's."""
        wait_until(lambda: cluster.state(job) == "RUNNING", SECONDS)
        target = steps_logged(run_dir) + more
        wait_until(lambda: steps_logged(run_dir) >= target, SECONDS, output_of(cluster, job))
        assert cluster.state(job) == "RUNNING", output_of(cluster, job)

    after_steps(4)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 sends before the limit
    cluster.restart_now(job)

    after_steps(4)
    urgent = sbatch(cluster, "--partition=high", "-N4", "--exclusive", "--wrap", "true")
    cluster.restart_now(job)
    assert cluster.state(urgent) == "COMPLETED"

    after_steps(4)
    os.kill(rank_process(cluster, job, 1), signal.SIGKILL)
    cluster.restart_now(job)

    after_steps(4)
    cluster.run("scontrol", "requeue", job)
    cluster.restart_now(job)

    after_steps(4)
    cluster.kill_node("node2")
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")  # Slurm sees it after minutes
    cluster.restart_now(job)
    assert finish(cluster, job) == "COMPLETED", output_of(cluster, job)
    cluster.start_node("node2")
    cluster.resume_node("node2")

    assert reasons(run_dir) == ["time-limit", "stopped", "failed", "stopped", "stopped", "complete"]
    provenance = (run_dir / "logs" / "latest" / "provenance.txt").read_text().splitlines()
    (hosts,) = (line.split()[1:] for line in provenance if line.startswith("hosts: "))
    assert len(hosts) == 2 and set(hosts) < {"node1", "node3", "node4"}
    assert cluster.job_field(job, "Restarts") == "5"
    output = output_of(cluster, job)
    assert "rank 1 on node2 was killed by SIGKILL (out of memory?)" in output
    mopd_run(config, f"run_dir={tmp_path / 'smooth'}")
    assert weights(run_dir) == weights(tmp_path / "smooth")


def rank_process(cluster: Cluster, job: str, rank: int) -> int:
    """Process id of a rank of `job`."""
    wanted = {f"RANK={rank}".encode(), f"SLURM_JOB_ID={job}".encode()}
    for pid in cluster.job_processes():
        environment = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        if wanted <= environment and b"megatron_mopd\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError(f"no rank {rank} of job {job}")

"""Mistakes that `launch/mopd.sh` tells before it submits: one line, nothing in the queue, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import MOPD, Project

TWO = ("-N2", "--ranks-per-node=1")


@pytest.mark.parametrize(
    ("options", "overrides", "parts"),
    [
        (("-N2",), (), ["GPUs per node", "--gpus-per-node=8"]),
        (("-N2", "--gpus-per-node=8"), (), ["parallel.ranks", "2 training nodes x 8 = 16"]),
        ((*TWO, "--rollout-nodes", "2"), (), ["2 nodes - 2 for rollouts", "-N"]),
        ((*TWO, "--rollout-nodes", "two"), (), ["--rollout-nodes", "two"]),
        (("-N2", ":", "-N1", "--ranks-per-node=1"), (), ["needs no servers", "het"]),
        (TWO, ("optim.lrr=1",), ["optim.lrr", "lr"]),
        (TWO, ("model.checkpoint=/not/set",), ["model.checkpoint", "/not/set"]),
        ((*TWO, "--partition=nowhere"), (), ["Slurm refuses", "Invalid partition"]),
        (("-N5", "--ranks-per-node=1"), ("parallel.ranks=5",), ["Slurm refuses"]),
    ],
)
def test_told_and_not_submitted(
    options: tuple[str, ...],
    overrides: tuple[str, ...],
    parts: list[str],
    cluster: Cluster,
    project: Project,
    tmp_path: Path,
) -> None:
    config = project.write("refused", project.tree(tmp_path / "run"))
    done = cluster.execute(MOPD, *options, str(config), *overrides)
    assert done.returncode in (2, 93)
    assert len(done.stdout.strip().splitlines()) == 1, done.stdout
    assert done.stdout.startswith("mopd: error: ")
    for part in parts:
        assert part in done.stdout
    assert cluster.run("squeue", "-h") == ""
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_only_this_machine_sees(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    config = project.write("local", project.tree(Path("/tmp/mopd-nowhere/run")))
    done = cluster.execute(MOPD, *TWO, str(config), env={"MOPD_SHARED_STORAGE": "no"})
    assert done.returncode == 2
    assert "run_dir: /tmp/mopd-nowhere/run is on this machine only" in done.stdout
    assert cluster.run("squeue", "-h") == ""


def test_containers_only_where_one_is_set(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    config = project.write("container", project.tree(tmp_path / "run"))
    env = {"CONTAINER_IMAGE": "/images/mopd.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    lines = cluster.run(MOPD, "--dry-run", *TWO, str(config), env=env).splitlines()
    assert "--container-image=/images/mopd.sqsh" in lines[-1]
    assert ",/data:/data" in lines[-1].replace("\\", "")
    assert "container" not in cluster.run(MOPD, "--dry-run", *TWO, str(config)).splitlines()[-1].replace(
        str(config), ""
    )

"""launch/pipeline.sh: SFT -> three teachers -> MOPD -> evaluation, and a chain that stops where a teacher fails."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.e2e.conftest import run_tree
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import ENDED, ROOT, SECONDS, Project

PIPELINE = str(ROOT / "launch" / "pipeline.sh")
OPTIONS = ("-N1", "--ranks-per-node", "1")


def write_study(models: Path, folder: Path) -> Path:
    """One step per stage; every stage starts from what the one before it wrote."""
    folder.mkdir()
    runs = folder / "runs"
    mopd = run_tree(models, runs / "mopd") | {"parallel": {}, "evaluation": {"prompts": 4, "every": 0}, "steps": 1}
    mopd["prompts_per_step"] = 6
    base = {"checkpoint": str(runs / "sft" / "checkpoints" / "latest"), "dtype": "float32"}
    plain = {name: {k: v for k, v in domain.items() if k != "teacher"} for name, domain in mopd["domains"].items()}
    common = {key: value for key, value in mopd.items() if key not in ("teachers", "domains", "stage", "run_dir")}
    sft = common | {
        "run_dir": str(runs / "sft"),
        "stage": "sft",
        "model": {"hf_config": str(models / "model"), "dtype": "float32"},
        "domains": plain,
        "objective": {"kind": "cross_entropy"},
    }
    stages = {"sft": sft}
    for number, name in enumerate(mopd["teachers"], 1):
        stages[f"teacher_{name}"] = common | {
            "run_dir": str(runs / f"teacher_{name}"),
            "stage": "rl",
            "model": base,
            "domains": {name: plain[name]},
            "objective": {"kind": "grpo"},
            "rollout": {"samples_per_prompt": 2},
            # The rewards may all be 0: decay alone makes the teachers differ from the base and from each other.
            "optim": {"lr": 1e-3 * number, "weight_decay": 0.1},
        }
    teachers = {name: {"checkpoint": str(runs / f"teacher_{name}/checkpoints/latest")} for name in mopd["teachers"]}
    stages["mopd"] = mopd | {"model": base, "teachers": teachers}
    for name, tree in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder


def submit(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Name of a stage -> number of its job."""
    output = cluster.run(PIPELINE, "-o", str(cluster.folder / "%x-%j.out"), *OPTIONS, str(folder))
    return {line.split()[0]: line.split()[1] for line in output.splitlines()}


def ends(cluster: Cluster, jobs: dict[str, str]) -> dict[str, str]:
    def over() -> bool:
        return all(cluster.state(job) in ENDED for job in jobs.values())

    logs = "".join(path.read_text() for path in cluster.folder.glob("*.out"))
    wait_until(over, 2 * SECONDS, logs)
    return {name: cluster.state(job) for name, job in jobs.items()}


def test_a_study_and_a_chain_that_breaks(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    folder = write_study(project.folder, tmp_path / "study")
    plan = cluster.run(PIPELINE, "--dry-run", *OPTIONS, str(folder)).splitlines()
    assert [line.split()[0] for line in plan] == ["sft", "teacher_a", "teacher_b", "teacher_c", "mopd", "eval_mopd"]
    # Quoted for a shell: whether bash quotes a comma depends on its version.
    assert "afterok:<teacher_a>,afterok:<teacher_b>,afterok:<teacher_c>" in plan[4].replace("\\", "")
    assert cluster.run("squeue", "-h") == ""

    jobs = submit(cluster, folder)
    assert ends(cluster, jobs) == dict.fromkeys(jobs, "COMPLETED")
    teachers = json.loads((folder / "runs/mopd/checkpoints/latest/manifest.json").read_text())["state"]["teachers"]
    assert len({teacher["weights"] for teacher in teachers.values()}) == 3
    result = json.loads((folder / "runs/mopd/eval.json").read_text())
    assert set(result["domains"]) == {"a", "b", "c"}

    # The same study once more: what is complete ends at once. One teacher is to go on as another run, which is refused.
    file = folder / "teacher_b.yaml"
    file.write_text(file.read_text().replace("steps: 1", "steps: 2").replace("seed: 7", "seed: 8"))
    jobs = submit(cluster, folder)
    states = ends(cluster, jobs)
    assert states.pop("teacher_b") == "FAILED"
    assert (states.pop("mopd"), states.pop("eval_mopd")) == ("CANCELLED", "CANCELLED")
    assert states == dict.fromkeys(("sft", "teacher_a", "teacher_c"), "COMPLETED")

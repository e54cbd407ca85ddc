"""What the launchers ask of Python: shapes, mistakes before submission, the chain of a study, findings on a node."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_mopd.cluster import agent, describe, node_check, pipeline
from megatron_mopd.cluster.describe import Shape, check_shared
from megatron_mopd.yaml_config import ConfigError
from tests.e2e.conftest import run_tree, write_run

ROOT = Path(__file__).parents[2]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert describe.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run.yaml", run_tree(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--nodes", "2"], ["GPUs per node", "--gpus-per-node=8"]),
        (["--nodes", "2", "--ranks-per-node", "8"], ["parallel.ranks", "2 ranks", "2 training nodes x 8 = 16"]),
        (["--nodes", "2", "--ranks-per-node", "1", "--rollout-nodes", "2"], ["leave none to train on"]),
        (["--nodes", "3", "--ranks-per-node", "1", "--rollout-nodes", "1"], ["--rollout-nodes", "needs no servers"]),
    ],
)
def test_shapes_that_do_not_fit(
    options: list[str], parts: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *options, "run", str(config))
    for part in parts:
        assert part in line


def test_servers_are_started_only_where_the_file_says_how(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "3", "--ranks-per-node", "1", "--rollout-nodes", "1", "run", str(config)]
    line = refused(capsys, *options, "rollout.engine=sglang", "rollout.sglang.urls=[http://a:1]")
    assert "rollout.sglang: has urls of servers that run already" in line
    assert describe.main([*options, "rollout.engine=sglang", "rollout.sglang.launch.servers=4"]) == 0
    assert "servers=4" in capsys.readouterr().out.splitlines()


def test_layout_is_checked_for_the_jobs_world(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--nodes", "3", "--ranks-per-node", "1"]
    line = refused(capsys, *shape, "run", str(config), "parallel.ranks=null", "parallel.tensor=2")
    assert "tensor 2" in line
    assert "3 ranks" in line


def test_facts(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--nodes", "3", "--ranks-per-node", "1", "--spare-nodes", "1"]
    assert describe.main([*shape, "run", str(config), "steps=9"]) == 0
    facts = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    assert facts.pop("versions") == node_check.versions()
    assert facts == {
        "run_dir": str(tmp_path / "run"),
        "steps": "9",
        "complete": "0",
        "servers": "0",
        "world": "2",
    }


def test_shapes() -> None:
    assert Shape(nodes=16, rollout_nodes=4, ranks_per_node=8).world == 96
    assert Shape(nodes=16, rollout_nodes=16, ranks_per_node=8, colocated=True).world == 128
    assert Shape(nodes=16, rollout_nodes=4, ranks_per_node=8, spare_nodes=2).world == 80


def test_storage_of_one_machine_only() -> None:
    mounts = "none / overlay rw\nserver:/x /proc nfs4 rw\n"
    with pytest.raises(ConfigError, match="on this machine only"):
        check_shared(Path("/somewhere/run"), mounts, nodes=2)
    check_shared(Path("/somewhere/run"), mounts, nodes=1)
    check_shared(Path("/proc/run"), mounts, nodes=2)


def test_a_checkpoint_needs_room(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mopd.config import load_config
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.weight_table import model_tensors
    from tests.tiny import write_model

    arch = write_model(tmp_path / "student")
    parameters = sum(math.prod(tensor.shape) for tensor in model_tensors(read_architecture(tmp_path / "student")))
    assert arch.vocab_size == 101
    needed = 3 * parameters * (12 + 2 * 4)  # keep_last 2 and the one being written; fp32
    monkeypatch.setattr(describe, "free_bytes", lambda folder: needed)
    describe._check_space(load_config(config))
    monkeypatch.setattr(describe, "free_bytes", lambda folder: needed - 1)
    with pytest.raises(ConfigError, match=r"run_dir: .* GB free; 3 checkpoints"):
        describe._check_space(load_config(config))


def test_the_chain_of_the_tiny_study() -> None:
    names = {job.name: job for job in pipeline.jobs(ROOT / "configs" / "tiny", ["steps=3"], baselines=True)}
    teachers = ("teacher_math", "teacher_reverse", "teacher_sort")
    assert names["sft"].after == ()
    assert all(names[name].after == ("sft",) for name in (*teachers, "mix_rl", "cascade_rl"))
    assert names["mopd"].after == teachers
    assert names["eval_mopd"].arguments[2:] == ("--checkpoint", "runs/tiny/mopd/checkpoints/latest", "steps=3")
    assert names["off_policy"].after == ("sample",)
    assert names["sample"].arguments[2:4] == ("--out", "runs/tiny/teacher_answers_correct.jsonl")
    assert names["merge"].after == teachers
    line = names["teacher_math"].line().split("\t")
    assert line == [
        "teacher_math",
        "teacher",
        "sft",
        "rl_math",
        "-",
        "run",
        str(ROOT / "configs/tiny/rl_math.yaml"),
        "steps=3",
    ]


def test_a_chain_whose_stages_do_not_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (ROOT / "configs" / "tiny").glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "sft.yaml").write_text((tmp_path / "sft.yaml").read_text().replace("chain_sum", "chain_summ"))
    assert pipeline.main([str(tmp_path)]) == 2
    assert f"{tmp_path / 'sft.yaml'}: " in (line := capsys.readouterr().err)
    assert "chain_summ" in line
    tree = yaml.safe_load((tmp_path / "rl_sort.yaml").read_text())
    (tmp_path / "rl_sort.yaml").write_text(yaml.safe_dump(tree | {"run_dir": "runs/elsewhere"}))
    assert pipeline.main([str(tmp_path)]) == 2
    assert "mopd.yaml: teachers.sort.checkpoint: runs/tiny/rl_sort/checkpoints/latest is not in runs/elsewhere" in (
        capsys.readouterr().err
    )
    (tmp_path / "rl_sort.yaml").unlink()
    assert pipeline.main([str(tmp_path)]) == 2
    assert "no teacher_sort.yaml or rl_sort.yaml" in capsys.readouterr().err
    assert pipeline.main([str(tmp_path), "run_dir=x"]) == 2
    assert "every stage has its own" in capsys.readouterr().err


def test_findings_on_gpus() -> None:
    rows = [["0", "81559", "500", "0"], ["1", "81559", "40000", "2"], ["2", "81559", "0", "[N/A]"]]
    assert list(node_check.gpu_findings(rows)) == [
        "GPU 1: 2 uncorrected ECC errors",
        "GPU 1: 40000 of 81559 MiB are in use by another process",
    ]


def test_storage_canary(tmp_path: Path) -> None:
    assert "cannot be read" in next(node_check.check_storage(tmp_path, "7.1"))
    (tmp_path / "canary").write_text("7.1\n")
    assert list(node_check.check_storage(tmp_path, "7.1")) == []
    assert "another attempt's" in next(node_check.check_storage(tmp_path, "7.2"))


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 8])
def test_pairs_of_a_round_share_no_node(nodes: int) -> None:
    pairs = node_check.pairs(nodes)
    degree = [sum(node in pair for pair in pairs) for node in range(nodes)]
    assert degree == [1 if nodes == 2 else 2] * nodes
    # In the order of the list, no node waits for one that waits for it: play it.
    waiting = {node: [pair for pair in pairs if node in pair] for node in range(nodes)}
    while any(waiting.values()):
        ready = [pair for pair in pairs if all(waiting[node][:1] == [pair] for node in pair)]
        assert ready
        for pair in ready:
            for node in pair:
                waiting[node].pop(0)


def test_a_worker_without_a_handler_is_not_signalled() -> None:
    """SIGUSR1 would kill it; it is told once it has a handler."""
    code = (
        "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5)); print(flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as plain:
        assert not agent._catches(plain.pid, signal.SIGUSR1)
        plain.kill()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as handled:
        assert handled.stdout is not None
        handled.stdout.readline()
        assert agent._catches(handled.pid, signal.SIGUSR1)
        handled.send_signal(signal.SIGUSR1)
        assert handled.wait() == 5
    assert not agent._catches(handled.pid, signal.SIGUSR1)


def test_the_agent_passes_a_stop_on_and_marks_mistakes(tmp_path: Path) -> None:
    """torchrun with one worker: asked to stop it may end in its own time; its exit code 2 means no restart."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, signal, sys\n"
        "def stop(*_):\n    sys.exit(2)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while True: signal.pause()\n"
    )
    command = [sys.executable, "-m", "megatron_mopd.cluster.agent", "--attempt", str(tmp_path), "--"]
    command += ["--nproc-per-node=1", str(worker), str(tmp_path / "up")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (tmp_path / "up").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 93, errors
    assert "rank 0 on" in errors
    assert "exit code 2" in (tmp_path / "no-restart").read_text()


def test_local_restarts_stop_without_progress(config: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\n[[ $2 == megatron_mopd ]] && echo "called: ${*:3}" && exit 7\nexec "$REAL_PYTHON" "$@"\n'
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "REAL_PYTHON": sys.executable, "MAX_STALLED": "2"}
    command = [str(ROOT / "launch" / "local.sh"), str(config), "optim.betas=[0.9, 0.99]"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 93, done.stderr
    assert done.stdout.count(f"called: run {config} optim.betas=[0.9, 0.99]\n") == 2
    assert "not started again: 2 attempts without a new checkpoint" in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

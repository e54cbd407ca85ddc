"""What the launcher decides: bad nodes, crashes without progress, cancellation, roles. Ranks are stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import MOPD, SECONDS, Project, finish, output_of, reasons, sbatch

COMPLETE = 'echo 12 >"$(dirname "$(dirname "$MOPD_ATTEMPT")")/DONE"\n'
CRASH = "printf 'Traceback (most recent call last):\\n  line\\nValueError: rank %s is tired\\n' \"$RANK\"; exit 7\n"


def submit(cluster: Cluster, config: Path, env: dict[str, str], *options: str, own: tuple[str, ...] = ()) -> str:
    return sbatch(cluster, *options, MOPD, "--ranks-per-node=1", *own, str(config), env=env)


def test_no_restart_without_progress(cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]) -> None:
    config = project.write("crash", project.tree(tmp_path / "run", parallel={}))
    (tmp_path / "rank.sh").write_text(CRASH)
    job = submit(cluster, config, stub | {"MAX_STALLED": "2"}, "-N1")
    assert finish(cluster, job) == "FAILED"
    assert cluster.job_field(job, "ExitCode") == "93:0"
    assert reasons(tmp_path / "run") == ["failed", "failed"]
    output = output_of(cluster, job)
    assert "ValueError: rank 0 is tired" in output
    assert "not started again: 2 attempts without a new checkpoint" in output


def test_a_mistake_of_the_users_is_not_tried_again(cluster: Cluster, project: Project, tmp_path: Path) -> None:
    config = project.write("mistake", project.tree(tmp_path / "run", parallel={}))
    job = sbatch(cluster, "-N1", MOPD, "--ranks-per-node=2", str(config), "teachers.b.checkpoint=/nowhere/else")
    assert finish(cluster, job) == "FAILED"
    assert cluster.job_field(job, "ExitCode") == "93:0"
    assert "teachers.b.checkpoint: folder /nowhere/else does not exist" in output_of(cluster, job)
    assert reasons(tmp_path / "run") == ["no-restart"]


def test_a_bad_node_is_named_and_left_out(
    cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]
) -> None:
    config = project.write("bad_node", project.tree(tmp_path / "run", parallel={}))
    (tmp_path / "rank.sh").write_text(COMPLETE)
    job = submit(cluster, config, stub | {"BAD_NODE": "node1"}, "-N2", "--nodelist=node1,node2")
    wait_until(lambda: cluster.job_field(job, "ExcNodeList") == "node1", SECONDS, output_of(cluster, job))
    assert "bad node node1: did not answer" in output_of(cluster, job)
    assert reasons(tmp_path / "run") == ["nodes"]
    cluster.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")
    assert finish(cluster, job) == "COMPLETED", output_of(cluster, job)
    assert "hosts: node2 node3" in (tmp_path / "run" / "logs" / "latest" / "provenance.txt").read_text()


def test_a_spare_node_stands_in(cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]) -> None:
    config = project.write("spare", project.tree(tmp_path / "run", parallel={}))
    (tmp_path / "rank.sh").write_text(COMPLETE)
    job = submit(cluster, config, stub | {"BAD_NODE": "node2"}, "-N3", own=("--spare-nodes", "1"))
    assert finish(cluster, job) == "COMPLETED", output_of(cluster, job)
    assert "--nodelist=node1\\,node3" in (tmp_path / "run" / "logs" / "latest" / "commands.txt").read_text()


def test_cancelled_means_cancelled(cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]) -> None:
    config = project.write("cancelled", project.tree(tmp_path / "run", parallel={}))
    (tmp_path / "rank.sh").write_text('trap "exit 0" TERM USR1\ntouch "$MOPD_ATTEMPT/up"\nsleep 600 &\nwait\n')
    job = submit(cluster, config, stub, "-N1")
    wait_until((tmp_path / "run" / "logs" / "attempt_1" / "up").exists, SECONDS, output_of(cluster, job))
    cluster.run("scancel", job)
    wait_until(lambda: cluster.run("squeue", "-h", "-j", job, check=False).strip() == "", SECONDS)
    assert cluster.state(job) == "CANCELLED"
    assert cluster.job_field(job, "Restarts") == "0"


SERVER = """\
#!/usr/bin/env python3
import http.server, os, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(os.environ["SLURMD_NODENAME"].encode())
http.server.HTTPServer((os.environ["SLURMD_NODENAME"], port), Handler).serve_forever()
"""
ASK = """\
import sys, urllib.request
urls = sys.argv[-1].removeprefix("rollout.sglang.urls=[").rstrip("]").split(",")
print("servers:", *(urllib.request.urlopen(url + "/health").read().decode() for url in urls))
"""


@pytest.mark.parametrize("het", [False, True], ids=["split", "het"])
def test_rollout_servers_have_nodes_of_their_own(
    het: bool, cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]
) -> None:
    run_dir = tmp_path / "run"
    config = project.write("roles", project.tree(run_dir, parallel={}))
    server = tmp_path / "server"
    server.write_text(SERVER)
    server.chmod(0o755)
    (tmp_path / "ask.py").write_text(ASK)
    (tmp_path / "rank.sh").write_text(f'((RANK)) || "$REAL_PYTHON" {tmp_path}/ask.py "$@"\n((RANK)) || {COMPLETE}')
    facts = f"run_dir={run_dir}\nsteps=12\ncomplete=0\nengine=sglang\nmodel=/models/student\nworld=1"
    env = stub | {"SERVER_COMMAND": str(server), "STUB_FACTS": facts}
    if het:
        job = submit(cluster, config, env, "-N1", ":", "-N2")
    else:
        job = submit(cluster, config, env, "-N3", own=("--rollout-nodes", "2"))
    assert finish(cluster, job) == "COMPLETED", output_of(cluster, job)
    log = (run_dir / "logs" / "latest" / "rank0.log").read_text()
    assert "servers: node2 node3" in log
    commands = (run_dir / "logs" / "latest" / "commands.txt").read_text().splitlines()
    assert len(commands) == 2
    assert ("--het-group=1" in commands[0]) == het
    assert "node.sh rollout /models/student 1 0 30000" in commands[0]


def test_a_dead_server_ends_the_attempt(
    cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]
) -> None:
    run_dir = tmp_path / "run"
    config = project.write("dead_server", project.tree(run_dir, parallel={}))
    server = tmp_path / "server"
    server.write_text(SERVER.replace(".serve_forever()", ".handle_request()"))  # the launcher's question is its last
    server.chmod(0o755)
    (tmp_path / "rank.sh").write_text("sleep 600\n")
    facts = f"run_dir={run_dir}\nsteps=12\ncomplete=0\nengine=sglang\nmodel=/models/student\nworld=1"
    env = stub | {"SERVER_COMMAND": str(server), "STUB_FACTS": facts, "ROLE_GRACE": "2", "MAX_STALLED": "1"}
    job = submit(cluster, config, env, "-N2", own=("--rollout-nodes=1",))
    assert finish(cluster, job) == "FAILED"
    assert "a rollout server ended" in output_of(cluster, job)
    assert reasons(run_dir) == ["failed"]

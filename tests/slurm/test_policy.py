"""What the launcher decides: bad nodes, crashes without progress, cancellation, roles. Ranks are stand-ins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_mopd.rollout.sglang.server import SGLANG_VERSION
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import MOPD, SECONDS, Project, finish, output_of, reasons, sbatch

COMPLETE = 'echo 12 >"$(dirname "$(dirname "$MOPD_ATTEMPT")")/DONE"\n'
CRASH = """\
printf '[rank%s]: Traceback (most recent call last):\\n' "$RANK"
if ((RANK)); then
    printf '[rank1]: ValueError: rank 1 is tired\\n'
    exit 7
fi
printf '[rank0]: RuntimeError: [gloo] Connection closed by peer\\n'
sleep 60
"""


def submit(cluster: Cluster, config: Path, env: dict[str, str], *options: str, own: tuple[str, ...] = ()) -> str:
    return sbatch(cluster, *options, MOPD, "--ranks-per-node=1", *own, str(config), env=env)


def test_no_restart_without_progress(cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]) -> None:
    config = project.write("crash", project.tree(tmp_path / "run", parallel={}))
    (tmp_path / "rank.sh").write_text(CRASH)
    job = submit(cluster, config, stub | {"MAX_STALLED": "2"}, "-N1", own=("--ranks-per-node=2",))
    assert finish(cluster, job) == "FAILED"
    assert cluster.job_field(job, "ExitCode") == "93:0"
    assert reasons(tmp_path / "run") == ["failed", "failed"]
    output = output_of(cluster, job)
    assert "first failure: " in output
    assert output.count("[rank1]: ValueError: rank 1 is tired") == 2
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


SERVER = f"""\
#!/usr/bin/env python3
# In the place of SGLang's Python: serves /health with the settings that serve.py would get.
import http.server, json, os, sys
if "-c" in sys.argv:
    print("{SGLANG_VERSION}")
    sys.exit()
settings = json.loads(sys.stdin.readline())
options = dict(zip(settings["arguments"], settings["arguments"][1:]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        assert settings["api_key"] == os.environ["MOPD_SGLANG_API_KEY"]
        self.wfile.write((os.environ["SLURMD_NODENAME"] + ":" + options["--port"]).encode())
http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""
ASK = """\
import sys, urllib.request
assert sys.argv[-1] == "rollout.sglang.launch=null", sys.argv
urls = sys.argv[-2].removeprefix("rollout.sglang.urls=[").rstrip("]").split(",")
print("servers:", *(urllib.request.urlopen(url + "/health").read().decode() for url in urls))
"""


def with_servers(project: Project, tmp_path: Path, server: str) -> Path:
    """The file of a run whose servers are `server`, two on a node."""
    python = tmp_path / "server"
    python.write_text(server)
    python.chmod(0o755)
    launch = {"python": str(python), "servers": 2, "device": "cpu"}
    rollout = {"engine": "sglang", "sglang": {"launch": launch}}
    return project.write("servers", project.tree(tmp_path / "run", parallel={}, rollout=rollout))


@pytest.mark.parametrize("het", [False, True], ids=["split", "het"])
def test_rollout_servers_have_nodes_of_their_own(
    het: bool, cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]
) -> None:
    config = with_servers(project, tmp_path, SERVER)
    (tmp_path / "ask.py").write_text(ASK)
    (tmp_path / "rank.sh").write_text(f'"$REAL_PYTHON" {tmp_path}/ask.py "$@"\n{COMPLETE}')
    if het:
        options, own = ("-N1", ":", "-N2"), ()
    else:
        options, own = ("-N3",), ("--rollout-nodes", "2")
    plan = cluster.run(MOPD, "--dry-run", *options, "--ranks-per-node=1", *own, str(config))
    job = submit(cluster, config, stub, *options, own=own)
    assert finish(cluster, job) == "COMPLETED", output_of(cluster, job)
    attempt = tmp_path / "run" / "logs" / "latest"
    assert "servers: node2:30000 node2:30001 node3:30000 node3:30001" in (attempt / "rank0.log").read_text()
    commands = (attempt / "commands.txt").read_text().splitlines()
    assert [("--het-group=1" in line, "--het-group=0" in line) for line in commands] == [(het, False), (False, het)]
    planned = [line.split(maxsplit=1)[1] for line in plan.splitlines()[-2:]]
    if het:  # which nodes its parts will get Slurm may not know before
        commands, planned = (
            [re.sub(r"(node|rollout)\d+", "NODE", line) for line in lines] for lines in (commands, planned)
        )
    assert commands == planned


def test_a_dead_server_ends_the_attempt(
    cluster: Cluster, project: Project, tmp_path: Path, stub: dict[str, str]
) -> None:
    # The launcher's question is the last that it answers.
    config = with_servers(project, tmp_path, SERVER.replace(".serve_forever()", ".handle_request()"))
    (tmp_path / "rank.sh").write_text("trap 'exit 0' USR1\nsleep 600 &\nwait\n")
    job = submit(cluster, config, stub | {"MAX_STALLED": "1"}, "-N2", own=("--rollout-nodes=1",))
    assert finish(cluster, job) == "FAILED"
    assert "a rollout server ended" in output_of(cluster, job)
    assert reasons(tmp_path / "run") == ["failed"]

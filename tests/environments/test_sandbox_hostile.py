"""Snippets that want to do harm are stopped within their limits, leave nothing behind, and we go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_mopd.environments.sandbox import Isolation, Sandbox, SandboxError, SandboxLimits, SandboxResult
from tests.environments.hostile import SNIPPETS

LIMITS = SandboxLimits(seconds=1.5, memory_bytes=256 << 20, scratch_bytes=4 << 20, output_bytes=2000)
PATIENCE_SECONDS = 20
OTHERWISE_WITH_LANDLOCK = ("fills the disk", "thread bomb")
"""No file can be opened to fill it; memory is what limits threads."""
WAYS: tuple[Isolation, ...] = ("bubblewrap", "namespaces", "landlock")


def sandbox_of(isolation: Isolation) -> Sandbox:
    try:
        return Sandbox.open(isolation)
    except SandboxError as error:
        pytest.skip(f"not on this machine: {error}")


class Machine:
    """What snippets may want of this machine, and whether they got it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.mark = f"hostile{uuid.uuid4().hex}"
        self.folder = folder
        self.server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.local = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.local.bind(str(folder / "local"))
        self.local.listen()
        self.secret = folder / "secret"
        self.secret.write_text("ours")
        self.processes = processes()
        self.names = {
            "mark": self.mark,
            "port": self.server.getsockname()[1],
            "host": "127.0.0.1",
            "local": folder / "local",
            "secret": self.secret,
            "folder": folder,
            "pid": os.getpid(),
            "scratch": LIMITS.scratch_bytes,
        }

    def is_untouched(self) -> bool:
        for listener in (self.server, self.local):
            listener.setblocking(False)
            try:
                listener.accept()
            except BlockingIOError:
                continue
            return False
        places = [self.folder, *map(Path, ("/", "/tmp", "/usr", "/dev", "/dev/shm", "/var/tmp"))]
        written = [path for place in places if place.is_dir() for path in place.glob(f"*{self.mark}*")]
        return not written and self.secret.read_text() == "ours" and gone(processes() - self.processes)


def processes() -> set[int]:
    """Our descendants, and all that live in another process namespace."""
    own, found = os.readlink("/proc/self/ns/pid"), set(descendants(os.getpid()))
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "ns" / "pid") != own:
                found.add(int(path.name))
        except OSError:
            continue
    return found


def descendants(parent: int) -> Iterator[int]:
    try:
        children = [path.read_text().split() for path in Path(f"/proc/{parent}/task").glob("*/children")]
    except OSError:
        return
    for child in (int(pid) for pids in children for pid in pids):
        yield child
        yield from descendants(child)


def gone(pids: set[int]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with ExitStack() as stack:
        made = Machine(tmp_path, stack)
        monkeypatch.setenv("MOPD_TEST_SECRET", made.mark)
        yield made


@pytest.mark.parametrize("isolation", WAYS)
def test_every_hostile_snippet_is_stopped_and_leaves_nothing(isolation: Isolation, machine: Machine) -> None:
    sandbox = sandbox_of(isolation)

    def run(name: str) -> SandboxResult:
        return sandbox.run(SNIPPETS[name].code.format(**machine.names), LIMITS)

    with ThreadPoolExecutor(4) as pool:
        results = dict(zip(SNIPPETS, pool.map(run, SNIPPETS), strict=True))
    wrong = {}
    for name, result in results.items():
        hostile = SNIPPETS[name]
        other = isolation == "landlock" and name in OTHERWISE_WITH_LANDLOCK
        says, endings = ("", ("ok", "error", "timeout")) if other else (hostile.says, hostile.endings)
        assert len(result.output) <= LIMITS.output_bytes
        if result.ending not in endings or "ESCAPED" in result.output or says not in result.output:
            wrong[name] = result
    assert not wrong
    assert machine.is_untouched()
    assert sandbox.run("6 * 7", LIMITS).output == "42\n"


def test_the_snippets_would_get_there_without_isolation(machine: Machine) -> None:
    sandbox = Sandbox.open("none")
    for name, hostile in SNIPPETS.items():
        if hostile.free:
            result = sandbox.run(hostile.code.format(**machine.names), LIMITS)
            assert "ESCAPED" in result.output, (name, result)
    assert not machine.is_untouched()  # one has written
    for folder in ("/", "/tmp", "/usr", "/dev", "/var/tmp"):
        Path(folder, machine.mark).unlink(missing_ok=True)


@pytest.mark.parametrize("isolation", WAYS)
def test_a_killed_trainer_leaves_no_sandbox(isolation: Isolation, tmp_path: Path) -> None:
    sandbox_of(isolation)
    program = (
        "from megatron_mopd.environments.sandbox import *\n"
        f"sandbox = Sandbox.open({isolation!r})\n"
        "limits = SandboxLimits(seconds=600, memory_bytes=1 << 28, scratch_bytes=1 << 20, output_bytes=100)\n"
        "print('open', flush=True)\nsandbox.run('while True: pass', limits)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"open\n"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(runs_a_snippet(pid) for pid in descendants(trainer.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started = set(descendants(trainer.pid))
    finally:
        trainer.kill()
        trainer.wait()
    assert gone(started)


def runs_a_snippet(pid: int) -> bool:
    """Whether its filter is in place."""
    try:
        return "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


AS_USER = """
if [ -n "$1" ]; then mount --bind "$2" /mnt && mount -t tmpfs none "$1" && mkdir -p "$2" && mount --move /mnt "$2"; fi
chmod 755 "${1:-/tmp}"; shift 2; exec setpriv --reuid=1000 --regid=1000 --clear-groups "$@"
"""
"""Runs a command as an ordinary user; shows it only the interpreter ($2) of a folder ($1) that is root's alone."""
PROBE = """
import json, sys
from megatron_mopd.environments.sandbox import *
limits = SandboxLimits(seconds=2, memory_bytes=1 << 28, scratch_bytes=1 << 22, output_bytes=2000)
try:
    sandbox = Sandbox.open(sys.argv[1])
except SandboxError as error:
    sys.exit(f"no sandbox: {error}")
results = [sandbox.run(code, limits) for code in json.load(sys.stdin)]
print(json.dumps([[result.ending, result.output] for result in results]))
"""


def as_user() -> list[str]:
    """The beginning of a command line that runs the rest without privileges."""
    if os.getuid() != 0:
        return []
    private = [str(path) for path in Path(sys.base_prefix).parents if not path.stat().st_mode & 1]
    line = ["unshare", "--mount", "sh", "-ec", AS_USER, "sh", private[-1] if private else "", sys.base_prefix]
    trial = subprocess.run([*line, sys.executable, "-c", "import megatron_mopd"], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"no other user can be played here: {trial.stderr}")
    return line


@pytest.mark.parametrize("isolation", WAYS)
def test_a_user_without_privileges_is_as_safe(isolation: Isolation, machine: Machine) -> None:
    sandbox_of(isolation)
    become = as_user()
    names = ["fork bomb", "fork bomb of a shell", "writes outside", "makes namespaces and mounts"]
    if isolation != "landlock":
        names.append("thread bomb")
    codes = [SNIPPETS[name].code.format(**machine.names) for name in names]
    line = [*become, sys.executable, "-c", PROBE, isolation]
    done = subprocess.run(line, input=json.dumps(codes), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, (ending, output) in zip(names, json.loads(done.stdout), strict=True):
        assert ending in SNIPPETS[name].endings and SNIPPETS[name].says in output and "ESCAPED" not in output, (
            name,
            ending,
            output,
        )
    assert machine.is_untouched()


def test_a_snippet_ended_by_its_cpu_limit_is_told_as_killed() -> None:
    limits = SandboxLimits(seconds=0.2, memory_bytes=1 << 28, scratch_bytes=1 << 20, output_bytes=100)
    code = f"import os, signal\nos.kill(os.getpid(), signal.{signal.SIGKILL.name})"
    assert Sandbox.open("auto").run(code, limits).ending == "killed"

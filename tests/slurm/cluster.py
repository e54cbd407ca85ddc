"""A real Slurm of several nodes on this machine: own munge, ports and folders; no systemd, no cgroups; needs root.

A node is one slurmd with a host name of its own (a uts namespace), its own /etc/hosts (a mount namespace) and its own
loopback address. Everything lies in one folder; nothing of the machine's own Slurm, if it has one, is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "unshare")
CONTROLLER = "slctl"
_ON_HOST = 'mount --bind "$1/hosts" /etc/hosts; hostname "$2"; shift 2; exec "$@"'

CONF = """\
ClusterName=mopdtest
SlurmctldHost={controller}(127.0.1.10)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
# No systemd and no cgroup: processes are followed by their parents.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
# Nodes may claim more processors and memory than there are.
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=20
MinJobAge=600
InactiveLimit=0
SlurmdTimeout=300
SlurmctldTimeout=60
JobRequeue=1
JobFileAppend=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
"""
PARTITIONS = """\
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 DefaultTime=60 State=UP
PartitionName=high Nodes=ALL Default=NO PriorityTier=10 PreemptMode=OFF DefaultTime=60 State=UP
"""


class Missing(Exception):
    """Why no cluster can run here."""


@dataclass
class Cluster:
    """A cluster in `folder`; a context manager that starts it and ends every process of it."""

    folder: Path
    nodes: int = 4
    processors: int = 8
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Cluster:
        missing = [name for name in PROGRAMS if _which(name) is None]
        if missing:
            raise Missing(f"{', '.join(missing)} not installed; run tests/slurm/install.sh")
        if os.geteuid() != 0:
            raise Missing("a Slurm of its own needs root")
        self._write_files()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--full", "--user=root", check=False)
            wait_until(lambda: not self.run("squeue", "-h", "-o", "%i").split(), 15)
        for name in self.names:
            self._end(self.folder / "run" / f"slurmd.{name}.pid", "slurmd")
        for pid in list(self.job_processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._end(self.folder / "run" / "slurmctld.pid", "slurmctld")
        self._end(self.folder / "run" / "munged.pid", "munged")

    @property
    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def run(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """stdout and stderr of a client command, which runs on the controller's host."""
        done = self.execute(*command, env=env)
        assert not check or done.returncode == 0, (command, done.stdout)
        return done.stdout

    def execute(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._on(CONTROLLER, command),
            env=self._clean_environment() | dict(env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def job_field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`; '' when Slurm has forgotten the job."""
        words = self.run("scontrol", "show", "job", job, check=False).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def state(self, job: str) -> str:
        return self.job_field(job, "JobState")

    def restart_now(self, job: str) -> None:
        """A requeued job waits for two minutes: start it at once. (Sooner than 2.5 s its credential is revoked.)"""
        wait_until(
            lambda: self.state(job) == "PENDING" and "batch" not in self.run("squeue", "-h", "-s", "-j", job), 90
        )
        wait_until(lambda: self.run("squeue", "-h", "-t", "CG", "-j", job, check=False).strip() == "", 60)
        time.sleep(3)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def job_processes(self) -> Iterator[int]:
        """Processes of jobs of this cluster: their environment names our slurm.conf and a job."""
        ours = f"SLURM_CONF={self.conf}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if ours in variables and any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables):
                    yield int(entry.name)

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    def _clean_environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return kept | self.environment | {"SLURM_CONF": str(self.conf)}

    def _on(self, host: str, command: Sequence[str]) -> list[str]:
        unshare = ["unshare", "-um", "--propagation", "private", "bash", "-c", _ON_HOST, "_"]
        return [*unshare, str(self.folder), host, *command]

    def _write_files(self) -> None:
        for name in ("etc", "log", "state", "run", "munge", *(f"spool.{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for path in (self.folder, self.folder / "run"):
            path.chmod(0o755)
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        addresses = {CONTROLLER: "127.0.1.10"} | {name: f"127.0.1.{10 + i}" for i, name in enumerate(self.names, 1)}
        hosts = "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items())
        (self.folder / "hosts").write_text(hosts)
        port = _free_ports(1 + self.nodes)
        lines = [CONF.format(controller=CONTROLLER, port=port, folder=self.folder)]
        for i, name in enumerate(self.names, 1):
            lines.append(
                f"NodeName={name} NodeAddr={addresses[name]} Port={port + i} CPUs={self.processors} RealMemory=4000\n"
            )
        self.conf.write_text("".join([*lines, PARTITIONS]))
        cgroup = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"
        (self.conf.parent / "cgroup.conf").write_text(cgroup)

    def _start(self) -> None:
        munge = self.folder / "munge"
        run = self.folder / "run"
        command = ["munged", f"--key-file={munge}/munge.key", f"--socket={run}/munge.sock"]
        command += [f"--pid-file={run}/munged.pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"]
        subprocess.run(command, check=True, env=self._path())
        self._daemon(CONTROLLER, "slurmctld", "-f", str(self.conf))
        for name in self.names:
            self.start_node(name)

        def up() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).split("\n")
            return len({line.split()[0] for line in states if line.endswith(" idle")}) == self.nodes

        wait_until(up, 60)

    def start_node(self, name: str) -> None:
        """Start the slurmd of `name`."""
        self._daemon(name, "slurmd", "-N", name, "-f", str(self.conf))

    def resume_node(self, name: str) -> None:
        """Give it jobs again, if Slurm does not do so by itself once its slurmd is back; wait until it is idle."""
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        wait_until(lambda: set(self.run("sinfo", "-h", "-n", name, "-o", "%T").split()) == {"idle"}, 60)

    def kill_node(self, name: str) -> None:
        """End the slurmd of `name` as a crash of the node would; Slurm can no longer reach what runs there."""
        os.kill(int((self.folder / "run" / f"slurmd.{name}.pid").read_text()), signal.SIGKILL)

    def _daemon(self, host: str, *command: str) -> None:
        subprocess.run(self._on(host, command), check=True, env=self._clean_environment() | self._path())

    @staticmethod
    def _path() -> dict[str, str]:
        return dict(os.environ) | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}

    @staticmethod
    def _end(pid_file: Path, name: str) -> None:
        try:
            pid = int(pid_file.read_text())
        except (OSError, ValueError):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not _is_running(pid, name):
                return
            os.kill(pid, number)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not _is_running(pid, name), 10)


def wait_until(condition: Callable[[], bool], seconds: float, what: str = "") -> None:
    """Raises TimeoutError. Generous limits: they end a hang, they measure nothing."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what or "the condition did not come true")
        time.sleep(0.2)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _is_running(pid: int, name: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nothing listens on."""
    for first in range(26000, 30000, 50):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    holder = stack.enter_context(socket.socket())
                    holder.bind(("", port))
            except OSError:
                continue
            return first
    raise Missing("no free ports between 26000 and 30000")

"""An SGLang server of our own: its command line, its process, its log, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mopd.rollout_config import LaunchSpec
from megatron_mopd.yaml_config import ConfigError

SERVE = Path(__file__).with_name("serve.py")
SGLANG_VERSION = "0.5.23"
"""The release that this program is written for: what its administrative endpoints take changes between releases."""
_STOP_SECONDS = 10.0
_LOG_TAIL_BYTES = 20_000
_NOT_INHERITED = (
    "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME",
)  # fmt: skip
"""Would put our packages before the server's, have it compile itself at every start, or make its ranks join ours."""
_NOT_INHERITED_PREFIX = "TORCHELASTIC_"

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a server has to serve."""

    folder: Path
    """config.json and the tokenizer. Its weights are not read: the run sends its own."""
    dtype: str
    context: int
    """Longest prompt and response together."""
    routed_experts: bool
    """Whether answers say which experts each token was routed to."""
    colocated: bool = False
    """Whether the server shares its GPUs with the trainer, and has to be able to give their memory up."""


def server_arguments(spec: LaunchSpec, model: ServedModel, *, index: int, port: int, device: Device) -> list[str]:
    """SGLang's command line for server `index`, without the API key.

    Dummy weights: the first load of the run's own comes before the first prompt. Deterministic inference is what makes
    SGLang honour the seed of a single request. On the CPU, attention and sampling are torch's own.
    """
    arguments = [
        *("--model-path", str(model.folder.resolve()), "--load-format", "dummy", "--dtype", model.dtype),
        *("--host", spec.host, "--port", str(port), "--device", device),
        *("--tp-size", str(spec.tensor), "--ep-size", str(spec.expert)),
        *("--skip-server-warmup", "--enable-deterministic-inference", "--sleep-on-idle"),
        *("--log-level-http", "warning"),
    ]
    if model.routed_experts:
        arguments += ["--enable-return-routed-experts"]
    if device == "cuda":
        arguments += ["--base-gpu-id", str(spec.first_gpu + index * spec.tensor)]
        arguments += ["--enable-memory-saver"] if model.colocated else []
    else:
        # Without a bound SGLang would fill the machine's memory with cache: one of 64 requests of the longest kind.
        arguments += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        arguments += ["--max-total-tokens", str(64 * model.context), "--max-running-requests", "64"]
    return [*arguments, *spec.arguments]


def server_environment(device: Device, tensor: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server: ours, less what would mislead it."""
    environment = _inherited(inherited)
    if device == "cuda":
        return environment
    own = {
        "SGLANG_PLATFORM": "torch_cpu",
        # Threads that wait for each other on a few cores cost a factor of ten.
        "OMP_NUM_THREADS": "1",
        # Seeded sampling is compiled otherwise: a minute and a C++ compiler for one argmax.
        "TORCHDYNAMO_DISABLE": "1",
    }
    if tensor > 1:
        own["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(tensor))
    return environment | own


def check_environment(python: str) -> None:
    """Raise ConfigError where `python` is no interpreter with the SGLang that this program is written for."""
    key, remedy = "rollout.sglang.launch.python", "run `make sglang`, or name the interpreter of another environment"
    if not os.access(python, os.X_OK):
        raise ConfigError(f"{key}: {python} is not there or cannot be run; {remedy}")
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    found = subprocess.run(
        [os.path.abspath(python), "-P", "-c", code], capture_output=True, text=True, cwd="/", env=_inherited(os.environ)
    )
    version = found.stdout.strip()
    if found.returncode:
        raise ConfigError(f"{key}: {python} has no SGLang; {remedy}")
    if version != SGLANG_VERSION:
        raise ConfigError(f"{key}: {python} has SGLang {version}, this program needs {SGLANG_VERSION}; install that")


def _inherited(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_PREFIX)
    }


def choose_ports(spec: LaunchSpec) -> list[int]:
    """One port per server, free at this moment. Raises ConfigError where a port of the configuration is taken."""
    wanted = [0 if spec.port is None else spec.port + index for index in range(spec.servers)]
    sockets, chosen = [], []
    try:
        for port in wanted:
            holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sockets.append(holder)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                holder.bind((spec.host, port))
            except OSError as error:
                key, value = ("host", spec.host) if port == 0 else ("port", port)
                raise ConfigError(
                    f"rollout.sglang.launch.{key}: {value} cannot be listened on: {error.strerror}; choose another one"
                ) from None
            chosen.append(holder.getsockname()[1])
    finally:
        for holder in sockets:
            holder.close()
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerProcess:
    """A server that was started; `start` it again after its death: same port, new process."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls, python: str, arguments: Sequence[str], environment: Mapping[str, str], *, api_key: str, url: str, log: Path
    ) -> ServerProcess:
        """The server dies with this process, however that ends; see serve.py. Its output is added to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [os.path.abspath(python), "-P", str(SERVE)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Not the repository: SGLang imports a package `kernels` of Hugging Face's, and we have one too.
                cwd=tempfile.gettempdir(),
                env=dict(environment),
                start_new_session=True,
            )
        settings = {"arguments": list(arguments), "api_key": api_key, "parent": os.getpid()}
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already, which the first look at it finds out
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.close()
        return cls(url=url, log=log, process=process)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        """What its log ends with: the last line that names an error, else the last one."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.path.getsize(self.log) - _LOG_TAIL_BYTES))
                lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["nothing was logged"])[-1][:300]

    def kill(self) -> None:
        """At once, with all of its workers."""
        _signal_session(self.process, signal.SIGKILL)
        self.process.wait()


def stop_servers(servers: Sequence[ServerProcess]) -> None:
    """End them all: asked first, so that they remove their shared memory; killed after some seconds."""
    for server in servers:
        if server.is_running:
            server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    for server in servers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(max(0.0, deadline - time.monotonic()))
        server.kill()


def _signal_session(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(process.pid, number)

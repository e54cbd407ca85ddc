"""Servers of one test module, started, killed and started again as a run does it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_mopd.rollout.sglang.http import ServerConnection, ServerError
from megatron_mopd.rollout.sglang.server import (
    ServedModel,
    ServerProcess,
    choose_ports,
    server_arguments,
    server_environment,
    stop_servers,
)
from megatron_mopd.rollout_config import LaunchSpec
from megatron_mopd.student.architecture import parse_architecture
from tests import tiny

RAW = tiny.MOE | {"num_hidden_layers": 2, "num_experts": 4, "eos_token_id": 0}
ARCH = parse_architecture(RAW, "test")
"""What the servers of `pair` serve."""
API_KEY = "of-these-tests"
PYTHON = ".venv-sglang/bin/python"
START_SECONDS = 900.0


@dataclass
class Servers:
    """`tensor`: tensor-parallel ranks of each. They start with weights of SGLang's own."""

    folder: Path
    logs: Path
    count: int
    tensor: int = 1
    processes: list[ServerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._spec = LaunchSpec(servers=self.count, tensor=self.tensor, python=PYTHON, device="cpu")
        self._ports = choose_ports(self._spec)
        self.connections = [
            ServerConnection(url=f"http://127.0.0.1:{port}", api_key=API_KEY, timeout=120) for port in self._ports
        ]
        self.processes = [self._start(number) for number in range(self.count)]

    def restart(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number] = self._start(number)
        self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        for process, connection in zip(self.processes, self.connections, strict=True):
            while not _answers(connection):
                assert process.is_running, process.last_words()
                assert time.monotonic() < deadline, process.last_words()
                time.sleep(0.5)

    def _start(self, number: int) -> ServerProcess:
        model = ServedModel(folder=self.folder, dtype="float32", context=256, routed_experts=True)
        return ServerProcess.start(
            PYTHON,
            server_arguments(self._spec, model, index=number, port=self._ports[number], device="cpu"),
            server_environment("cpu", self.tensor, os.environ),
            api_key=API_KEY,
            url=self.connections[number].url,
            log=self.logs / f"server{number}.log",
        )


def _answers(connection: ServerConnection) -> bool:
    try:
        connection.get("/model_info", timeout=5)
    except ServerError:
        return False
    return True


@contextmanager
def running(folder: Path, logs: Path, count: int, tensor: int = 1) -> Iterator[Servers]:
    servers = Servers(folder, logs, count, tensor)
    try:
        servers.wait()
        yield servers
    finally:
        stop_servers(servers.processes)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two servers that the tests of weight sync share; each of those leaves them as it likes."""
    if not Path(PYTHON).exists():
        pytest.skip("no SGLang here: run `make sglang`")
    folder = tmp_path_factory.mktemp("served")
    tiny.write_model(folder / "model", RAW)
    with running(folder / "model", folder / "logs", 2) as servers:
        yield servers

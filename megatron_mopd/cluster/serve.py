"""The rollout servers of one node: `python -m megatron_mopd.cluster.serve --attempt DIR CONFIG [key.path=value ...]`.

Starts what `rollout.sglang.launch` says, on this node's address and from --port on, and watches: until the file
`rollout-stop` in the attempt's folder says that training has ended, or a server ends by itself (exit code 1).
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_mopd.config import LaunchSpec, RunConfig, load_config
from megatron_mopd.environment import gpu_count
from megatron_mopd.hub import resolve_folder
from megatron_mopd.rank_process import EXIT_CONFIG
from megatron_mopd.rollout.sglang.check import api_key, wanted
from megatron_mopd.rollout.sglang.server import (
    Device,
    ServedModel,
    ServerProcess,
    server_arguments,
    server_environment,
    stop_servers,
)
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.yaml_config import ConfigError

ROLLOUT_STOP = "rollout-stop"
_POLL_SECONDS = 0.5


def serve(config: RunConfig, attempt: Path, port: int, name: str) -> int:
    """Start this node's servers and watch them. Returns 0 when told to stop, 1 when a server ended by itself."""
    spec = config.rollout.sglang
    if spec is None or spec.launch is None:
        raise ConfigError("rollout.sglang.launch: missing; it says how many servers a node has, and how large they are")
    launch = replace(spec.launch, host=socket.gethostbyname(name), port=port)
    folder = resolve_folder(config.model.source, "model")
    needs = wanted(config, read_architecture(folder), "")
    model = ServedModel(
        folder=folder,
        dtype=needs.dtype,
        context=needs.context,
        routed_experts=needs.routed_experts,
        colocated=spec.sync.colocated,
    )
    key = api_key(spec)
    if key is None:
        raise ConfigError(
            f"rollout.sglang.api_key_variable: {spec.api_key_variable} is not set; launch/mopd.sh sets it"
        )
    servers: list[ServerProcess] = []
    try:
        for index in range(launch.servers):
            servers.append(_start(launch, model, index, key, attempt / f"rollout-{name}-{index}.log"))
        while not (attempt / ROLLOUT_STOP).exists():
            for server in servers:
                if not server.is_running:
                    print(f"mopd: the server {server.url} ended; see {server.log}", file=sys.stderr)
                    return 1
            time.sleep(_POLL_SECONDS)
    finally:
        stop_servers(servers)
    return 0


def _start(launch: LaunchSpec, model: ServedModel, index: int, key: str, log: Path) -> ServerProcess:
    device: Device = launch.device if launch.device != "auto" else ("cuda" if gpu_count() else "cpu")
    port = (launch.port or 0) + index
    return ServerProcess.start(
        launch.python,
        server_arguments(launch, model, index=index, port=port, device=device),
        server_environment(device, launch.tensor, os.environ),
        api_key=key,
        url=f"http://{launch.host}:{port}",
        log=log,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: of `serve`, or 2 after a ConfigError."""
    parser = argparse.ArgumentParser(prog="serve", description="the rollout servers of one node", allow_abbrev=False)
    parser.add_argument("--attempt", type=Path, required=True, help="folder of this attempt, on shared storage")
    parser.add_argument("--port", type=int, required=True, help="of the first server; the others take the next ones")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args(argv)
    # Slurm tells every process of a preempted job; the servers are needed until the ranks have saved.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    try:
        return serve(load_config(arguments.config, arguments.overrides), arguments.attempt, arguments.port, name)
    except ConfigError as error:
        print(f"mopd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())

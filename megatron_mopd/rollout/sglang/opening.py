"""The servers that a run's file asks for: found or started, checked, and ready for weights."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megatron_mopd.environment import gpu_count
from megatron_mopd.rollout.sglang.check import Wanted, api_key, check_server
from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sglang.pool import ServerPool
from megatron_mopd.rollout.sglang.server import (
    Device,
    ServedModel,
    ServerProcess,
    choose_ports,
    server_arguments,
    server_environment,
)
from megatron_mopd.rollout_config import LaunchSpec, SglangSpec
from megatron_mopd.yaml_config import ConfigError

Say = Callable[[str], None]
"""Takes one line for the user."""


def open_pool(spec: SglangSpec, folder: Path, wanted: Wanted, run_dir: Path, say: Say) -> ServerPool:
    """Waits until all servers answer. `folder`: config.json and the tokenizer. Raises ConfigError for a server that
    cannot be used."""
    check = partial(check_server, wanted=wanted)
    if spec.launch is None:
        connections = [ServerConnection(url=url, api_key=api_key(spec)) for url in spec.urls]
        pool = ServerPool(connections, start=None, check=check, say=say)
        pool.wait_started(0)
        return pool
    key = secrets.token_urlsafe(32)
    urls = [f"http://{spec.launch.host}:{port}" for port in choose_ports(spec.launch)]
    start = _starter(spec.launch, spec.sync.colocated, folder, wanted, urls, key, run_dir / "logs")
    pool = ServerPool([ServerConnection(url=url, api_key=key) for url in urls], start=start, check=check, say=say)
    try:
        pool.wait_started(spec.launch.start_seconds)
    except ConfigError:
        pool.close()
        raise
    return pool


def _starter(
    spec: LaunchSpec, colocated: bool, folder: Path, wanted: Wanted, urls: Sequence[str], key: str, logs: Path
) -> Callable[[int], ServerProcess]:
    device: Device = spec.device if spec.device != "auto" else ("cuda" if gpu_count() else "cpu")
    model = ServedModel(
        folder=folder,
        dtype=wanted.dtype,
        context=wanted.context,
        routed_experts=wanted.routed_experts,
        colocated=colocated,
    )
    environment = server_environment(device, spec.tensor, os.environ)

    def start(number: int) -> ServerProcess:
        port = int(urls[number].rpartition(":")[2])
        return ServerProcess.start(
            spec.python,
            server_arguments(spec, model, index=number, port=port, device=device),
            environment,
            api_key=key,
            url=urls[number],
            log=logs / f"server{number}.log",
        )

    return start

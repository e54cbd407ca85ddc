"""`RolloutEngine` over SGLang servers, in a program that runs on many ranks: the first one talks, all get their own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.environment import gpu_count
from megatron_mopd.parallel.runtime import World
from megatron_mopd.preflight import Inputs
from megatron_mopd.rollout.engine import RolloutFailure, Sampling
from megatron_mopd.rollout.sglang.check import Wanted, api_key, check_server, make_run_id, wanted
from megatron_mopd.rollout.sglang.client import Limits, Request, generate_all
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerError
from megatron_mopd.rollout.sglang.pool import ServerPool
from megatron_mopd.rollout.sglang.protocol import Contract, read_answer, request_body
from megatron_mopd.rollout.sglang.server import (
    Device,
    ServedModel,
    ServerProcess,
    choose_ports,
    server_arguments,
    server_environment,
)
from megatron_mopd.rollout.sync.push import ServerSync, make_sync, sync_weights
from megatron_mopd.rollout_config import LaunchSpec, SglangSpec
from megatron_mopd.types import Prompt, Rollout
from megatron_mopd.yaml_config import ConfigError

Say = Callable[[str], None]


class SglangEngine:
    """Collective: every rank calls `generate` and `load_weights` at the same time."""

    def __init__(self, config: RunConfig, inputs: Inputs, world: World, say: Say | None = None) -> None:
        """Starts the servers, or finds them, and waits until all are ready. `say` takes a line for the user: print.

        Raises ConfigError on every rank for a server that cannot be used.
        """
        spec = config.rollout.sglang
        assert spec is not None
        say = say or partial(print, flush=True)
        self._world = world
        self._limits = Limits(concurrency=spec.concurrency, answer_seconds=spec.answer_seconds, retries=spec.retries)
        folder = Path(config.run_dir)
        self._run_id = world.on_main(lambda: make_run_id(folder)) or ""
        self._wanted = wanted(config, inputs.arch, self._run_id)
        self._stop_ids = inputs.tokenizer.stop_ids
        self._version: int | None = None
        self._pool = world.on_main(lambda: _open_pool(spec, inputs.model_folder, self._wanted, folder, say))
        self.sync_metrics: dict[str, float] = {}
        """Of the last `load_weights`: what was sent, and to how many servers."""
        self._sync: ServerSync | None = None
        if world.is_main:
            dtype = getattr(torch, config.model.dtype)
            self._sync = make_sync(
                spec.sync, inputs.arch, dtype, run_id=self._run_id, run_dir=folder, device=world.device
            )

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """See `RolloutEngine.generate`; the prompts of all ranks are answered together. Collective.

        Raises RolloutFailure on every rank when no server is left, or one answers what it should not.
        """
        if self._version is None:
            raise ValueError("the rollout engine has no weights; call load_weights first")
        if samples < 1:
            raise ValueError(f"samples: must be >= 1, got {samples}")
        asked: list[list[Prompt]] = self._world.all_gather_objects([_stripped(prompt) for prompt in prompts])
        parts: list[list[Rollout]] | None = None
        problem: Exception | None = None
        if self._pool is not None:
            try:
                parts = self._answer(self._pool, asked, samples, sampling, seed)
            except (RolloutFailure, ValueError) as error:
                problem = error
            except ServerError as error:
                problem = RolloutFailure(f"rollout.sglang: {error}")
        problem = self._world.all_gather_objects(problem)[0]
        if problem is not None:
            raise problem
        own = self._world.scatter_objects(parts)
        return [replace(rollout, prompt=prompts[index // samples]) for index, rollout in enumerate(own)]

    def _answer(
        self, pool: ServerPool, asked: Sequence[Sequence[Prompt]], samples: int, sampling: Sampling, seed: int
    ) -> list[list[Rollout]]:
        """The rollouts of every rank's prompts."""
        contract = self._contract()
        for prompt in (prompt for part in asked for prompt in part):
            _check(prompt, self._wanted)
        requests = [
            Request(
                body=request_body(prompt, sample, sampling, seed, contract),
                read=partial(_read, prompt, sample, contract),
            )
            for part in asked
            for prompt in part
            for sample in range(samples)
        ]
        rollouts = iter(generate_all(pool, requests, self._limits))
        return [[next(rollouts) for _ in range(len(part) * samples)] for part in asked]

    def _contract(self) -> Contract:
        arch, wanted = self._wanted.arch, self._wanted
        assert self._version is not None
        return Contract(
            run_id=self._run_id,
            policy_version=self._version,
            vocab_size=arch.vocab_size,
            stop_ids=self._stop_ids,
            experts=(arch.num_layers, arch.experts_per_token, arch.num_experts) if wanted.routed_experts else None,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.load_weights`. Collective.

        Servers that came back since the last time get them too. One that fails is taken out; that none is left is for
        `generate` to say, so that what has been learnt can be saved. Raises ConfigError on every rank where the weights
        cannot be written (`sync.kind: disk`).
        """
        servers = self._pool.ready_for_weights() if self._pool is not None else []
        self.sync_metrics = {}
        if self._world.any(bool(servers)):
            report = sync_weights(weights, version, self._world, self._sync, servers)
            self.sync_metrics = report.metrics
            if self._pool is not None:
                self._pool.weights_sent(report.synced, report.failed)
        self._version = version

    def rest(self) -> None:
        """See `RolloutEngine.rest`: servers on the trainer's devices (`sync.colocated`) give their memory up."""
        if self._sync is not None and self._pool is not None:
            self._pool.weights_sent((), self._sync.release([member.connection for member in self._pool.live]))

    @property
    def connections(self) -> list[ServerConnection]:
        """Of the live servers; none on other ranks than the first."""
        return [member.connection for member in self._pool.live] if self._pool is not None else []

    def close(self) -> None:
        """Stop the servers that were started; give those that were found back."""
        if self._sync is not None:
            self._sync.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _read(prompt: Prompt, sample: int, contract: Contract, url: str, answer: object) -> Rollout:
    return read_answer(url, answer, prompt, sample, contract)


def _stripped(prompt: Prompt) -> Prompt:
    """What the first rank has to know of another one's prompt."""
    return replace(prompt, answer="", record={}, question="")


def _check(prompt: Prompt, wanted: Wanted) -> None:
    arch, length, response = wanted.arch, len(prompt.token_ids), prompt.max_response_tokens
    if length == 0:
        raise ValueError(f"prompt {prompt.id}: has no tokens")
    if response < 1:
        raise ValueError(f"prompt {prompt.id}: max_response_tokens must be >= 1, got {response}")
    if length + response > arch.max_positions:
        raise ValueError(
            f"prompt {prompt.id}: {length} tokens and a response of up to {response} do not fit "
            f"the model's {arch.max_positions} positions"
        )


def _open_pool(spec: SglangSpec, folder: Path, wanted: Wanted, run_dir: Path, say: Say) -> ServerPool:
    check = partial(check_server, wanted=wanted)
    if spec.launch is None:
        connections = [ServerConnection(url=url, api_key=api_key(spec)) for url in spec.urls]
        pool = ServerPool(connections, start=None, check=check, say=say)
        pool.wait_started(0)
        return pool
    key = secrets.token_urlsafe(32)
    urls = [f"http://{spec.launch.host}:{port}" for port in choose_ports(spec.launch)]
    start = _starter(spec.launch, folder, wanted, urls, key, run_dir / "logs")
    pool = ServerPool([ServerConnection(url=url, api_key=key) for url in urls], start=start, check=check, say=say)
    try:
        pool.wait_started(spec.launch.start_seconds)
    except ConfigError:
        pool.close()
        raise
    return pool


def _starter(
    spec: LaunchSpec, folder: Path, wanted: Wanted, urls: Sequence[str], key: str, logs: Path
) -> Callable[[int], ServerProcess]:
    device: Device = spec.device if spec.device != "auto" else ("cuda" if gpu_count() else "cpu")
    model = ServedModel(folder=folder, dtype=wanted.dtype, context=wanted.context, routed_experts=wanted.routed_experts)
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

"""The trainer's half of the tests: a rank with a Megatron student and the engine that sends its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.packing import pack
from megatron_mopd.parallel import cpu
from megatron_mopd.rollout_config import LaunchSpec
from megatron_mopd.types import ExpertArray, Prompt, Rollout
from megatron_mopd.yaml_config import build
from tests.e2e.conftest import run_tree
from tests.sglang.conftest import PYTHON

cpu.install()

from megatron_mopd.parallel.runtime import start_world, stop_world  # noqa: E402
from megatron_mopd.preflight import resolve_inputs  # noqa: E402
from megatron_mopd.rollout.sglang.engine import SglangEngine  # noqa: E402
from megatron_mopd.rollout.sglang.http import ServerConnection  # noqa: E402
from megatron_mopd.rollout.sglang.pool import ServerPool  # noqa: E402
from megatron_mopd.rollout.sglang.server import (  # noqa: E402
    ServedModel,
    ServerProcess,
    choose_ports,
    server_arguments,
    server_environment,
)
from megatron_mopd.student.model import build_model, output_weight  # noqa: E402
from megatron_mopd.student.step import hidden_rows, run_schedule  # noqa: E402
from megatron_mopd.student.weight_stream import HFWeights  # noqa: E402
from megatron_mopd.student.weights import load_hf  # noqa: E402


def run_file(models: Path, run_dir: Path, **sglang: object) -> dict:
    """The run of tests/e2e with servers; `launch` without an interpreter gets that of `make sglang`."""
    if isinstance(launch := sglang.get("launch"), dict):
        launch.setdefault("python", str(PYTHON))
    return run_tree(models, run_dir) | {"rollout": {"engine": "sglang", "routing_replay": "R3", "sglang": sglang}}


def run_config(models: Path, run_dir: Path, **sglang: object) -> RunConfig:
    return build(RunConfig, run_file(models, run_dir, **sglang))


@contextmanager
def running(folder: Path, logs: Path, api_key: str) -> Iterator[str]:
    """One server that no run has started; yields its URL."""
    spec = LaunchSpec(python=str(PYTHON), device="cpu")
    (port,) = choose_ports(spec)
    url = f"http://127.0.0.1:{port}"
    model = ServedModel(folder=folder, dtype="float32", context=64, routed_experts=True)
    server = ServerProcess.start(
        spec.python,
        server_arguments(spec, model, index=0, port=port, device="cpu"),
        server_environment("cpu", 1, os.environ),
        api_key=api_key,
        url=url,
        log=logs / "found.log",
    )
    pool = ServerPool(
        [ServerConnection(url=url, api_key=api_key)], start=lambda number: server, check=lambda c: None, say=print
    )
    try:
        pool.wait_started(spec.start_seconds)
        yield url
    finally:
        pool.close()


class Trainer:
    """One rank of a run as far as rollouts are concerned. `said` collects what the user would read."""

    def __init__(self, config: RunConfig) -> None:
        self.world = start_world(config.parallel, config.seed)
        self.inputs = resolve_inputs(config)
        assert self.inputs.weights is not None
        self.model = build_model(self.inputs.arch, config.parallel, self.world, torch.float32, training=False)
        load_hf(self.model, self.inputs.arch, self.inputs.weights, self.world)
        self.said: list[str] = []
        self.engine = SglangEngine(config, self.inputs, self.world, self.said.append)

    def send(self, version: int) -> None:
        self.engine.load_weights(HFWeights(self.model, self.inputs.arch, self.world), version)

    @torch.no_grad()
    def change(self) -> None:
        """Other weights, as after an update."""
        for parameter in self.model.parameters():
            parameter.mul_(1.05)

    def close(self) -> None:
        self.engine.close()
        stop_world()

    def view(self, rollouts: Sequence[Rollout]) -> tuple[list[Tensor], list[ExpertArray]]:
        """Per rollout, what the student says: [response, V] logits, and [T, layers, k] experts, sorted."""
        batch = pack(
            rollouts, None, domain_names=("a",), aggregation="token", multiple_of=1, device=torch.device("cpu")
        )
        maps: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
            for name, module in self.model.named_modules()
            if name.endswith("mlp.router")
        ]
        with torch.no_grad():
            (logits,) = run_schedule(
                self.model,
                [batch],
                lambda batch, hidden: hidden_rows(hidden, batch, self.world) @ output_weight(self.model).T,
                backward=False,
            )
        for hook in hooks:
            hook.remove()
        experts = np.stack([m.nonzero()[:, 1].view(len(m), -1).numpy() for m in maps], axis=1).astype(np.int16)
        lengths = [int(rollout.loss_mask.sum()) for rollout in rollouts]
        bounds = batch.cu_seqlens.tolist()
        return list(logits[:, : self.inputs.arch.vocab_size].split(lengths)), [
            experts[a:b] for a, b in pairwise(bounds)
        ]


def prompts(count: int, response: int, vocab_size: int = 114) -> list[Prompt]:
    """Random ones of 3 to 20 tokens, none of which ends a response."""
    rng = np.random.default_rng(3)
    return [
        Prompt(
            id=f"a/{number}",
            domain="a",
            token_ids=rng.integers(4, vocab_size, rng.integers(3, 21)),
            answer="",
            max_response_tokens=response,
        )
        for number in range(count)
    ]


def response_logprobs(rollouts: Sequence[Rollout], logits: Sequence[Tensor], temperature: float) -> np.ndarray:
    """[all response tokens] log softmax(logits / temperature) of the sampled tokens."""
    parts = [
        (rows / temperature).log_softmax(-1).gather(1, torch.from_numpy(rollout.response_ids)[:, None]).squeeze(1)
        for rollout, rows in zip(rollouts, logits, strict=True)
    ]
    return torch.cat(parts).numpy()


def served_logprobs(rollouts: Sequence[Rollout]) -> np.ndarray:
    return np.concatenate([rollout.rollout_logprobs[rollout.loss_mask] for rollout in rollouts])

"""What the rollout engine says: the log-probs that it reports as it samples, and those of the same tokens re-scored."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.audit.views import View, merged, padded
from megatron_mopd.config import RunConfig
from megatron_mopd.parallel.runtime import World
from megatron_mopd.preflight import Inputs
from megatron_mopd.rollout.decoder import Decoder
from megatron_mopd.rollout.engine import RolloutFailure, Sampling
from megatron_mopd.rollout.in_process import InProcessEngine
from megatron_mopd.rollout.load import make_engine
from megatron_mopd.rollout.sglang.engine import SglangEngine
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerError
from megatron_mopd.types import ExpertArray, FloatArray, Prompt, Rollout

Engine = InProcessEngine | SglangEngine
OpenEngine = Callable[[RunConfig, Inputs, World], Engine]
_SCORE_SECONDS = 1800.0


def open_engine(config: RunConfig, inputs: Inputs, world: World) -> Engine:
    """The engine that a run of `config` has, without weights yet. Collective."""
    if config.rollout.engine == "sglang":
        return SglangEngine(config, inputs, world)
    return make_engine(config, inputs.arch, inputs.tokenizer, world.device)


def close_engine(engine: Engine) -> None:
    if isinstance(engine, SglangEngine):
        engine.close()


def sample(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, seed: int, world: World) -> list[Rollout]:
    """One rollout per prompt, in order, on every rank. Collective."""
    own = range(world.rank, len(prompts), world.size)
    rollouts = engine.generate([prompts[index] for index in own], samples=1, sampling=sampling, seed=seed)
    return merged(dict(zip(own, rollouts, strict=True)), world)


def reported_view(rollouts: Sequence[Rollout]) -> View:
    """At the temperature that was sampled at, of the sampled tokens alone."""
    logprobs = [np.where(r.loss_mask, r.rollout_logprobs, np.nan).astype(np.float32) for r in rollouts]
    experts = [rollout.routed_experts for rollout in rollouts if rollout.routed_experts is not None]
    return View(logprobs=logprobs, experts=experts or None)


def rescored_view(engine: Engine, rollouts: Sequence[Rollout], world: World) -> View:
    """At temperature 1, of all tokens, on every rank. Collective."""
    if isinstance(engine, SglangEngine):
        scored = _on_servers(engine, rollouts, world)
    else:
        own = range(world.rank, len(rollouts), world.size)
        scored = merged({index: _decoded(engine.decoder, rollouts[index]) for index in own}, world)
    experts = [found for _, found in scored if found is not None]
    return View(logprobs=[logprobs for logprobs, _ in scored], experts=experts or None)


Scored = tuple[FloatArray, ExpertArray | None]


@torch.inference_mode()
def _decoded(decoder: Decoder, rollout: Rollout) -> Scored:
    """Token by token, as the engine decodes, but with the tokens given: ([T] log-probs, [T, layers, k] experts)."""
    ids = torch.from_numpy(rollout.token_ids).to(decoder.device)
    routed: list[Tensor] = []
    decoder.on_routing = routed.append
    try:
        logits, cache = decoder.prefill([rollout.token_ids[:1]], [1], capacity=len(ids))
        logprobs = []
        for token in ids[1:]:
            logprobs.append(logits[0].log_softmax(-1)[token])
            logits = decoder.decode(token[None], cache)
    finally:
        decoder.on_routing = None
    values = padded(torch.stack(logprobs).cpu().numpy(), len(ids))
    if not routed:
        return values, None
    experts = torch.cat(routed).view(len(ids), decoder.arch.num_layers, -1)
    return values, experts.cpu().numpy().astype(np.int16)


def _on_servers(engine: SglangEngine, rollouts: Sequence[Rollout], world: World) -> list[Scored]:
    """By requests that generate one token more and want the log-probs of all others; every server gets some."""
    scored: list[Scored] = []
    problem: RolloutFailure | None = None
    if engine.connections:
        try:
            scored = _scored(engine.connections, rollouts, rollouts[0].routed_experts is not None)
        except ServerError as error:
            problem = RolloutFailure(f"rollout.sglang: {error}")
    problem = world.all_gather_objects(problem)[0]
    if problem is not None:
        raise problem
    return merged(dict(enumerate(scored)), world)


def _scored(servers: Sequence[ServerConnection], rollouts: Sequence[Rollout], wants_experts: bool) -> list[Scored]:
    found: dict[int, Scored] = {}
    for number, server in enumerate(servers):
        own = range(number, len(rollouts), len(servers))
        body = {
            "input_ids": [rollouts[index].token_ids.tolist() for index in own],
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 1, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
            "return_routed_experts": wants_experts,
        }
        answers = server.post("/generate", body, timeout=_SCORE_SECONDS) if own else []
        for index, answer in zip(own, answers, strict=True):
            found[index] = _read(server.url, answer, rollouts[index], wants_experts)
    return [found[index] for index in range(len(rollouts))]


def _read(url: str, answer: Any, rollout: Rollout, wants_experts: bool) -> Scored:
    length = len(rollout.token_ids)
    entries = answer["meta_info"]["input_token_logprobs"]
    ids = np.array([entry[1] for entry in entries])
    # SGLang 0.5.23 scores the vocabulary's last token right but calls it 0 (`_process_input_token_logprobs`).
    if len(ids) != length or ((ids != rollout.token_ids) & (ids != 0)).any():
        raise ServerError(url, f"prompt {rollout.prompt.id}: it re-scored other tokens than it was given")
    logprobs = padded([entry[0] for entry in entries[1:]], length)
    if not wants_experts:
        return logprobs, None
    # One row a token that was an input: all of them, the new token being none.
    flat = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), dtype=np.int32)
    assert rollout.routed_experts is not None
    return logprobs, flat.reshape(length, *rollout.routed_experts.shape[1:]).astype(np.int16)

"""Seconds of generation by ceilings: reading weights and cache, and FLOPs, whichever is slower, token by token."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.compute import forward_flops, product_flops
from megatron_mopd.plan.count import ModelCount
from megatron_mopd.plan.memory import Setting
from megatron_mopd.plan.rollout_memory import cache_bytes_per_token, server_memory
from megatron_mopd.plan.workload import Workload
from megatron_mopd.rollout.decoder import _DENSE_MOE_WORK as DENSE_MOE_WORK

SIGMA = 0.6
"""Assumed spread of the logarithm of answer lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One copy of the student that answers."""

    count: ModelCount
    itemsize: int
    gpus: int
    """That hold the copy."""
    sequences: int
    """Decoded together at most."""
    refills: bool
    """Whether a finished sequence's place is taken by the next one at once (servers), or all wait for the longest."""
    copies: int
    flops_per_second: float
    """Of one GPU."""
    bytes_per_second: float

    def token_seconds(self, active: int, cached: float) -> float:
        """The next token of `active` sequences that have `cached` tokens behind them, all together."""
        arch = self.count.arch
        share = 1.0
        if arch.is_moe and (self.refills or active * arch.num_experts > DENSE_MOE_WORK):
            # Expected share of the experts that some sequence is routed to, routing at random.
            share = 1 - (1 - arch.experts_per_token / arch.num_experts) ** active
        read = self.count.parameters - self.count.embedding - (1 - share) * self.count.experts
        head = 0 if self.count.head else self.count.embedding
        moved = (read + head) * self.itemsize + cached * cache_bytes_per_token(arch, self.itemsize)
        flops = forward_flops(self.count, active, cached) + product_flops(self.count, active)
        return max(moved / self.bytes_per_second, flops / self.flops_per_second) / self.gpus

    def prefill_seconds(self, prompt: float) -> float:
        return forward_flops(self.count, prompt, prompt**2 / 2) / (self.gpus * self.flops_per_second)


def engine_of(setting: Setting, cluster: ClusterSpec, efficiency: float = 1.0) -> Engine | None:
    """The engines of a run by their ceilings (times `efficiency`); None where there are none, or no ceilings."""
    ceilings, dtype = cluster.ceilings, setting.config.model.dtype
    if not setting.config.generates or not ceilings.hbm_gb_s:
        return None
    rates = {
        "flops_per_second": efficiency * cluster.tflops(dtype) * 1e12,
        "bytes_per_second": efficiency * ceilings.hbm_gb_s * 1e9,
    }
    if setting.engine_here:
        return Engine(
            count=setting.count,
            itemsize=setting.itemsize,
            gpus=1,
            sequences=setting.config.rollout.batch_size,
            refills=False,
            copies=setting.ranks,
            **rates,
        )
    if not cluster.rollout_gpus:
        return None
    room = server_memory(
        setting.count, setting.workload, cluster.rollout_tensor, 1e9 * (cluster.memory_gb or 0), setting.itemsize
    )
    if room.sequences < 1:
        return None
    return Engine(
        count=setting.count,
        itemsize=setting.itemsize,
        gpus=cluster.rollout_tensor,
        sequences=int(room.sequences),
        refills=True,
        copies=cluster.rollout_gpus // cluster.rollout_tensor,
        **rates,
    )


def answer_lengths(workload: Workload, seed: int) -> list[tuple[float, int]]:
    """(prompt tokens, answer tokens) of a step's answers, shuffled: log-normal with the domain's mean, cut at its
    longest."""
    rng = np.random.default_rng(seed)
    answers: list[tuple[float, int]] = []
    for domain in workload.domains:
        drawn = rng.lognormal(np.log(domain.response) - SIGMA**2 / 2, SIGMA, domain.rollouts)
        lengths = np.clip(np.ceil(drawn), 1, domain.longest_response).astype(int)
        answers += [(domain.prompt, int(length)) for length in lengths]
    rng.shuffle(answers)
    return answers


def generation_seconds(engine: Engine, answers: Sequence[tuple[float, int]]) -> float:
    """Until the last of all copies is done; answers are dealt out in turn."""
    shares = [answers[copy :: engine.copies] for copy in range(min(engine.copies, len(answers)))]
    return max(copy_seconds(engine, share) for share in shares)


def copy_seconds(engine: Engine, answers: Sequence[tuple[float, int]]) -> float:
    """One copy's answers, from event to event (a sequence ends), each span at its mean cache."""
    waiting = list(reversed(answers))
    running: list[tuple[int, float]] = []  # (token at which it ends, prompt tokens less the token it began at)
    seconds, now = 0.0, 0
    while waiting or running:
        if waiting and (engine.refills or not running):
            while waiting and len(running) < engine.sequences:
                prompt, length = waiting.pop()
                heapq.heappush(running, (now + length, prompt - now))
                seconds += engine.prefill_seconds(prompt)
        span = running[0][0] - now
        cached = sum(offset for _, offset in running) + len(running) * (now + span / 2)
        seconds += span * engine.token_seconds(len(running), cached)
        now += span
        while running and running[0][0] == now:
            heapq.heappop(running)
    return seconds

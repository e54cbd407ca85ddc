"""Rollouts -> packed micro-batches, and the one shift from "token t" to "the position that predicts token t".

Which rollouts go together is decided here for all data-parallel ranks at once, from host-side integers that every
rank has, so that all ranks make the same plan without talking. Guaranteed (and tested):
  * every rollout is in exactly one micro-batch of one data-parallel rank;
  * a micro-batch holds rollouts of one teacher only, so that teacher and student see the very same packing and
    `student == teacher` gives log-probs that are equal bit for bit;
  * every data-parallel rank has the same number of micro-batches, with the same teachers in the same order (ranks
    that run out get an empty one): expert- and pipeline-parallel collectives never wait for a missing partner;
  * at most `max_tokens` tokens in a micro-batch, except a single longer rollout.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_mopd.config import RunConfig
from megatron_mopd.token_layout import TokenLayout, padded_length
from megatron_mopd.types import MicroBatch, Rollout, to_device
from megatron_mopd.yaml_config import ConfigError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One micro-batch position of the step, for all data-parallel ranks."""

    teacher: str | None
    members: tuple[tuple[int, ...], ...]
    """[data parallel] indices into the step's rollouts."""


def plan_microbatches(
    lengths: Sequence[int], teachers: Sequence[str | None], order: Sequence[str | None], ranks: int, max_tokens: int
) -> list[BatchPlan]:
    """Spread rollouts of `lengths` tokens, routed to `teachers`, evenly over `ranks` data-parallel ranks.

    `order` is the sequence in which teachers are visited; it is the same on every rank by construction.
    """
    plans = []
    for teacher in order:
        own = [index for index, name in enumerate(teachers) if name == teacher]
        if not own:
            continue
        bins = _fill_bins(own, lengths, ranks, max_tokens)
        for first in range(0, len(bins), ranks):
            plans.append(BatchPlan(teacher, tuple(tuple(sorted(b)) for b in bins[first : first + ranks])))
    return plans


def _fill_bins(own: list[int], lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[int]]:
    """A multiple of `ranks` bins, longest rollout first into the emptiest bin, as few as hold `max_tokens` each."""
    longest_first = sorted(own, key=lambda index: (-lengths[index], index))
    per_rank = max(1, -(-sum(lengths[index] for index in own) // (ranks * max_tokens)))
    while True:
        count = per_rank * ranks
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, b) for b in range(count)]
        for index in longest_first:
            load, b = heapq.heappop(loads)
            bins[b].append(index)
            heapq.heappush(loads, (load + lengths[index], b))
        if all(load <= max_tokens or len(bins[b]) == 1 for load, b in loads):
            return bins
        per_rank += 1


def pack(
    rollouts: Sequence[Rollout],
    teacher: str | None,
    *,
    domain_names: Sequence[str],
    aggregation: Literal["sequence", "token"],
    multiple_of: int,
    device: torch.device,
    with_experts: bool = False,
    context_ranks: int = 1,
    context_rank: int = 0,
) -> MicroBatch:
    """Lay rollouts end to end. A dummy sequence pads S to a multiple of `multiple_of` (sequence parallelism).

    The context ranks share one micro-batch: each gets the tokens that it holds (`token_layout.py`) and the rows that
    these predict, of which every row has one. The units are counted on the first of them.

    `with_experts` also lays out the rollouts' `routed_experts`, which all of them must have.
    """
    layout = TokenLayout.of(
        [len(rollout.token_ids) for rollout in rollouts],
        multiple_of=multiple_of,
        context_ranks=context_ranks,
        context_rank=context_rank,
    )
    # Token t is predicted from the hidden state one position earlier, which another context rank may hold.
    predicting = [
        start + np.flatnonzero(rollout.loss_mask) - 1 for start, rollout in zip(layout.starts, rollouts, strict=False)
    ]
    rows, kept = layout.rows(np.concatenate([*predicting, np.zeros(0, np.int64)]))
    counts = [len(r) for r in predicting]
    units = len(rollouts) if aggregation == "sequence" else sum(counts)
    per_row = [1.0 / count if aggregation == "sequence" else 1.0 for count in counts]

    def of_rollouts(values: Sequence[float] | Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """One value a rollout -> [R]"""
        return to_device(np.repeat(np.asarray(values, np.float64), counts)[kept], device, dtype)

    def of_tokens(values: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        """[trained tokens] of each rollout -> [R]"""
        return to_device(np.concatenate([*values, np.zeros(0, np.int64)])[kept], device, dtype)

    return MicroBatch(
        teacher=teacher,
        token_ids=to_device(layout.tokens([rollout.token_ids for rollout in rollouts]), device, torch.int64),
        position_ids=to_device(layout.positions(), device, torch.int64),
        cu_seqlens=to_device(layout.starts, device, torch.int32),
        max_seqlen=layout.longest,
        rows=to_device(rows, device, torch.int64),
        targets=of_tokens([rollout.response_ids for rollout in rollouts], torch.int64),
        weights=of_rollouts(per_row, torch.float32),
        num_units=units if context_rank == 0 else 0,
        rollout_logprobs=of_tokens([r.rollout_logprobs[r.loss_mask] for r in rollouts], torch.float32),
        outcome_advantages=of_rollouts([r.outcome_advantage for r in rollouts], torch.float32),
        domain_index=of_rollouts([domain_names.index(r.domain) for r in rollouts], torch.int64),
        sequence_index=of_rollouts(range(len(rollouts)), torch.int64),
        token_domain=to_device(
            layout.tokens(
                [np.full(len(r.token_ids), domain_names.index(r.domain)) for r in rollouts], padding=len(domain_names)
            ),
            device,
            torch.int64,
        ),
        routed_experts=_lay_out_experts(rollouts, layout) if with_experts and rollouts else None,
    )


def _lay_out_experts(rollouts: Sequence[Rollout], layout: TokenLayout) -> torch.Tensor:
    """[S / C, MoE layers, k] int16; -1 for the padding."""
    parts = []
    for rollout in rollouts:
        if rollout.routed_experts is None:
            raise ValueError(f"rollout of {rollout.prompt.id}: its experts are on rank {rollout.experts_on}, not here")
        parts.append(rollout.routed_experts)
    return torch.from_numpy(layout.tokens(parts, np.int16, padding=-1))


def plan_step(
    rollouts: Sequence[Rollout], config: RunConfig, *, data_ranks: int, context_ranks: int = 1
) -> list[BatchPlan]:
    """Who trains on which of the rollouts; teachers in the order of the configuration."""
    return plan_microbatches(
        [padded_length(len(rollout.token_ids), context_ranks) for rollout in rollouts],
        [config.domains[rollout.domain].teacher for rollout in rollouts],
        order=tuple(config.teachers) or (None,),
        ranks=data_ranks,
        max_tokens=config.optim.max_tokens_per_microbatch,
    )


def pack_step(
    rollouts: Sequence[Rollout],
    config: RunConfig,
    *,
    data_rank: int,
    data_ranks: int,
    multiple_of: int,
    device: torch.device,
    context_ranks: int = 1,
    context_rank: int = 0,
) -> list[MicroBatch]:
    """All micro-batches of one data-parallel rank; teachers in the order of the configuration.

    Raises ConfigError on every rank for a rollout without the experts that `rollout.routing_replay` is to replay.
    """
    with_experts = config.rollout.routing_replay == "R3"
    without = [r.prompt.id for r in rollouts if with_experts and r.routed_experts is None and r.experts_on is None]
    if without:
        raise ConfigError(
            f"rollout.routing_replay: R3, but {len(without)} of {len(rollouts)} rollouts came without routed experts "
            f"({without[0]} first); use servers that report them, or set it to off"
        )
    plans = plan_step(rollouts, config, data_ranks=data_ranks, context_ranks=context_ranks)
    return [
        pack(
            [rollouts[index] for index in plan.members[data_rank]],
            plan.teacher,
            domain_names=config.domain_names,
            aggregation=config.objective.aggregation,
            multiple_of=multiple_of,
            device=device,
            with_experts=with_experts,
            context_ranks=context_ranks,
            context_rank=context_rank,
        )
        for plan in plans
    ]

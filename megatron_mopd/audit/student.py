"""What the Megatron student says: log-probs at any temperature, and per layer its routing and hidden states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import token_logprob
from megatron_mopd.audit.setting import TEACHER
from megatron_mopd.audit.views import View, merged, padded
from megatron_mopd.config import RunConfig
from megatron_mopd.packing import BatchPlan, pack, plan_microbatches
from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.model import build_model, output_weight
from megatron_mopd.student.step import hidden_rows, run_schedule, vocab_shard
from megatron_mopd.student.watched import watched
from megatron_mopd.student.weight_stream import HFWeights
from megatron_mopd.student.weights import load_hf
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.types import FloatArray, MicroBatch, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """All tokens but the first of every sequence as rows of this data-parallel rank's micro-batches."""

    members: list[tuple[int, ...]]
    """Of each micro-batch: which sequences, in the order in which they lie in it."""
    batches: list[MicroBatch]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], config: RunConfig, world: World) -> Packed:
        scored = [replace(r, loss_mask=np.arange(len(r.token_ids)) > 0, routed_experts=None) for r in rollouts]
        plans: list[BatchPlan] = plan_microbatches(
            [len(rollout.token_ids) for rollout in scored],
            [TEACHER] * len(scored),
            order=(TEACHER,),
            ranks=world.data.size,
            max_tokens=config.optim.max_tokens_per_microbatch,
        )
        members = [plan.members[world.data.rank] for plan in plans]
        batches = [
            pack(
                [scored[index] for index in own],
                TEACHER,
                domain_names=config.domain_names,
                aggregation="token",
                multiple_of=world.tensor.size * config.model.tokens_multiple,
                device=world.device,
            )
            for own in members
        ]
        return cls(members=members, batches=batches)

    def per_sequence(self, rows: Sequence[Tensor]) -> dict[int, FloatArray]:
        """sequence -> [T] from the rows of every micro-batch."""
        found = {}
        for own, batch, values in zip(self.members, self.batches, rows, strict=True):
            lengths = np.diff(batch.cu_seqlens.cpu().numpy())[: len(own)]
            parts = values.float().cpu().split([int(length) - 1 for length in lengths])
            for index, length, part in zip(own, lengths, parts, strict=True):
                found[index] = padded(part.numpy(), int(length))
        return found

    def per_token(self, packed: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        """sequence -> [T, ...] from arrays [S, ...] of every micro-batch."""
        found: dict[int, np.ndarray] = {}
        for own, batch, values in zip(self.members, self.batches, packed, strict=True):
            bounds = pairwise(batch.cu_seqlens.tolist())
            found |= {index: values[start:end] for index, (start, end) in zip(own, bounds, strict=False)}
        return found


class AuditedStudent:
    """The student as a run has it, without an optimizer."""

    def __init__(self, config: RunConfig, arch: Architecture, folder: Path, world: World) -> None:
        self._arch, self._world = arch, world
        dtype = getattr(torch, config.model.dtype)
        self.model = build_model(arch, config.parallel, world, dtype, training=True, spec=config.model)
        load_hf(self.model, arch, folder, world)
        self.model.eval()

    def weights(self) -> HFWeights:
        return HFWeights(self.model, self._arch, self._world)

    @torch.no_grad()
    def look(self, packed: Packed, *, hidden: bool) -> Look:
        """One pass over everything. Collective."""
        with watched(self.model, self._world, hidden) as seen:
            rows = run_schedule(
                self.model,
                packed.batches,
                lambda batch, states: hidden_rows(states, batch, self._world).clone(),
                backward=False,
            )
        return Look(packed, rows, seen, self.model, self._arch, self._world)


@dataclass(frozen=True, slots=True)
class Look:
    """What a pass left behind on this rank."""

    packed: Packed
    rows: list[Tensor]
    """Of every micro-batch [R, H] on the last stage, else empty."""
    seen: dict[tuple[str, int], list[np.ndarray]]
    """(what, layer) -> of every micro-batch [S, ...], for the layers of this stage."""
    model: torch.nn.Module
    arch: Architecture
    world: World

    @torch.no_grad()
    def logprobs(self, temperature: float = 1.0) -> list[FloatArray]:
        """Of every sequence [T], equal on every rank. Collective. At temperature 1 what the bank computes, bit for
        bit, where the weights are the same."""
        if not self.rows:
            return merged({}, self.world)
        shard, weight = vocab_shard(self.model, self.arch.vocab_size, self.world), output_weight(self.model)
        found = [
            token_logprob(rows, weight, batch.targets, shard=shard, temperature=temperature).logprob
            for rows, batch in zip(self.rows, self.packed.batches, strict=True)
        ]
        return merged(self.packed.per_sequence(found) if self.world.tensor.rank == 0 else {}, self.world)

    def view(self) -> View:
        """At temperature 1, equal on every rank. Collective."""
        routed, margins, hidden = (self._layers(what) for what in ("experts", "margin", "hidden"))
        experts = None if routed is None else [chosen.astype(np.int16) for chosen in routed]
        return View(logprobs=self.logprobs(), experts=experts, margins=margins, hidden=hidden)

    def _layers(self, what: str) -> list[Any] | None:
        """Of every sequence [T, layers, ...], from the stages that have them."""
        own = {
            (layer, index): values
            for (name, layer), packed in self.seen.items()
            if name == what and self.world.tensor.rank == 0
            for index, values in self.packed.per_token(packed).items()
        }
        by_sequence: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
        for part in self.world.all_gather_objects(own):
            for (layer, index), values in part.items():
                by_sequence[index][layer] = values
        if not by_sequence:
            return None
        return [
            np.stack([by_sequence[index][layer] for layer in sorted(by_sequence[index])], axis=1)
            for index in range(len(by_sequence))
        ]


def teacher_view(config: RunConfig, arch: Architecture, folder: Path, packed: Packed, world: World) -> View:
    """What the bank says as it scores for a run, with the student's own weights as a teacher. Collective."""
    bank = TeacherBank(config, {TEACHER: (arch, folder)}, world)
    rows = [scores.logprobs for scores in bank.score(packed.batches)]
    own = packed.per_sequence([r for r in rows if r is not None]) if rows and rows[0] is not None else {}
    return View(logprobs=merged(own if world.tensor.rank == 0 else {}, world))

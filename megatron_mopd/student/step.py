"""Micro-batches through Megatron's pipeline schedules: scores without gradients, and the loss with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor

from kernels import VocabShard, linear_divergence, linear_support, token_logprob, topk_divergence
from megatron_mopd import losses
from megatron_mopd.config import ObjectiveSpec, RunConfig
from megatron_mopd.importance import Importance, importance_weights
from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.model import forward_hidden, output_weight
from megatron_mopd.student.replay import ReplayPass, Route, RoutingReplay
from megatron_mopd.types import NO_SCORES, MicroBatch, TeacherScores

METRICS = {
    "cross_entropy": ("token_loss", "entropy"),
    "grpo": ("token_loss", "entropy", "ratio", "clip_share"),
    "sampled": ("token_loss", "entropy", "reverse_kl", "advantage", "clip_share"),
    "teacher_topk": ("token_loss", "entropy", "reverse_kl", "student_mass", "teacher_mass"),
    "full_vocab": ("token_loss", "entropy", "reverse_kl"),
}
"""objective kind -> the per-token quantities that are reported, averaged per domain; the loss comes first."""
IMPORTANCE_METRICS = ("importance_kept", "importance_weight", "rollout_kl", "rollout_kl_k3")
"""Reported besides, where `objective.importance` weighs."""


@dataclass(frozen=True, slots=True)
class StepTable:
    """What one step reports. Zero on ranks other than the first tensor ranks of the last stage, of which every context
    and data rank has rows of its own: summed, or the largest taken, over the world it is that of all ranks."""

    sums: Tensor
    """[len(metrics) + 3, domains] fp64 over this rank's rows: metrics, tokens, weight * loss, weights (= units)."""
    largest_weight: Tensor
    """[domains] fp64, the largest importance weight."""
    replay: Tensor
    """[3, domains] fp64, what `ReplayPass` counts. Not zero on any rank: each has tokens and layers of its own."""

    def joined(self, other: StepTable) -> StepTable:
        largest = torch.maximum(self.largest_weight, other.largest_weight)
        return StepTable(self.sums + other.sums, largest, self.replay + other.replay)


def vocab_shard(model: GPTModel, vocab_size: int, world: World) -> VocabShard:
    """The rows of the output layer on this tensor rank; padding rows beyond the vocabulary do not count."""
    rows = model.vocab_size // world.tensor.size
    return VocabShard.of_rank(rows, vocab_size, world.tensor.group if world.tensor.size > 1 else None)


def hidden_rows(hidden: Tensor, batch: MicroBatch, world: World) -> Tensor:
    """[R, H] the hidden states that predict the trained tokens, from the last stage's [S, 1, H] (or its shard).

    Under tensor parallelism the backward pass reduce-scatters: the loss returns the vocabulary shard's part of the
    gradient on every tensor rank, and here they are summed.
    """
    if world.tensor.size > 1:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return hidden.squeeze(1).index_select(0, batch.rows)


def run_schedule(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    on_last_stage: Callable[[MicroBatch, Tensor], Any],
    *,
    backward: bool,
    route: Route | None = None,
) -> list[Any]:
    """Send every micro-batch through the pipeline. Returns what `on_last_stage` reported, one entry a micro-batch.

    With `backward`, `on_last_stage` returns Megatron's (loss sum, number of units, report); without, anything.
    On other stages the list is empty. `route` decides on the experts of a model with `RoutingReplay`.
    """

    def forward_step(iterator: Iterator[MicroBatch], module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)

        def at_the_end(hidden: Tensor, non_loss_data: bool = False) -> Any:
            return on_last_stage(batch, hidden)

        return forward_hidden(module, batch, route(batch) if route else None), at_the_end

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=max(len(batch.token_ids) for batch in batches),
        micro_batch_size=1,
        forward_only=not backward,
        collect_non_loss_data=not backward,
    )
    return list(results)


@torch.no_grad()
def score(
    model: GPTModel,
    batches: Sequence[MicroBatch],
    vocab_size: int,
    world: World,
    objective: ObjectiveSpec,
    *,
    route: Route | None = None,
) -> list[TeacherScores]:
    """What a frozen model says about the trained tokens, as `objective` needs it: their log-probs, its own most likely
    tokens, or the hidden states behind all logits."""

    def at_the_end(batch: MicroBatch, hidden: Tensor) -> TeacherScores:
        rows = hidden_rows(hidden, batch, world)
        if objective.kind == "full_vocab":
            return TeacherScores(hidden=rows)
        shard = vocab_shard(model, vocab_size, world)
        if objective.kind == "teacher_topk":
            top = linear_support(None, None, rows, output_weight(model), objective.top_k, shard=shard)
            return TeacherScores(topk_ids=top.ids, topk_logprobs=top.logprobs)
        return TeacherScores(logprobs=token_logprob(rows, output_weight(model), batch.targets, shard=shard).logprob)

    if not batches:
        return []
    results = run_schedule(model, batches, at_the_end, backward=False, route=route)
    return results or [NO_SCORES] * len(batches)


class LossStep:
    """The objective at the last pipeline stage: from hidden states to Megatron's (sum, units, report)."""

    def __init__(self, config: RunConfig, vocab_size: int, world: World, replay: RoutingReplay | None = None):
        objective = config.objective
        self._objective = objective
        self._vocab_size = vocab_size
        self._num_domains = len(config.domains)
        # GRPO's ratio is to the distribution that was sampled from; the other objectives are about p itself.
        self._temperature = config.rollout.temperature if objective.kind == "grpo" else 1.0
        self._rollout_temperature = config.rollout.temperature
        self._world = world
        self._replay = replay
        self.weighs = objective.importance.kind != "none"
        self.metrics = METRICS[objective.kind] + (IMPORTANCE_METRICS if self.weighs else ())

    def run(
        self,
        model: torch.nn.Module,
        batches: Sequence[MicroBatch],
        scores: Sequence[TeacherScores],
        heads: Mapping[str, Tensor],
        *,
        backward: bool,
    ) -> StepTable:
        teacher_of = {id(batch): teacher for batch, teacher in zip(batches, scores, strict=True)}

        def at_the_end(batch: MicroBatch, hidden: Tensor) -> Any:
            teacher, units = teacher_of[id(batch)], batch.weights
            rows, weight = hidden_rows(hidden, batch, self._world), output_weight(unwrap_model(model))
            shard = vocab_shard(unwrap_model(model), self._vocab_size, self._world)
            extra: dict[str, Tensor] = {}
            if self.weighs:
                importance = self._importance(batch, rows, weight, shard)
                batch = replace(batch, weights=batch.weights * importance.weights)
                extra = importance.rows()
            loss, entropy = self._loss(batch, teacher, heads, rows, weight, shard)
            report = self._per_domain(batch, units, {**loss.rows, **extra, "entropy": entropy})
            count = torch.tensor(batch.num_units, dtype=torch.int, device=hidden.device)
            return (loss.total, count, report) if backward else report

        table = self._empty()
        route = ReplayPass(self._replay) if self._replay else None
        for report in run_schedule(model, batches, at_the_end, backward=backward, route=route):
            if self._world.tensor.rank == 0:
                table = table.joined(report)
        return replace(table, replay=route.counts()) if route else table

    @torch.no_grad()
    def _importance(self, batch: MicroBatch, rows: Tensor, weight: Tensor, shard: VocabShard) -> Importance:
        """A pass of its own over the output layer: the ratio is at the temperature that was sampled at."""
        tokens = token_logprob(
            rows.detach(), weight.detach(), batch.targets, shard=shard, temperature=self._rollout_temperature
        )
        context = self._world.context
        return importance_weights(
            self._objective.importance,
            tokens.logprob,
            batch.rollout_logprobs,
            batch.sequence_index,
            sequences=len(batch.cu_seqlens) - 1,
            context=context.group if context.size > 1 else None,
        )

    def _loss(
        self,
        batch: MicroBatch,
        teacher: TeacherScores,
        heads: Mapping[str, Tensor],
        rows: Tensor,
        weight: Tensor,
        shard: VocabShard,
    ) -> tuple[losses.Loss, Tensor]:
        spec = self._objective
        if spec.kind == "full_vocab":
            assert teacher.hidden is not None and batch.teacher is not None
            stats = linear_divergence(
                rows,
                weight,
                teacher.hidden,
                heads[batch.teacher],
                spec.divergence,
                alpha=spec.alpha,
                beta=spec.beta,
                shard=shard,
                return_stats=spec.divergence != "reverse_kl",
            )
            return losses.full_vocab(
                stats.divergence, batch.weights, reverse_kl=stats.reverse_kl
            ), stats.student_entropy
        if spec.kind == "teacher_topk":
            return self._teacher_topk(batch, teacher, rows, weight, shard)
        tokens = token_logprob(rows, weight, batch.targets, shard=shard, temperature=self._temperature)
        if spec.kind == "sampled":
            assert teacher.logprobs is not None
            loss = losses.sampled(
                tokens.logprob,
                teacher.logprobs,
                batch.outcome_advantages,
                batch.weights,
                advantage_clip=spec.advantage_clip,
                outcome_weight=spec.outcome_weight,
            )
        elif spec.kind == "grpo":
            loss = losses.grpo(
                tokens.logprob,
                batch.rollout_logprobs,
                batch.outcome_advantages,
                batch.weights,
                clip_low=spec.clip_low,
                clip_high=spec.clip_high,
            )
        else:
            loss = losses.cross_entropy(tokens.logprob, batch.weights)
        return loss, tokens.entropy

    def _teacher_topk(
        self, batch: MicroBatch, teacher: TeacherScores, rows: Tensor, weight: Tensor, shard: VocabShard
    ) -> tuple[losses.Loss, Tensor]:
        assert teacher.topk_ids is not None and teacher.topk_logprobs is not None
        stats = topk_divergence(
            rows,
            teacher.topk_ids,
            teacher.topk_logprobs,
            student_weight=weight,
            form="raw",
            shard=shard,
            return_stats=True,
        )
        loss = losses.teacher_topk(
            stats.divergence,
            batch.weights,
            reverse_kl=stats.reverse_kl,
            student_mass=stats.student_mass,
            teacher_mass=stats.teacher_mass,
        )
        return loss, stats.student_entropy

    def _empty(self) -> StepTable:
        zeros = partial(torch.zeros, dtype=torch.float64, device=self._world.device)
        domains = self._num_domains
        return StepTable(zeros(len(self.metrics) + 3, domains), zeros(domains), replay=zeros(3, domains))

    def _per_domain(self, batch: MicroBatch, units: Tensor, rows: Mapping[str, Tensor]) -> StepTable:
        """Of the rows of one micro-batch. units: [R] the rows' weights before importance weights."""
        per_token = [rows[name] for name in self.metrics]
        values = torch.stack([*per_token, torch.ones_like(units), batch.weights * rows["token_loss"], units])
        table = self._empty()
        table.sums.index_add_(1, batch.domain_index, values.double())
        if self.weighs:
            table.largest_weight.index_reduce_(0, batch.domain_index, rows["importance_weight"].double(), "amax")
        return table

"""The student: a Megatron model with its optimizer, updated from micro-batches, exported for rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.model import build_model, release_routing
from megatron_mopd.student.optimizer import learning_rate, wrap
from megatron_mopd.student.random_init import init_random
from megatron_mopd.student.replay import RecordingPass, ReplayPass, RoutingReplay, replay_metrics
from megatron_mopd.student.step import LossStep, StepTable, run_schedule, score
from megatron_mopd.student.weight_stream import HFWeights
from megatron_mopd.student.weights import load_hf
from megatron_mopd.types import MicroBatch, TeacherScores, UpdateReport


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number; raised on every rank, before the optimizer has touched a weight."""


class Student:
    """Owns the trained weights. `num_updates` is the policy version that rollouts are stamped with."""

    def __init__(self, config: RunConfig, arch: Architecture, world: World, source: Path | None):
        self.arch = arch
        self.num_updates = 0
        self._config = config
        self._world = world
        dtype = getattr(torch, config.model.dtype)
        self.model: GPTModel = build_model(arch, config.parallel, world, dtype, training=True, spec=config.model)
        if source is None:
            init_random(self.model, arch, world, seed=config.seed)
        else:
            load_hf(self.model, arch, source, world)
        self.ddp, self.optimizer = wrap(self.model, config.optim)
        replays = config.rollout.routing_replay != "off"
        self._replay = RoutingReplay(self.model, world, len(config.domains)) if replays else None
        self._loss = LossStep(config, arch.vocab_size, world, self._replay)

    def update(
        self,
        batches: Sequence[MicroBatch],
        scores: Sequence[TeacherScores],
        heads: Mapping[str, Tensor],
        step: int,
    ) -> UpdateReport:
        """One optimizer update from all micro-batches of this data-parallel rank. Collective over the world.

        Raises:
            NonFiniteError: naming step, rank and domain; no weight has changed then.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        table = self._loss.run(self.ddp, batches, scores, heads, backward=True)
        release_routing(self.model)
        self._stop_if_not_finite(table.sums, step)
        lr = learning_rate(self._config.optim, step, self._config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        _, grad_norm, _ = self.optimizer.step()
        self.num_updates += 1
        metrics = self._report(table)
        return UpdateReport(loss=metrics["loss"], grad_norm=float(grad_norm or 0.0), lr=lr, metrics=metrics)

    @torch.no_grad()
    def measure(
        self, batches: Sequence[MicroBatch], scores: Sequence[TeacherScores], heads: Mapping[str, Tensor]
    ) -> Mapping[str, float]:
        """The metrics of `update` without a gradient or an update."""
        return self._report(self._loss.run(self.ddp, batches, scores, heads, backward=False))

    def score(self, batches: Sequence[MicroBatch]) -> list[TeacherScores]:
        """What a teacher with the student's weights says that is routed as the student is."""
        route = ReplayPass(self._replay) if self._replay else None
        return score(self.model, batches, self.arch.vocab_size, self._world, self._config.objective, route=route)

    @torch.no_grad()
    def record_routing(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """`batches` with the experts that the present weights choose (R2), for this rank's passes. Collective."""
        assert self._replay is not None
        recording = RecordingPass(self._replay)
        run_schedule(self.ddp, batches, lambda batch, hidden: None, backward=False, route=recording)
        return [replace(batch, routed_experts=recording.routed_experts(batch)) for batch in batches]

    def hf_weights(self) -> HFWeights:
        """Every weight under its Hugging Face name, whole, on every rank. Each iteration over them is collective."""
        return HFWeights(self.model, self.arch, self._world)

    def _stop_if_not_finite(self, sums: Tensor, step: int) -> None:
        bad_loss = ~sums[0].isfinite()
        buffers = [*self.ddp.buffers, *self.ddp.expert_parallel_buffers]
        bad_gradient = not all(bool(buffer.grad_data.sum().isfinite()) for buffer in buffers)
        flags = torch.cat([bad_loss.float(), torch.tensor([float(bad_gradient)], device=sums.device)])
        everywhere = [torch.empty_like(flags) for _ in range(self._world.size)]
        dist.all_gather(everywhere, flags)
        table = torch.stack(everywhere).bool()
        if not table.any():
            return
        names = self._config.domain_names
        domains = [name for name, bad in zip(names, table[:, :-1].any(0).tolist(), strict=True) if bad]
        # A bad loss makes every rank's gradient bad: the ranks to name are those where it came from.
        what, culprits = ("loss", table[:, :-1].any(1)) if domains else ("gradient", table[:, -1])
        ranks = culprits.nonzero()[:, 0].tolist()
        raise NonFiniteError(
            f"non-finite {what} at step {step} on rank {', '.join(map(str, ranks))}, "
            f"domain {', '.join(domains or names)}: stopped before the optimizer "
            f"step; weights are those of step {step}. Lower optim.lr or check the teacher's weights"
        )

    def _report(self, own: StepTable) -> dict[str, float]:
        """Every rank's table -> {'<metric>[/<domain>]': mean over tokens}, and 'loss', what was minimised.
        Collective."""
        names, sums = self._loss.metrics, self._world.sum(own.sums)
        table = torch.cat([sums, sums.sum(1, keepdim=True)], dim=1)
        per_token, (tokens, weighted_loss, units) = table[: len(names)], table[len(names) :].tolist()
        means = (per_token / table[len(names)].clamp(min=1)).tolist()
        report = {"loss": weighted_loss[-1] / max(units[-1], 1e-9)}
        for metric, values in zip(names, means, strict=True):
            for name, value, count in zip(self._config.domain_names, values, tokens, strict=False):
                if count:  # a domain without a token in this batch has no mean, least of all 0
                    report[f"{metric}/{name}"] = value
            report[metric] = values[-1]
        for name, count in zip(self._config.domain_names, tokens, strict=False):
            report[f"token_share/{name}"] = count / max(1.0, tokens[-1])
        if self._replay is not None:
            report |= replay_metrics(self._world.sum(own.replay), self._config.domain_names)
        if self._loss.weighs:
            largest = self._world.max(own.largest_weight).tolist()
            report |= {
                f"importance_max/{name}": value
                for name, value, count in zip(self._config.domain_names, largest, tokens, strict=False)
                if count
            }
            report["importance_max"] = max(largest)
        return report

"""The data that moves through a step, in the order in which it appears.

Letters used in shapes: T tokens of one sequence (prompt + response), R response tokens that are
trained on, S tokens of one packed micro-batch, N sequences in it, H hidden size. Context-parallel
ranks share a micro-batch: S and R are then those of one rank, of C S and of all rows.

Convention: index t of every per-token array describes token t itself, given the tokens before it.
The one shift to next-token prediction happens in `packing.py` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
ExpertArray = NDArray[np.int16]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question of one domain, already rendered with the chat template and tokenised."""

    id: str
    """Unique in the run: '<domain>/<index of the item in its source>'."""
    domain: str
    """Key into `RunConfig.domains`; decides the teacher and the verifier."""
    token_ids: IntArray
    """[P] what the student is asked to continue."""
    answer: str
    """Reference answer; the response of the `sft` stage, the truth for the verifier."""
    max_response_tokens: int
    question: str = ""
    """Hash of the question: the same in every domain and file."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """The source's own entry (question, answer, metadata): what a task's own scorer needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpan:
    """Tokens [start, end) of a rollout that were sampled with the weights of `version`."""

    version: int
    """Number of optimizer updates that the weights had seen."""
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """How a rollout of several turns went (`domains.X.environment`)."""

    turns: int
    """Answers of the student's."""
    calls: int = 0
    """Tool calls that were run."""
    calls_failed: int = 0
    """Those that ended in an error, at a limit, or could not be read."""
    ended: str = "answered"
    """answered: by the student or the environment · turns, time, room: at that limit · or what the environment failed
    with (`environments.protocol.Failure`)."""
    failed: bool = False
    """Whether the environment could not go on."""
    seconds: float = 0.0
    """That the environment took, by the clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One answer to one prompt, with all that is needed to judge it: nothing is matched by position.

    The three arrays have the same length T; this is checked on construction (ValueError).
    """

    prompt: Prompt
    sample: int
    """Which of the prompt's samples this is, 0 .. samples_per_prompt - 1."""
    token_ids: IntArray
    """[T] prompt + response."""
    loss_mask: BoolArray
    """[T] True where the token was sampled by the student (or, in `sft`, is the reference answer)."""
    rollout_logprobs: FloatArray
    """[T] log mu(token) under the distribution it was sampled from; 0 where not `loss_mask`."""
    policy_version: int
    """Number of optimizer updates that the sampling weights had seen; the oldest, where there are several."""
    finish_reason: FinishReason
    weight_versions: tuple[WeightSpan, ...] = ()
    """Which weights sampled which tokens, where they changed during the rollout; empty: all are of `policy_version`."""
    routed_experts: ExpertArray | None = None
    """[T, MoE layers, k] the experts that the rollout engine's routers chose for each token (R3, arXiv 2510.11370);
    -1 throughout a row that it did not report (the last token's). None where nothing is replayed."""
    experts_on: int | None = None
    """The rank that has `routed_experts`, where ranks share their rollouts; the others get what they train on when they
    pack it."""
    reward: float = 0.0
    """The verifier's score in [0, 1]; 0 when the domain was not verified."""
    outcome_advantage: float = 0.0
    """Group-normalised reward (GRPO); 0 when no outcome term is used."""
    episode: Episode | None = None
    """None: one turn, without an environment."""

    def __post_init__(self) -> None:
        lengths = (len(self.token_ids), len(self.loss_mask), len(self.rollout_logprobs))
        if len(set(lengths)) != 1:
            raise ValueError(
                f"rollout of {self.prompt.id}: token_ids, loss_mask, rollout_logprobs have lengths {lengths}"
            )
        if self.loss_mask[:1].any():
            raise ValueError(f"rollout of {self.prompt.id}: the first token has nothing before it to predict it")
        if self.routed_experts is not None and len(self.routed_experts) != len(self.token_ids):
            raise ValueError(
                f"rollout of {self.prompt.id}: routed_experts has {len(self.routed_experts)} rows for "
                f"{len(self.token_ids)} tokens"
            )

    @property
    def domain(self) -> str:
        return self.prompt.domain

    @property
    def response_ids(self) -> IntArray:
        """[R] the tokens that are trained on."""
        return self.token_ids[self.loss_mask]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """N packed sequences for one forward pass, all of one teacher, and the rows the loss looks at.

    Row r of the loss arrays is one trained token: its prediction is the hidden state at `rows[r]`,
    the position just before it.
    """

    teacher: str | None
    token_ids: Tensor
    """[S] int64"""
    position_ids: Tensor
    """[S] int64, the token's place in its sequence, from 0."""
    cu_seqlens: Tensor
    """[N + 1] int32, boundaries of the sequences over all C context ranks, padding included; the last one is C S."""
    max_seqlen: int
    """Of the longest sequence, likewise."""
    rows: Tensor
    """[R] int64, indices into S."""
    targets: Tensor
    """[R] int64, the token that row r predicts."""
    weights: Tensor
    """[R] fp32, 1/|y| of the row's sequence (`sequence` aggregation) or 1 (`token`)."""
    num_units: int
    """Sequences (`sequence`) or tokens (`token`) in here: this batch's share of the denominator. 0 on all but the first
    of the context ranks that share it."""
    rollout_logprobs: Tensor
    """[R] fp32"""
    outcome_advantages: Tensor
    """[R] fp32"""
    domain_index: Tensor
    """[R] int64, index into `RunConfig.domain_names`."""
    sequence_index: Tensor
    """[R] int64, which of the N sequences the row is of; the same number on every context rank."""
    token_domain: Tensor | None = None
    """[S] int64, the domain that a token's rollout is of; the number of domains for padding. For counts only."""
    routed_experts: Tensor | None = None
    """[S, MoE layers, k] int16, in host memory: the experts that the student's tokens go to, whatever its routers would
    choose; -1 throughout a row that is left to the router. Teachers never read it. None: all are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """What the routed teacher says about the rows of one micro-batch: what the objective needs, and no more.

    All are None where there is no teacher, and on ranks that do not hold the last pipeline stage.
    """

    logprobs: Tensor | None = None
    """[R] fp32, log q(target); all that the `sampled` objective needs."""
    hidden: Tensor | None = None
    """[R, H_teacher] last hidden states; `full_vocab` rebuilds the logits from them, chunk by chunk."""
    topk_ids: Tensor | None = None
    """[R, k] int64, the teacher's most likely tokens, for `teacher_topk`."""
    topk_logprobs: Tensor | None = None
    """[R, k] fp32, log q of those tokens under the whole vocabulary's softmax."""


NO_SCORES = TeacherScores()


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one step did, equal on every rank. Losses and metrics are already global means."""

    loss: float
    grad_norm: float
    lr: float
    metrics: Mapping[str, float]
    """'<metric>/<domain>' and '<metric>' over all domains, 'loss' among them."""

    @classmethod
    def mean(cls, reports: Sequence[UpdateReport]) -> UpdateReport:
        """Of the updates of one step; a metric that only some of them have is the mean over those."""
        names = dict.fromkeys(name for report in reports for name in report.metrics)
        metrics = {name: _mean([r.metrics[name] for r in reports if name in r.metrics]) for name in names}
        return cls(
            loss=_mean([r.loss for r in reports]),
            grad_norm=_mean([r.grad_norm for r in reports]),
            lr=reports[-1].lr,
            metrics=metrics,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def to_device(array: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copy a host array to `device`; non-blocking where the hardware can."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype, non_blocking=True)

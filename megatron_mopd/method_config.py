"""What a run minimises: the objective, which rollouts go with it, and the order of the domains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from megatron_mopd.rollout_config import RolloutSpec
from megatron_mopd.yaml_config import ConfigError, require

Stage = Literal["sft", "rl", "mopd"]
Kind = Literal["sampled", "teacher_topk", "full_vocab", "grpo", "cross_entropy"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd", "mixed"]

KINDS: Mapping[Stage, tuple[Kind, ...]] = {
    "sft": ("cross_entropy",),
    "rl": ("grpo",),
    "mopd": ("sampled", "teacher_topk", "full_vocab"),
}
"""stage -> the objectives it can minimise."""


IMPORTANCE_BOUNDS: Mapping[str, tuple[float, float]] = {
    "none": (0.0, math.inf),
    "icepop": (0.5, 2.0),
    "tis": (0.0, 2.0),
    "sequence_tis": (0.0, 2.0),
    "sequence_mis": (0.0, 2.0),
    "geometric": (0.999, 1.001),
}
"""kind -> its usual bounds: icepop those of GLM-5 (arXiv 2602.15763) and Nemotron-Cascade 2, the others those of
verl's rollout correction."""


@dataclass(frozen=True, kw_only=True)
class ImportanceSpec:
    """Weights p_train / mu for rollouts whose engine is not quite the trainer's model; see importance.py."""

    kind: Literal["none", "icepop", "tis", "sequence_tis", "sequence_mis", "geometric"] = "none"
    """icepop, tis: per token · the others: per sequence. Formulas: docs/objectives.md."""
    low: float | None = None
    """Default: the kind's usual one."""
    high: float | None = None
    """As `low`."""

    def __post_init__(self) -> None:
        low, high = self.bounds
        if self.kind == "none":
            require(self.low is None and self.high is None, "low and high: kind 'none' has no bounds; remove them")
        require(0 <= low <= high, f"low and high: must be 0 <= low <= high, got {low} and {high}")
        require(high > 0, "high: must be > 0, or nothing is left to learn from")

    @property
    def bounds(self) -> tuple[float, float]:
        low, high = IMPORTANCE_BOUNDS[self.kind]
        return low if self.low is None else self.low, high if self.high is None else self.high


@dataclass(frozen=True, kw_only=True)
class DomainWeightsSpec:
    """How much each domain counts in the loss; see domain_weights.py."""

    kind: Literal["prompt_share", "token_share", "gap_aware"] = "prompt_share"
    """prompt_share: as it was drawn (the papers) · token_share: its `weight` is its share of the loss, however long its
    answers are; with `aggregation: token` · gap_aware: its `weight` times its remaining KL to the teacher over the mean
    of the domains (both: Open-MOPD, arXiv 2608.19098)."""
    low: float = 0.5
    """`gap_aware`: least factor of a domain's gap over the mean."""
    high: float = 2.0
    """`gap_aware`: largest factor."""
    decay: float = 0.9
    """`gap_aware`: of the running mean of the gaps, per step."""

    def __post_init__(self) -> None:
        require(
            0 < self.low <= 1 <= self.high, f"low and high: must be 0 < low <= 1 <= high, got {self.low}, {self.high}"
        )
        require(0 <= self.decay < 1, f"decay: must be in [0, 1), got {self.decay}")
        if self.kind != "gap_aware" and (self.low, self.high, self.decay) != (0.5, 2.0, 0.9):
            raise ConfigError(f"low, high and decay: only for the kind 'gap_aware', not '{self.kind}'; remove them")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """What is minimised. `stage` decides which kinds are allowed."""

    kind: Kind = "sampled"
    """Stage sft: cross_entropy · rl: grpo · mopd: sampled, teacher_topk or full_vocab. See docs/objectives.md."""
    aggregation: Literal["sequence", "token"] = "sequence"
    """sequence: mean over tokens, then over sequences (the papers) · token: mean over all tokens."""
    advantage_clip: float = 5.0
    """`sampled`: A_max of MOPD Eq. 4."""
    outcome_weight: float = 0.0
    """`sampled`: alpha of the outcome term alpha * A_GRPO (MiMo-V2-Flash Eq. 9)."""
    top_k: int = 64
    """`teacher_topk`: how many of the teacher's most likely tokens MOPD Eq. 5 sums over."""
    divergence: Divergence = "reverse_kl"
    """`full_vocab`: p student, q teacher. reverse_kl: KL(p || q) · forward_kl: KL(q || p) ·
    mixed: alpha KL(q || p) + (1 - alpha) KL(p || q) ·
    jsd: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (GKD, arXiv 2306.13649 Eq. 1)."""
    alpha: float = 0.5
    """`divergence: mixed`: share of the forward KL."""
    beta: float = 0.5
    """`divergence: jsd`: share of the teacher in the mixture."""
    importance: ImportanceSpec = field(default_factory=ImportanceSpec)
    """Stage mopd: weights for what the rollout engine sampled otherwise than the trainer would have. They decide what
    `sampled` estimates; the other two kinds need no sample of the token, there they re-weight the states."""
    domain_weights: DomainWeightsSpec = field(default_factory=DomainWeightsSpec)
    """Stage mopd: how much each domain counts."""
    clip_low: float = 0.2
    """`grpo`: the ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.28
    """`grpo`: the ratio is clipped to [1 - clip_low, 1 + clip_high] (DAPO's clip-higher)."""
    normalise_by_std: bool = True
    """`grpo`: divide the centred group rewards by their standard deviation."""
    dynamic_sampling: bool = False
    """`grpo`: replace groups whose rewards are all equal by fresh ones (DAPO)."""
    max_sampling_rounds: int = 4
    """`grpo`: with dynamic sampling, give up on filling the batch after this many rounds."""

    def __post_init__(self) -> None:
        require(self.advantage_clip > 0, "advantage_clip: must be > 0")
        require(self.outcome_weight >= 0, "outcome_weight: must be >= 0")
        require(self.top_k >= 1, "top_k: must be >= 1")
        require(0 <= self.alpha <= 1, "alpha: must be in [0, 1]")
        require(0 < self.beta < 1, "beta: must be in (0, 1); its limits are divergence forward_kl and reverse_kl")
        require(0 < self.clip_low < 1, "clip_low: must be in (0, 1)")
        require(self.clip_high > 0, "clip_high: must be > 0")
        require(self.max_sampling_rounds >= 1, "max_sampling_rounds: must be >= 1")


def check_method(stage: Stage, objective: ObjectiveSpec, rollout: RolloutSpec) -> None:
    """Raise ConfigError where stage, objective and rollouts do not go together."""
    kind, allowed = objective.kind, KINDS[stage]
    require(kind in allowed, f"objective.kind: stage '{stage}' takes {_either(allowed)}, got '{kind}'")
    if kind == "grpo" or (kind == "sampled" and objective.outcome_weight > 0):
        if rollout.samples_per_prompt < 2:
            raise ConfigError("rollout.samples_per_prompt: group-normalised rewards need at least 2 samples a prompt")
        if rollout.temperature == 0:
            raise ConfigError("rollout.temperature: group-normalised rewards need temperature > 0")
    if rollout.engine == "sglang" and stage == "sft":
        raise ConfigError("rollout.engine: stage 'sft' learns reference answers and samples none; remove it")
    if rollout.routing_replay != "off" and stage == "sft":
        raise ConfigError(
            f"rollout.routing_replay: {rollout.routing_replay} is for answers that the student samples, stage 'sft' "
            "learns reference answers; set it to off"
        )
    if rollout.lag and objective.dynamic_sampling:
        raise ConfigError(
            "rollout.lag: objective.dynamic_sampling draws more prompts once it has seen a step's rewards, too late to "
            "sample ahead; set lag: 0, or dynamic_sampling: false"
        )
    if rollout.waves > 1 and stage != "mopd":
        raise ConfigError(f"rollout.waves: stage '{stage}' has no teachers to score them; set it to 1")
    if rollout.waves > 1 and objective.dynamic_sampling:
        raise ConfigError("rollout.waves: objective.dynamic_sampling sees all rewards first; set one of them off")
    if rollout.engine == "dataset":
        _check_dataset(stage, objective, rollout)
    _check_unused(stage, objective, rollout)


def _check_dataset(stage: Stage, objective: ObjectiveSpec, rollout: RolloutSpec) -> None:
    if stage == "rl":
        raise ConfigError("rollout.engine: stage 'rl' learns from the student's own answers; use in_process")
    if objective.kind == "sampled":
        raise ConfigError(
            "objective.kind: 'sampled' is an estimate on the student's own answers, wrong on those of a dataset; "
            "use full_vocab or teacher_topk, or rollout.engine: in_process"
        )
    if rollout.samples_per_prompt != 1:
        raise ConfigError("rollout.samples_per_prompt: every line of a dataset is one answer; set it to 1")


def _check_unused(stage: Stage, objective: ObjectiveSpec, rollout: RolloutSpec) -> None:
    """A value that would change nothing is a misunderstanding: say so instead of ignoring it."""
    kind, unset = objective.kind, ObjectiveSpec()
    if objective.outcome_weight > 0 and kind != "sampled":
        raise ConfigError(f"objective.outcome_weight: only the kind 'sampled' has an outcome term, not '{kind}'")
    if objective.dynamic_sampling and kind != "grpo":
        raise ConfigError(f"objective.dynamic_sampling: only for the kind 'grpo', not '{kind}'")
    if objective.top_k != unset.top_k and kind != "teacher_topk":
        raise ConfigError(f"objective.top_k: only for the kind 'teacher_topk', not '{kind}'")
    if objective.divergence != unset.divergence and kind != "full_vocab":
        raise ConfigError(f"objective.divergence: only for the kind 'full_vocab', not '{kind}'")
    if objective.alpha != unset.alpha and objective.divergence != "mixed":
        raise ConfigError(f"objective.alpha: only for divergence 'mixed', not '{objective.divergence}'")
    if objective.beta != unset.beta and objective.divergence != "jsd":
        raise ConfigError(f"objective.beta: only for divergence 'jsd', not '{objective.divergence}'")
    if objective.importance.kind != "none":
        _check_importance(kind, rollout)
    weighting = objective.domain_weights.kind
    if weighting != "prompt_share" and stage != "mopd":
        raise ConfigError(f"objective.domain_weights.kind: '{weighting}' is of stage 'mopd', not '{stage}'; remove it")
    if weighting == "token_share" and objective.aggregation != "token":
        raise ConfigError(
            "objective.domain_weights.kind: 'token_share' shares out the tokens of a mean over tokens; set "
            "objective.aggregation: token (with 'sequence' a domain's share is that of its prompts already)"
        )
    if stage == "sft" and rollout.samples_per_prompt != 1:
        raise ConfigError("rollout.samples_per_prompt: stage 'sft' has one reference answer a prompt; set it to 1")


def _check_importance(kind: Kind, rollout: RolloutSpec) -> None:
    if kind == "grpo":
        raise ConfigError(
            "objective.importance: grpo's ratio is to the rollout policy already, a weight would count it twice; "
            "remove it"
        )
    if kind == "cross_entropy" or rollout.engine == "dataset":
        raise ConfigError("objective.importance: only for rollouts that the student samples; remove it")
    if rollout.temperature == 0:
        raise ConfigError("rollout.temperature: 0 has no sampling distribution to weigh against; set it > 0")


def sequential_steps(weights: Mapping[str, float], steps: int) -> dict[str, range]:
    """domain -> its steps: one domain after another in the order given, as many steps as its share of `weights`.

    Cascade RL. Rounded so that the ranges tile [0, steps). Raises ConfigError for a domain without a step.
    """
    total = sum(weights.values())
    ends = [round(steps * part / total) for part in accumulate(weights.values())]
    ranges = {name: range(start, end) for name, start, end in zip(weights, [0, *ends], ends, strict=False)}
    for name, own in ranges.items():
        if not own:
            raise ConfigError(
                f"domain_schedule: 'sequential' leaves none of the {steps} steps to domain {name}; "
                f"raise steps or domains.{name}.weight"
            )
    return ranges


def _either(names: tuple[str, ...]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last

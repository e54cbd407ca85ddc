"""Which of chat template, temperature, dtype, routing and engine explains a difference, and by which numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mopd.audit.numbers import Pair
from megatron_mopd.audit.options import FP32_TOLERANCE, Tolerance
from megatron_mopd.audit.questions import Rendering
from megatron_mopd.audit.routing import Routing
from megatron_mopd.audit.temperature import Fit

EXPLAINS = 0.2
"""A temperature explains a difference when it leaves no more than this share of it."""
RATIO = 10.0
"""Routing explains a difference when tokens behind other experts are this many times further apart than the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    part: str
    """engine, routing, dtype, temperature, chat template or teacher."""
    blamed: bool
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"part": self.part, "blamed": self.blamed, "text": self.text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was measured."""

    dtype: str
    tolerance: Tolerance
    renderings: Sequence[Rendering]
    reported: Pair
    """Engine while it sampled / student, at the temperature of the run."""
    rescored: Pair
    """Engine over the same tokens / student, at temperature 1."""
    teacher: Pair
    teacher_exact: bool
    """Whether the teacher must agree to the last bit: not where the student computes in fp8."""
    fit: Fit | None
    """None where the reported log-probs agree."""
    float32: Pair | None
    """`rescored` with both sides in float32; None for a float32 run, and where no server can be started for it."""
    routing: Sequence[Routing]
    """Of the engine while it sampled, of it re-scoring, or of both / student."""


def within_tolerance(evidence: Evidence) -> bool:
    """Whether an audit is passed."""
    pairs = (evidence.reported, evidence.rescored)
    return (
        all(pair.is_within(evidence.tolerance) for pair in pairs)
        and _teacher_agrees(evidence)
        and not any(rendering.differing for rendering in evidence.renderings)
    )


def verdicts(evidence: Evidence) -> list[Verdict]:
    """Engine last: it is blamed for what nothing else explains."""
    template, temperature = _template(evidence.renderings), _temperature(evidence)
    dtype, routing = _dtype(evidence), _routing(evidence)
    explained = temperature.blamed, dtype.blamed or routing.blamed
    return [template, temperature, dtype, routing, _engine(evidence, *explained), _teacher(evidence)]


def _template(renderings: Sequence[Rendering]) -> Verdict:
    differing = [rendering for rendering in renderings if rendering.differing]
    if differing:
        text = "; ".join(
            f"{r.by} renders {r.differing} of {r.prompts} prompts differently: {r.first}" for r in differing
        )
        return Verdict(part="chat template", blamed=True, text=text)
    text = f"{renderings[0].prompts} prompts are rendered to the same tokens by {', '.join(r.by for r in renderings)}"
    return Verdict(part="chat template", blamed=False, text=text)


def _temperature(evidence: Evidence) -> Verdict:
    fit = evidence.fit
    if fit is None:
        text = f"reported log-probs agree: max {evidence.reported.overall.largest:.1e}"
        return Verdict(part="temperature", blamed=False, text=text)
    blamed = abs(fit.best / fit.configured - 1) > 0.01 and fit.mean_best <= EXPLAINS * fit.mean_configured
    text = (
        f"reported log-probs fit temperature {fit.best:.4g} best: mean |difference| {fit.mean_best:.1e}, "
        f"at rollout.temperature {fit.configured:.4g} {fit.mean_configured:.1e}"
    )
    return Verdict(part="temperature", blamed=blamed, text=text)


def _dtype(evidence: Evidence) -> Verdict:
    if evidence.dtype == "float32":
        return Verdict(part="dtype", blamed=False, text="everything is float32")
    before = evidence.rescored.overall
    if evidence.float32 is None:
        return Verdict(part="dtype", blamed=False, text="not tested: servers that run already have one dtype")
    after = evidence.float32.overall
    text = f"max {before.largest:.1e} in {evidence.dtype}, {after.largest:.1e} with both sides in float32"
    return Verdict(part="dtype", blamed=after.largest < FP32_TOLERANCE < before.largest, text=text)


def _routing(evidence: Evidence) -> Verdict:
    if not evidence.routing:
        return Verdict(part="routing", blamed=False, text="no experts, or the engine does not tell them")
    blamed, parts = False, []
    for routing in evidence.routing:
        split = routing.split
        if not routing.tokens_differing:
            parts.append(f"{routing.left}: the same experts everywhere ({routing.tokens} tokens)")
            continue
        separated = split.same_tokens > 0 and split.differing_tokens > 0
        large = split.differing_largest > FP32_TOLERANCE
        blamed |= separated and large and split.differing_mean >= RATIO * split.same_mean
        first = routing.partings[0]
        parts.append(
            f"{routing.left}: {1 - routing.same:.2%} of (token, layer) differ, first in layer {first.layer} at median "
            f"gate margin {first.margin:.1e} (expert {first.expert} in {first.expert_share:.0%} of them); "
            f"mean |difference| {split.differing_mean:.1e} of {split.differing_tokens} tokens behind other experts, "
            f"{split.same_mean:.1e} of the other {split.same_tokens}"
        )
    return Verdict(part="routing", blamed=blamed, text="; ".join(parts))


def _engine(evidence: Evidence, temperature: bool, model: bool) -> Verdict:
    """temperature: whether it explains what was reported; model: whether dtype or routing explains all."""
    reported, rescored = evidence.reported, evidence.rescored
    text = (
        f"max |difference| {reported.overall.largest:.1e} while it sampled, {rescored.overall.largest:.1e} re-scoring"
    )
    sampled_otherwise = not reported.is_within(evidence.tolerance) and not temperature
    if not rescored.is_within(evidence.tolerance) and not model:
        why = "its weights or its arithmetic are other ones; --reference says which side is right"
        return Verdict(part="engine", blamed=True, text=f"{text}: {why}")
    if sampled_otherwise and (not model or reported.overall.mean >= RATIO * rescored.overall.mean):
        return Verdict(part="engine", blamed=True, text=f"{text}: it reports others than it re-scores")
    return Verdict(part="engine", blamed=False, text=text)


def _teacher_agrees(evidence: Evidence) -> bool:
    pair = evidence.teacher
    return pair.overall.largest == 0.0 or (not evidence.teacher_exact and pair.is_within(evidence.tolerance))


def _teacher(evidence: Evidence) -> Verdict:
    figures, blamed = evidence.teacher.overall, not _teacher_agrees(evidence)
    exact = "to the last bit" if figures.largest == 0 else f"max |difference| {figures.largest:.1e}"
    text = f"the bank and the student {'differ' if blamed else 'agree'} on {figures.tokens} tokens, {exact}"
    return Verdict(part="teacher", blamed=blamed, text=text)

"""From what everybody said to figures and verdicts. Pure: no model and no rank is asked any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_mopd.audit.layers import Layer, compare_layers
from megatron_mopd.audit.numbers import Pair, compare, differences
from megatron_mopd.audit.options import Options, Tolerance
from megatron_mopd.audit.questions import Rendering
from megatron_mopd.audit.routing import Routing, compare_routing
from megatron_mopd.audit.temperature import Fit
from megatron_mopd.audit.verdict import Evidence, Verdict, verdicts, within_tolerance
from megatron_mopd.audit.views import View
from megatron_mopd.config import RunConfig
from megatron_mopd.types import FloatArray, Rollout

SAMPLING, RESCORING, STUDENT, TEACHER, REFERENCE = "engine", "engine re-scoring", "student", "teacher", "transformers"
_WORST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was said about the same tokens."""

    rollouts: Sequence[Rollout]
    renderings: Sequence[Rendering]
    reported: View
    """By the engine while it sampled, at the temperature that it sampled at."""
    rescored: View
    student: View
    at_temperature: Sequence[FloatArray]
    """The student's log-probs at the temperature of `reported`."""
    fit: Fit | None
    teacher: View
    float32: tuple[View, View] | None
    """Engine re-scoring and student, both in float32."""
    reference: View | None
    """By transformers, in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One of those that engine and student are furthest apart on."""

    prompt: str
    position: int
    token_id: int
    engine: float
    student: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What `mopd audit` reports."""

    about: dict[str, Any]
    pairs: tuple[Pair, ...]
    renderings: tuple[Rendering, ...]
    routing: tuple[Routing, ...]
    layers: tuple[Layer, ...]
    """Of the student against transformers; empty without --reference."""
    worst: tuple[Token, ...]
    fit: Fit | None
    tolerance: Tolerance
    verdicts: tuple[Verdict, ...]
    passed: bool

    @property
    def blamed(self) -> list[str]:
        return [verdict.part for verdict in self.verdicts if verdict.blamed]

    def as_json(self) -> dict[str, Any]:
        return {
            **self.about,
            "passed": self.passed,
            "blamed": self.blamed,
            "tolerance": asdict(self.tolerance),
            "log_probs": [pair.as_json() for pair in self.pairs],
            "routing": [routing.as_json() for routing in self.routing],
            "layers": [layer.as_json() for layer in self.layers],
            "temperature_fit": None if self.fit is None else asdict(self.fit),
            "chat_template": [asdict(rendering) for rendering in self.renderings],
            "worst_tokens": [asdict(token) for token in self.worst],
            "verdicts": [verdict.as_json() for verdict in self.verdicts],
        }


def reported_pair(rollouts: Sequence[Rollout], reported: View, student: Sequence[FloatArray]) -> Pair:
    return _pair(rollouts, (SAMPLING, reported.logprobs), (STUDENT, student))


def findings(seen: Seen, config: RunConfig, settings: Options) -> Audit:
    tolerance = Tolerance.of(config.model.dtype, settings.tolerance)
    reported = reported_pair(seen.rollouts, seen.reported, seen.at_temperature)
    rescored = _pair(seen.rollouts, (RESCORING, seen.rescored.logprobs), (STUDENT, seen.student.logprobs))
    teacher = _pair(seen.rollouts, (TEACHER, seen.teacher.logprobs), (STUDENT, seen.student.logprobs))
    float32, more = _other_pairs(seen)
    routing = _routing(seen)
    evidence = Evidence(
        dtype=config.model.dtype,
        tolerance=tolerance,
        renderings=seen.renderings,
        reported=reported,
        rescored=rescored,
        teacher=teacher,
        teacher_exact=config.model.fp8 is None,
        fit=seen.fit,
        float32=float32,
        routing=[found for found in routing if found.left in (SAMPLING, RESCORING)],
    )
    layers: list[Layer] = []
    if seen.reference is not None:
        assert seen.student.hidden is not None and seen.reference.hidden is not None
        layers = compare_layers(seen.student.hidden, seen.reference.hidden, config.model.dtype)
    return Audit(
        about=_about(seen, config),
        pairs=(reported, rescored, teacher, *more),
        renderings=tuple(seen.renderings),
        routing=tuple(routing),
        layers=tuple(layers),
        worst=tuple(_worst_tokens(seen)),
        fit=seen.fit,
        tolerance=tolerance,
        verdicts=tuple(verdicts(evidence)),
        passed=within_tolerance(evidence),
    )


def _pair(
    rollouts: Sequence[Rollout], left: tuple[str, Sequence[FloatArray]], right: tuple[str, Sequence[FloatArray]]
) -> Pair:
    return compare(left, right, [r.domain for r in rollouts], [r.loss_mask for r in rollouts])


def _other_pairs(seen: Seen) -> tuple[Pair | None, list[Pair]]:
    """(both sides in float32, that and all other pairs that could be made)."""
    float32, pairs = None, list[Pair]()
    student = (STUDENT, seen.student.logprobs)
    if seen.float32 is not None:
        engine, own = seen.float32
        float32 = _pair(seen.rollouts, (f"{RESCORING} fp32", engine.logprobs), (f"{STUDENT} fp32", own.logprobs))
        pairs += [float32, _pair(seen.rollouts, student, (f"{STUDENT} fp32", own.logprobs))]
    if seen.reference is not None:
        reference = (f"{REFERENCE} fp32", seen.reference.logprobs)
        pairs += [_pair(seen.rollouts, side, reference) for side in (student, (RESCORING, seen.rescored.logprobs))]
    return float32, pairs


def _routing(seen: Seen) -> list[Routing]:
    sides: list[tuple[str, View, View, Sequence[FloatArray]]] = [
        (SAMPLING, seen.reported, seen.student, seen.at_temperature),
        (RESCORING, seen.rescored, seen.student, seen.student.logprobs),
    ]
    if seen.float32 is not None:
        engine, own = seen.float32
        sides.append((f"{RESCORING} fp32", engine, own, own.logprobs))
    if seen.reference is not None:
        sides.append((f"{REFERENCE} fp32", seen.reference, seen.student, seen.student.logprobs))
    found = [compare_routing((name, view), (STUDENT, own), logprobs) for name, view, own, logprobs in sides]
    return [routing for routing in found if routing is not None]


def _worst_tokens(seen: Seen) -> list[Token]:
    apart = differences(seen.rescored.logprobs, seen.student.logprobs)
    places = [
        (abs(float(values[token])), index, token)
        for index, values in enumerate(apart)
        for token in np.flatnonzero(~np.isnan(values))
    ]
    return [
        Token(
            prompt=seen.rollouts[index].prompt.id,
            position=int(token),
            token_id=int(seen.rollouts[index].token_ids[token]),
            engine=float(seen.rescored.logprobs[index][token]),
            student=float(seen.student.logprobs[index][token]),
        )
        for _, index, token in sorted(places, reverse=True)[:_WORST]
    ]


def _about(seen: Seen, config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    return {
        "checkpoint": config.model.checkpoint,
        "engine": config.rollout.engine,
        "dtype": config.model.dtype,
        "temperature": config.rollout.temperature,
        "layout": {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "expert": parallel.expert},
        "sequences": len(seen.rollouts),
        "sampled_tokens": int(sum(rollout.loss_mask.sum() for rollout in seen.rollouts)),
        "tokens": sum(len(rollout.token_ids) for rollout in seen.rollouts),
    }

"""The audit itself, on every rank: one set of tokens, looked at by everybody who was loaded from the checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from megatron_mopd.audit.engine import (
    Engine,
    OpenEngine,
    close_engine,
    open_engine,
    reported_view,
    rescored_view,
    sample,
)
from megatron_mopd.audit.findings import Audit, Seen, findings, reported_pair
from megatron_mopd.audit.options import Options, Tolerance
from megatron_mopd.audit.questions import (
    Question,
    Rendering,
    by_server,
    by_transformers,
    compare_renderings,
    draw_questions,
)
from megatron_mopd.audit.reference import reference_view
from megatron_mopd.audit.setting import in_float32
from megatron_mopd.audit.student import AuditedStudent, Packed, teacher_view
from megatron_mopd.audit.temperature import Fit, fit_temperature
from megatron_mopd.audit.views import View
from megatron_mopd.config import RunConfig
from megatron_mopd.parallel.runtime import World, start_world, stop_world
from megatron_mopd.preflight import Inputs, resolve_inputs
from megatron_mopd.rollout.engine import RolloutFailure, Sampling
from megatron_mopd.rollout.sglang.engine import SglangEngine
from megatron_mopd.rollout.sglang.http import ServerError
from megatron_mopd.types import Rollout


def audit(config: RunConfig, settings: Options, make: OpenEngine = open_engine) -> Audit:
    """Called on every rank with what `audit_config` made. Collective; the result is the same on all of them.

    make: opens the engine that is audited.
    """
    world = start_world(config.parallel, config.seed)
    inputs = resolve_inputs(config)
    questions = list(draw_questions(config, settings, inputs.tokenizer, inputs.arch))
    found = findings(_Audited(config, settings, inputs, world, make).look_at(questions), config, settings)
    stop_world()
    return found


class _Audited:
    def __init__(self, config: RunConfig, settings: Options, inputs: Inputs, world: World, make: OpenEngine) -> None:
        assert inputs.weights is not None
        self._config, self._settings, self._world, self._make = config, settings, world, make
        self._inputs, self._folder = inputs, inputs.weights
        spec = config.rollout
        self._sampling = Sampling(temperature=spec.temperature, top_p=spec.top_p, top_k=spec.top_k)

    def look_at(self, questions: Sequence[Question]) -> Seen:
        config, world = self._config, self._world
        student = AuditedStudent(config, self._inputs.arch, self._folder, world)
        engine = self._open(config, student)
        try:
            prompts = [question.prompt for question in questions]
            rollouts = sample(engine, prompts, self._sampling, config.seed, world)
            renderings = self._renderings(engine, questions)
            rescored = rescored_view(engine, rollouts, world)
        finally:
            close_engine(engine)
        packed = Packed.of(rollouts, config, world)
        look = student.look(packed, hidden=self._settings.reference)
        temperature = self._sampling.temperature or 1.0  # greedy decoding reports those of temperature 1
        reported, at_temperature = reported_view(rollouts), look.logprobs(temperature)
        fit: Fit | None = None
        tolerance = Tolerance.of(config.model.dtype, self._settings.tolerance)
        if not reported_pair(rollouts, reported, at_temperature).is_within(tolerance):
            fit = fit_temperature(reported.logprobs, look.logprobs, temperature)
        own = look.view()
        del look, student, engine
        gc.collect()  # models refer to themselves; the next one needs the room
        return Seen(
            rollouts=rollouts,
            renderings=renderings,
            reported=reported,
            rescored=rescored,
            student=own,
            at_temperature=at_temperature,
            fit=fit,
            teacher=teacher_view(config, self._inputs.arch, self._folder, packed, world),
            float32=self._in_float32(rollouts) if config.model.dtype != "float32" else None,
            reference=self._reference(rollouts) if self._settings.reference else None,
        )

    def _open(self, config: RunConfig, student: AuditedStudent) -> Engine:
        """The engine with the student's weights, brought to it as in a run."""
        engine = self._make(config, self._inputs, self._world)
        try:
            engine.load_weights(student.weights(), version=0)
        except BaseException:
            close_engine(engine)
            raise
        return engine

    def _renderings(self, engine: Engine, questions: Sequence[Question]) -> list[Rendering]:
        """By the servers, and by transformers with the files of the checkpoint. Collective."""
        tokenizer = self._inputs.tokenizer

        def compare() -> list[Rendering]:
            others = {f"transformers ({self._folder})": by_transformers(self._folder)}
            if isinstance(engine, SglangEngine):
                others |= {server.url: by_server(server) for server in engine.connections}
            try:
                return [compare_renderings(by, render, questions, tokenizer) for by, render in others.items()]
            except ServerError as error:
                raise RolloutFailure(f"rollout.sglang: {error}") from None

        found: list[Rendering] = self._world.all_gather_objects(self._world.on_main(compare))[0]
        return found

    def _in_float32(self, rollouts: Sequence[Rollout]) -> tuple[View, View] | None:
        """(engine re-scoring, student) with both in float32; None where the engine cannot be had in it. Collective."""
        sglang = self._config.rollout.sglang
        if sglang is not None and sglang.launch is None:
            return None
        config = in_float32(self._config)
        student = AuditedStudent(config, self._inputs.arch, self._folder, self._world)
        engine = self._open(config, student)
        try:
            rescored = rescored_view(engine, rollouts, self._world)
        finally:
            close_engine(engine)
        look = student.look(Packed.of(rollouts, config, self._world), hidden=False)
        return rescored, look.view()

    def _reference(self, rollouts: Sequence[Rollout]) -> View:
        """On the first rank, for all. Collective."""
        found = self._world.on_main(lambda: reference_view(self._folder, rollouts, self._world.device))
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()
        view: View = self._world.all_gather_objects(found)[0]
        return view

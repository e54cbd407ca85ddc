"""Scores responses, 0 to 1: a reasoning-gym task's own scorer, math-verify, exact text, IFEval, or a program."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_mopd.config import DomainSpec
from megatron_mopd.domains.command import Question, question_text, score_by_command
from megatron_mopd.domains.ifeval import judge, read_instructions
from megatron_mopd.domains.reasoning import after_reasoning
from megatron_mopd.domains.source import build_task
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import IntArray, Rollout
from megatron_mopd.yaml_config import ConfigError

CPU_SECONDS_PER_ANSWER = 5.0
"""After which a response that keeps its scorer busy counts as wrong. CPU time, not the clock's: a
reward must not depend on how busy the machine is."""
FULL_SCORE = 1.0 - 1e-6
"""An answer is right from here on: partial credit, which some tasks give, is for RL only."""
_NO_ALARM = 10**6
"""math-verify's own limits are by the clock, and switching them off logs a warning per process."""

EVALUATING_TASKS = frozenset(
    {
        "binary_matrix",
        "composite",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Tasks whose scorer hands the response to Python's eval or SymPy's parse_expr (reasoning-gym 0.1.25)."""

# Third-party scorers meet any text a model can produce; these are the ways in which they choke on it.
_GARBAGE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
    RecursionError,
    MemoryError,
)

_CALL = re.compile(r"([A-Za-z_]\w+)\s*\(")
_HARMLESS_CALLS = frozenset(
    {
        "sin",
        "cos",
        "tan",
        "sec",
        "csc",
        "cot",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "exp",
        "log",
        "ln",
        "sqrt",
        "Abs",
        "abs",
    }
)
_HUGE_POWER = re.compile(r"\*\*\s*\(*\s*[-+]?\d{4,}|\*\*\s*[(\s]*[\w.]+[)\s]*\*\*|\^\s*\d{4,}|!\s*!")


class _TooSlow(BaseException):
    """Not an Exception: several scorers catch those all and would go on."""


def verify(rollouts: Sequence[Rollout], domains: Mapping[str, DomainSpec], tokenizer: Tokenizer) -> list[Rollout]:
    """The rollouts with `reward` set by the verifier of their domain; truncated responses are scored as they are.

    Must run in a process's main thread: its time limits use signals (SIGVTALRM; math-verify's, SIGALRM).
    """
    responses = [tokenizer.decode(_last_turn(rollout)) for rollout in rollouts]
    rewards = [0.0] * len(rollouts)
    for name in dict.fromkeys(rollout.domain for rollout in rollouts):
        spec = domains[name]
        own = [index for index, rollout in enumerate(rollouts) if rollout.domain == name]
        if spec.verifier == "environment":
            scores = [rollouts[index].reward for index in own]
        elif spec.verifier == "command":
            scores = _score_by_command(name, spec, [(responses[index], rollouts[index]) for index in own])
        else:
            scores = [score(responses[index], rollouts[index], domains) for index in own]
        for index, reward in zip(own, scores, strict=True):
            rewards[index] = reward
    return [dataclasses.replace(rollout, reward=reward) for rollout, reward in zip(rollouts, rewards, strict=True)]


def _last_turn(rollout: Rollout) -> IntArray:
    """[R] the student's tokens after the last one that is not its own: all of them, where there is one turn."""
    foreign = np.flatnonzero(~rollout.loss_mask)
    return rollout.token_ids[foreign[-1] + 1 :] if rollout.episode is not None else rollout.response_ids


def _score_by_command(name: str, spec: DomainSpec, answered: Sequence[tuple[str, Rollout]]) -> list[float]:
    questions = [
        Question(
            id=f"{rollout.prompt.id}#{rollout.sample}",
            prompt=question_text(rollout.prompt.record),
            response=response,
            answer=rollout.prompt.answer,
            record=rollout.prompt.record,
        )
        for response, rollout in answered
    ]
    return score_by_command(f"domains.{name}", spec, questions)


def score(response: str, rollout: Rollout, domains: Mapping[str, DomainSpec]) -> float:
    """The reward of one response text, by any verifier but `command`, which takes a batch at once."""
    spec, prompt = domains[rollout.domain], rollout.prompt
    if spec.verifier == "none":
        return 0.0
    if spec.verifier == "ifeval":
        return judge(after_reasoning(response), read_instructions(prompt.record, prompt.id)).reward
    answer = final_answer(response)
    if spec.verifier == "exact":
        return float(answer == prompt.answer.strip())
    if spec.verifier == "math":
        return score_math(answer, prompt.answer)
    assert spec.source.reasoning_gym is not None
    return score_task(answer, spec.source.reasoning_gym, spec.source.params, prompt.record)


def final_answer(response: str) -> str:
    """What is to be judged: the text after the reasoning, inside the last <answer> tag if there is one."""
    text = response.rpartition("</think>")[2]
    _, opened, tagged = text.rpartition("<answer>")
    if opened:
        text = tagged.partition("</answer>")[0]
    return text.strip()


def score_task(answer: str, task: str, params: Mapping[str, Any], record: Mapping[str, Any]) -> float:
    """The task's own score; 0 for what its scorer chokes on, must not evaluate, or takes too long for."""
    if task in EVALUATING_TASKS and not _safe_to_evaluate(answer):
        return 0.0
    scorer = _task_scorer(task, json.dumps(params, sort_keys=True))
    try:
        with _cpu_limit(CPU_SECONDS_PER_ANSWER):
            value = float(scorer(answer, dict(record)))
    except (*_GARBAGE, _TooSlow):
        return 0.0
    return min(max(value, 0.0), 1.0)


def score_math(answer: str, truth: str) -> float:
    """1 when math-verify finds the two equal: numbers, fractions, LaTeX, boxed or plain."""
    if answer == truth.strip():
        return 1.0
    # Imported here: two seconds that runs without this verifier need not pay.
    from math_verify import parse, verify

    expected = list(_parse_truth(truth))
    try:
        with _cpu_limit(CPU_SECONDS_PER_ANSWER):
            given = parse(answer, parsing_timeout=_NO_ALARM)
            return float(verify(expected, given, timeout_seconds=_NO_ALARM)) if given else 0.0
    except _TooSlow:
        return 0.0


def group_advantages(rollouts: Sequence[Rollout], normalise_by_std: bool) -> list[Rollout]:
    """The rollouts with outcome_advantage = (r - mean) / (std + 1e-6) over the samples of their prompt.

    GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2), with the population standard deviation; without
    `normalise_by_std` only centred (Dr. GRPO, arXiv 2503.20783). A group with equal rewards gets exactly 0, and so does
    an episode that its environment failed: it says nothing about the student and is in no group's mean.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, rollout in enumerate(rollouts):
        if rollout.episode is None or not rollout.episode.failed:
            groups[rollout.prompt.id].append(index)
    advantages = np.zeros(len(rollouts))
    for indices in groups.values():
        rewards = np.array([rollouts[index].reward for index in indices], dtype=np.float64)
        if rewards.min() == rewards.max():
            continue  # the mean may be off by a bit, which a std of about 0 would blow up
        scale = rewards.std() + 1e-6 if normalise_by_std else 1.0
        advantages[indices] = (rewards - rewards.mean()) / scale
    return [
        dataclasses.replace(rollout, outcome_advantage=float(value))
        for rollout, value in zip(rollouts, advantages, strict=True)
    ]


@lru_cache(maxsize=64)
def _task_scorer(task: str, params: str) -> Callable[[str, dict[str, Any]], float]:
    return build_task(task, json.loads(params), seed=0, size=1, key=f"task {task}").score_answer


@lru_cache(maxsize=4096)
def _parse_truth(truth: str) -> tuple[Any, ...]:
    from math_verify import parse

    # Boxed, so that bare LaTeX is read as such; the samples of one prompt share the result.
    text = truth if "\\boxed" in truth else f"\\boxed{{{truth.strip().strip('$')}}}"
    parsed = parse(text, parsing_timeout=_NO_ALARM)
    if not parsed:
        raise ConfigError(f"reference answer {truth!r}: math-verify cannot read it; use verifier exact, or correct it")
    return tuple(parsed)


def _safe_to_evaluate(answer: str) -> bool:
    """Whether it is data or a formula, with no attribute, call or power that may do harm or never end."""
    if "__" in answer or "lambda" in answer or _HUGE_POWER.search(answer):
        return False
    return all(name in _HARMLESS_CALLS for name in _CALL.findall(answer))


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise _TooSlow

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)

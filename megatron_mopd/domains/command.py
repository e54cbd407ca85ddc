"""`verifier: command`: responses scored by a program of yours, a whole batch at once.

The program is started once per batch and rank, in the folder where `mopd` was started. On its standard input it
gets one line of JSON per response and then the end of the file:

    {"id": text, "prompt": text, "response": text, "answer": text, "record": the line of the source}

`response` is all that the model wrote, its reasoning included. On its standard output it writes, in any order,
one line of JSON for each id, and nothing else; logs belong on standard error:

    {"id": text, "score": number from 0 to 1}

Before a run starts it gets one empty batch, which it answers with nothing: what is not installed shows then.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from megatron_mopd.config import DomainSpec
from megatron_mopd.yaml_config import ConfigError

_EXCERPT = 200
"""Characters of a program's output that an error shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One response with what is needed to score it; the line that the program reads."""

    id: str
    prompt: str
    response: str
    answer: str
    record: Mapping[str, Any]


def check_command(key: str, spec: DomainSpec) -> None:
    """Raise ConfigError when a command cannot be started or does not survive an empty batch.

    `key` is where `spec` stands in the configuration, as domains.math; errors name it.
    """
    if spec.verifier != "command":
        return
    if shutil.which(spec.command[0]) is None:
        raise ConfigError(f"{key}.command: no program '{spec.command[0]}' here; install it or give its path")
    score_by_command(key, spec, [])


def score_by_command(key: str, spec: DomainSpec, questions: Sequence[Question]) -> list[float]:
    """The scores in the order of `questions`, whose ids differ.

    Raises ConfigError when the program fails, takes longer than `command_seconds`, or leaves out a score.
    """
    output = _run(f"{key}.command", spec, "".join(_as_line(question) for question in questions))
    scores = _read_scores(f"{key}.command", output)
    expected = {question.id for question in questions}
    for kind, ids in (("no score for", expected - set(scores)), ("a score for unknown", set(scores) - expected)):
        if ids:
            raise ConfigError(
                f"{key}.command: {kind} id {min(ids)!r} ({len(ids)} of {len(expected)});"
                " write one line for each line read, with its id"
            )
    return [scores[question.id] for question in questions]


def question_text(record: Mapping[str, Any]) -> str:
    """What a source's line asks, without the chat template."""
    if isinstance(record.get("messages"), list):
        return "\n".join(message["content"] for message in record["messages"])
    return str(record.get("prompt", record.get("question", "")))


def read_questions(lines: Iterable[str]) -> list[Question]:
    """What such a program reads: for those that are written in Python."""
    return [Question(**json.loads(line)) for line in lines if line.strip()]


def write_scores(scores: Mapping[str, float], output: TextIO) -> None:
    """What such a program answers."""
    for identity, score in scores.items():
        print(json.dumps({"id": identity, "score": score}), file=output)


def by_sample(questions: Iterable[Question], key: Callable[[Question], str]) -> list[list[Question]]:
    """Rounds in which each key occurs at most once: for harnesses that take one response per question."""
    seen: Counter[str] = Counter()
    rounds: list[list[Question]] = []
    for question in questions:
        number = seen[key(question)]
        seen[key(question)] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(question)
    return rounds


def _as_line(question: Question) -> str:
    # A reasoning-gym entry may hold what JSON does not know; its text is better than no batch.
    return json.dumps(asdict(question), default=str) + "\n"


def _run(key: str, spec: DomainSpec, lines: str) -> str:
    try:
        # A session of its own: its children end with it, and Ctrl-C lets the step finish first.
        process = subprocess.Popen(
            spec.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"{key}: cannot start '{spec.command[0]}': {error.strerror}") from None
    try:
        output, problems = process.communicate(lines, timeout=spec.command_seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        count = lines.count("\n")
        raise ConfigError(
            f"{key}: no end after {spec.command_seconds:g} s for {count} responses; raise command_seconds"
        ) from None
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        last = (problems.strip() or "nothing on standard error").splitlines()[-1]
        command = shlex.join(spec.command)
        raise ConfigError(f"{key}: {command!r} ended with code {process.returncode}: {last[:_EXCERPT]}")
    return output


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the program and its children."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()


def _read_scores(key: str, output: str) -> dict[str, float]:
    scores: dict[str, float] = {}
    for number, line in enumerate(output.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{key}: line {number} of its output"
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            raise ConfigError(f"{where} is not JSON: {line[:_EXCERPT]!r}; print logs to standard error") from None
        if not isinstance(value, dict) or not isinstance(value.get("id"), str):
            raise ConfigError(f'{where}: expected {{"id": text, "score": number}}, got {line[:_EXCERPT]!r}')
        score = value.get("score")
        if not isinstance(score, int | float) or not math.isfinite(score) or not 0 <= score <= 1:
            raise ConfigError(f"{where}: the score must be a number from 0 to 1, got {score!r}")
        if value["id"] in scores:
            raise ConfigError(f"{where}: a second score for id {value['id']!r}; write one line per id")
        scores[value["id"]] = float(score)
    return scores

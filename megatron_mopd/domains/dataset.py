"""The file of stored answers: what `mopd sample` writes and `rollout.engine: dataset` learns from.

JSON lines: a header (where the answers come from), one line an answer, and a footer (what they cost). Reading checks
every line once and remembers where it is; an answer is read from the file again when its turn comes, so that a
dataset of any size needs a few bytes of memory an answer.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import FinishReason, Rollout
from megatron_mopd.yaml_config import ConfigError

VERSION = 1
SAMPLE_AGAIN = "write it again with `mopd sample`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The header: who answered, in which tokens."""

    vocabulary: str
    """Hash of the tokenizer's (token, id) pairs."""
    chat_template: str
    stop_ids: list[int]
    teachers: dict[str, str]
    """domain -> hash of the weights that answered."""
    keep: str
    """all · correct: only answers with the verifier's full score."""
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The footer. Of all answers, those that were left out among them."""

    answers: int
    """Lines in the file."""
    sampled: dict[str, int]
    """domain -> answers sampled."""
    left_out: dict[str, int]
    """domain -> answers of these that are wrong and not in the file (`--keep correct`)."""
    generated_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    """One line: a prompt of a domain and what its teacher answered."""

    domain: str
    id: str
    """The prompt's id in the run that sampled it."""
    question: str
    """`Prompt.question`: tells whether it is one to evaluate on."""
    sample: int
    prompt: list[int]
    """Token ids."""
    response: list[int]
    """Token ids, the stop token among them."""
    finish_reason: FinishReason
    reward: float

    @classmethod
    def of(cls, rollout: Rollout) -> StoredAnswer:
        return cls(
            domain=rollout.domain,
            id=rollout.prompt.id,
            question=rollout.prompt.question,
            sample=rollout.sample,
            prompt=rollout.prompt.token_ids.tolist(),
            response=rollout.response_ids.tolist(),
            finish_reason=rollout.finish_reason,
            reward=rollout.reward,
        )


def origin_of(tokenizer: Tokenizer, teachers: Mapping[str, str], keep: str) -> Origin:
    fingerprint = tokenizer.fingerprint
    return Origin(
        vocabulary=fingerprint.vocab_hash,
        chat_template=fingerprint.template_hash,
        stop_ids=list(fingerprint.stop_ids),
        teachers=dict(teachers),
        keep=keep,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    checksum: int


class Dataset:
    """A dataset file that was read once and found good. `fingerprint` is of its contents, without the footer."""

    def __init__(self, path: Path, origin: Origin, cost: Cost, fingerprint: str, places: Mapping[str, list[_Place]]):
        self.path, self.origin, self.cost, self.fingerprint = path, origin, cost, fingerprint
        self._places = places

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> Dataset:
        """Check every line. Raises ConfigError with file and line for a broken one, or an incomplete file."""
        digest = hashlib.sha256()
        places: dict[str, list[_Place]] = {}
        origin = cost = None
        offset = lines = 0
        for number, raw in enumerate(_lines(path), start=1):
            where = f"{path}:{number}"
            line = _parse(raw, where)
            if number == 1:
                origin = _origin(line, where)
            elif "cost" in line:
                cost = _fill(Cost, line["cost"], where)
            else:
                answer = parse_answer(line, where, vocab_size)
                places.setdefault(answer.domain, []).append(_Place(offset, zlib.crc32(raw)))
                lines += 1
            if cost is None:
                digest.update(raw)
            offset += len(raw)
        if origin is None or cost is None or cost.answers != lines:
            found = "no last line" if cost is None else f"{lines} answers, its last line says {cost.answers}"
            raise ConfigError(f"rollout.dataset: {path} is incomplete ({found}); {SAMPLE_AGAIN}")
        return cls(path, origin, cost, digest.hexdigest(), places)

    def size(self, domain: str) -> int:
        return len(self._places.get(domain, ()))

    def answer(self, domain: str, index: int) -> StoredAnswer:
        """Raises ConfigError when the file is not what it was when it was loaded."""
        place = self._places[domain][index]
        try:
            with self.path.open("rb") as file:
                file.seek(place.offset)
                raw = file.readline()
        except OSError as error:
            raise ConfigError(f"rollout.dataset: {self.path}: {error.strerror}; restore it and resume") from None
        if zlib.crc32(raw) != place.checksum:
            raise ConfigError(f"rollout.dataset: {self.path} was changed while the run reads it; restore it and resume")
        return StoredAnswer(**json.loads(raw))

    def check(self, domains: Mapping[str, object], tokenizer: Tokenizer) -> None:
        """Raise ConfigError unless the answers are in the student's tokens and every domain has some."""
        own = origin_of(tokenizer, {}, "")
        for name, what in (
            ("vocabulary", "vocabulary"),
            ("chat_template", "chat template"),
            ("stop_ids", "stop tokens"),
        ):
            if getattr(own, name) != getattr(self.origin, name):
                raise ConfigError(
                    f"rollout.dataset: {self.path} was written with another tokenizer than the student's: the {what} "
                    f"differs; {SAMPLE_AGAIN} and teachers of the student's family"
                )
        for domain in domains:
            if not self.size(domain):
                known = ", ".join(self._places) or "none"
                raise ConfigError(
                    f"rollout.dataset: {self.path} has no answer of domain '{domain}' (it has {known}); "
                    f"remove the domain, or {SAMPLE_AGAIN}"
                )

    def check_teachers(self, weights: Mapping[str, str]) -> None:
        """Raise ConfigError for a domain (-> hash of its teacher's weights) whose answers are another model's."""
        for domain, found in weights.items():
            stored = self.origin.teachers.get(domain, "")
            if stored != found:
                raise ConfigError(
                    f"rollout.dataset: {self.path}: domain '{domain}' was answered by weights {stored[:12]}, its "
                    f"teacher has {found[:12]}; {SAMPLE_AGAIN}"
                )


def read_cost(path: Path) -> Cost:
    """The footer. Raises ConfigError for an incomplete file."""
    *_, last = _lines(path)
    line = _parse(last, str(path))
    if "cost" not in line:
        raise ConfigError(f"{path} is incomplete (no last line); {SAMPLE_AGAIN}")
    return _fill(Cost, line["cost"], str(path))


def parse_answer(line: Mapping[str, Any], where: str, vocab_size: int) -> StoredAnswer:
    """Raises ConfigError naming file and line for a key that is missing, unknown or of the wrong kind."""
    answer = _fill(StoredAnswer, line, where)
    for name in ("prompt", "response"):
        ids = getattr(answer, name)
        if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
            raise ConfigError(f'{where}: "{name}" must be a list of token ids, not empty; {SAMPLE_AGAIN}')
        if min(ids) < 0 or max(ids) >= vocab_size:
            bad = next(token for token in ids if not 0 <= token < vocab_size)
            raise ConfigError(f'{where}: token {bad} of "{name}" is outside the vocabulary of {vocab_size}')
    for name in ("domain", "id", "question"):
        if not isinstance(getattr(answer, name), str):
            raise ConfigError(f'{where}: "{name}" must be a string, got {getattr(answer, name)!r}')
    if answer.finish_reason not in ("stop", "length"):
        raise ConfigError(f'{where}: "finish_reason" must be stop or length, got {answer.finish_reason!r}')
    if isinstance(answer.reward, bool) or not isinstance(answer.reward, int | float) or not 0 <= answer.reward <= 1:
        raise ConfigError(f'{where}: "reward" must be a number in [0, 1], got {answer.reward!r}')
    return answer


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            empty = True
            for raw in file:
                empty = False
                yield raw
    except OSError as error:
        raise ConfigError(f"rollout.dataset: {path}: {error.strerror}; `mopd sample CONFIG --out {path}`") from None
    if empty:
        raise ConfigError(f"rollout.dataset: {path} is empty; {SAMPLE_AGAIN}")


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a line of JSON: {error}; {SAMPLE_AGAIN}") from None
    if not isinstance(line, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(line).__name__}; {SAMPLE_AGAIN}")
    return line


def _origin(line: Mapping[str, Any], where: str) -> Origin:
    if "origin" not in line:
        raise ConfigError(f"{where}: does not say where the answers are from: not a file of `mopd sample`")
    version = line["origin"].get("version") if isinstance(line["origin"], dict) else None
    if version != VERSION:
        raise ConfigError(f"{where}: format {version}, this program reads {VERSION}; {SAMPLE_AGAIN}")
    return _fill(Origin, line["origin"], where)


def _fill[T](cls: type[T], tree: Any, where: str) -> T:
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    if not isinstance(tree, dict) or set(tree) != set(names):
        given = ", ".join(tree) if isinstance(tree, dict) else repr(tree)
        raise ConfigError(f"{where}: expected the keys {', '.join(names)}, got {given}; {SAMPLE_AGAIN}")
    return cls(**tree)

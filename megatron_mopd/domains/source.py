"""Where a domain's questions come from: a reasoning-gym task without end, or the lines of a JSONL file.

An item is a pure function of (seed, index): a run that resumes at an index sees what it would have seen.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_mopd.tokenizer import Message
from megatron_mopd.yaml_config import ConfigError

CHUNK = 10_000
"""Items of a reasoning-gym data set. Some tasks build all items at once, one refuses more than 20,000: an
endless stream is therefore a sequence of small sets with seeds of their own."""

# What third-party generators raise for parameters that do not go together, and for items they cannot make.
_TASK_ERRORS = (AssertionError, TypeError, ValueError, LookupError, ArithmeticError, OSError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question with its reference answer."""

    messages: tuple[Message, ...]
    answer: str
    """'' where the source has none (several reasoning-gym tasks only have a scorer)."""
    record: Mapping[str, Any]
    """The source's own entry, for the task's scorer."""

    @property
    def key(self) -> str:
        """The question's text: two items with one key are the same question."""
        return "\n".join(message["content"] for message in self.messages)


class Source(Protocol):
    """An addressable sequence of questions."""

    @property
    def size(self) -> int | None:
        """Number of distinct items, after which they repeat in another order; None: without end."""

    def item(self, index: int) -> Item:
        """Item number `index`, any number >= 0."""


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from any parts.

    Needed because item i of a reasoning-gym task depends on seed + i: seeds 0 and 1 are one stream, shifted.
    """
    return _digest(parts) % 2**31


def unit_interval(*parts: object) -> float:
    """A number in [0, 1) that is a function of the parts."""
    return _digest(parts) % 2**53 / 2**53


def _digest(parts: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


class ReasoningGymSource:
    """A procedural reasoning-gym task; `key` is the configuration key that is named in errors."""

    size = None

    def __init__(self, task: str, params: Mapping[str, Any], seed: int, key: str = "source"):
        self._task, self._params, self._seed, self._key = task, dict(params), seed, key
        self._chunks: dict[int, Any] = {}
        self._chunk(0)

    def item(self, index: int) -> Item:
        try:
            entry = self._chunk(index // CHUNK)[index % CHUNK]
        except _TASK_ERRORS as error:
            raise ConfigError(
                f"{self._key}: reasoning-gym task '{self._task}' cannot make item {index}: {_words(error)};"
                " change its parameters"
            ) from error
        message = {"role": "user", "content": entry["question"]}
        return Item(messages=(message,), answer=_text(entry["answer"]), record=entry)

    def _chunk(self, number: int) -> Any:
        return _remember(
            self._chunks,
            number,
            lambda: build_task(self._task, self._params, self._chunk_seed(number), CHUNK, self._key),
        )

    def _chunk_seed(self, number: int) -> int:
        return derive_seed(self._seed, self._task, number)


def build_task(task: str, params: Mapping[str, Any], seed: int, size: int, key: str) -> Any:
    """The reasoning-gym data set of a task, or ConfigError naming `key` and what is known instead."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "reasoning-gym lists its tasks in its GALLERY"
        raise ConfigError(f"{key}.reasoning_gym: no task '{task}'; {hint}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1])]
    for name in params:
        if name in ("seed", "size"):
            raise ConfigError(f"{key}.{name}: is set by this program; remove it (the run's own key is `seed`)")
        if name not in known:
            names = ", ".join(other for other in known if other not in ("seed", "size"))
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigError(f"{key}.{name}: unknown parameter of task '{task}'; {hint}it takes {names}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **params)
    except _TASK_ERRORS as error:
        raise ConfigError(f"{key}: reasoning-gym task '{task}' refuses its parameters: {_words(error)}") from error


class JsonlSource:
    """Items in a new order every epoch: index = epoch * size + position."""

    def __init__(self, items: Sequence[Item], seed: int):
        if not items:
            raise ValueError("a JSONL source needs at least one item")
        self._items, self._seed = items, seed
        self._orders: dict[int, list[int]] = {}

    @property
    def size(self) -> int:
        return len(self._items)

    def item(self, index: int) -> Item:
        epoch, position = divmod(index, len(self._items))
        return self._items[_remember(self._orders, epoch, lambda: self._order(epoch))[position]]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._items)))
        random.Random(derive_seed(self._seed, epoch)).shuffle(order)
        return order


def read_jsonl(
    path: Path, domain: str, *, needs_answer: bool, check: Callable[[Mapping[str, Any], str], object] | None = None
) -> list[Item]:
    """The lines of `domain`: those without a "domain", and those that name this one.

    Each line is {"prompt": text | "messages": [{"role", "content"}, ...], "answer": text, "domain"?: text};
    blank lines are skipped. `check(line, "file:number")` looks at what else the verifier needs of a line.
    Raises ConfigError with file and line for a broken one, and for no line at all.
    """
    items = []
    lines = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    lines += 1
                    item = _parse_line(raw, f"{path}:{number}", domain, needs_answer)
                    if item is not None:
                        if check is not None:
                            check(item.record, f"{path}:{number}")
                        items.append(item)
    except OSError as error:
        raise ConfigError(f"domains.{domain}.source: {path}: {error.strerror}") from None
    if not lines:
        raise ConfigError(f"domains.{domain}.source: {path} is empty")
    if not items:
        raise ConfigError(f"domains.{domain}.source: none of the {lines} lines of {path} is of domain '{domain}'")
    return items


def split_held_out(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(training, held out): a question is held out when sha256 of its text is 0 mod 10."""
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        parts[int(hashlib.sha256(item.key.encode()).hexdigest(), 16) % 10 == 0].append(item)
    return parts


def _parse_line(raw: bytes, where: str, domain: str, needs_answer: bool) -> Item | None:
    try:
        line = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(line, dict):
        raise ConfigError(f'{where}: expected {{"prompt" or "messages", "answer"}}, got {type(line).__name__}')
    if line.get("domain", domain) != domain:
        return None
    answer = line.get("answer")
    if answer is None and not needs_answer:
        answer = ""
    if not isinstance(answer, str):
        problem = "is missing" if "answer" not in line else f"must be a string, got {answer!r}"
        raise ConfigError(f'{where}: "answer" {problem}')
    if needs_answer and not answer.strip():
        raise ConfigError(f'{where}: "answer" is empty; give the reference answer, or use verifier none')
    return Item(messages=_parse_messages(line, where), answer=answer, record=line)


def _parse_messages(line: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    if ("prompt" in line) == ("messages" in line):
        raise ConfigError(f'{where}: give exactly one of "prompt" and "messages"')
    if "prompt" in line:
        if not isinstance(line["prompt"], str) or not line["prompt"]:
            raise ConfigError(f'{where}: "prompt" must be a non-empty string, got {line["prompt"]!r}')
        return ({"role": "user", "content": line["prompt"]},)
    messages = line["messages"]
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{where}: "messages" must be a non-empty list')
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise ConfigError(f'{where}: a message must have "role" and "content" strings, got {message!r}')
    if messages[-1]["role"] == "assistant":
        raise ConfigError(f'{where}: the last message is the assistant\'s; put the answer into "answer"')
    return tuple(messages)


def _remember[T](cache: dict[int, T], number: int, make: Callable[[], T]) -> T:
    """`make()` once for each number, of which the two latest are kept: looking ahead crosses one boundary."""
    if number not in cache:
        value = make()
        if len(cache) >= 2:
            del cache[next(iter(cache))]
        cache[number] = value
    return cache[number]


def _text(answer: Any) -> str:
    return "" if answer is None else str(answer)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__

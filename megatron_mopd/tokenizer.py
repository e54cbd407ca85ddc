"""Text to token ids and back, and the chat template, from a Hugging Face model folder.

Reads tokenizer.json with the `tokenizers` library and renders the template with Jinja, as `transformers` does
(a test compares the two), but without importing transformers: 0.1 s instead of about 1 s in every process of
every stage. Nothing from the folder is executed except the template, in Jinja's sandbox.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_mopd.types import IntArray
from megatron_mopd.yaml_config import ConfigError, read_text

Message = Mapping[str, str]
"""One turn of a chat: {"role": ..., "content": ...}, what every chat template takes."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFingerprint:
    """What two tokenizers must share for one to score the other's tokens."""

    vocab_size: int
    vocab_hash: str
    """sha256 over the sorted (token, id) pairs."""
    template_hash: str
    """sha256 of the chat template; '' without one."""
    stop_ids: tuple[int, ...]


class Tokenizer:
    """The tokenizer of one model folder. Build it with `Tokenizer.load`."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], template: str | None, origin: Path):
        self._backend = backend
        self._origin = origin
        self._special = {name: _content(config.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
        self.template = template
        """Source of the chat template, None without one."""
        self.eos_id = self._special_id("eos")
        self.pad_id = self._special_id("pad") if self._special["pad"] else self.eos_id
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.stop_ids: tuple[int, ...] = tuple(sorted({self.eos_id, *_generation_stops(origin)}))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer and chat template of a model folder with a tokenizer.json. Raises ConfigError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder}: has no tokenizer.json; write one with transformers:"
                f" AutoTokenizer.from_pretrained(...).save_pretrained('{folder}')"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(path, "tokenizer"))
        except Exception as error:  # the Rust library raises bare Exception and nothing narrower
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        backend.no_padding()
        backend.no_truncation()
        config = _read_json(folder / "tokenizer_config.json")
        _add_missing_tokens(backend, config, folder)
        return cls(backend, config, _read_template(folder, config), folder)

    def render(self, messages: Sequence[Message]) -> IntArray:
        """[P] token ids of a chat by the model's template, up to where the assistant's answer begins."""
        return self.encode(self.render_text(messages))

    def render_text(self, messages: Sequence[Message]) -> str:
        """The text that `render` tokenises. Raises ConfigError without a template or where it refuses."""
        special = {f"{name}_token": token for name, token in self._special.items() if token is not None}
        try:
            return self._compiled_template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **special
            )
        except jinja2.TemplateError as error:
            raise ConfigError(f"{self._origin}: the chat template refuses the messages: {error}") from None

    def encode(self, text: str) -> IntArray:
        """[T] token ids; no special token is added, those written out in the text are recognised."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_plain(self, text: str) -> IntArray:
        """[T] token ids of text from outside: a special token that is written out in it is text like any other."""
        text = text.encode("utf-8", "replace").decode()  # JSON may hold halves of surrogate pairs
        return np.array(self._plain_backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | IntArray, *, keep_special: bool = False) -> str:
        """Text of token ids, without special tokens unless asked for."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=not keep_special)

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    @cached_property
    def fingerprint(self) -> TokenizerFingerprint:
        pairs = json.dumps(sorted(self.vocabulary.items()))
        return TokenizerFingerprint(
            vocab_size=self.vocab_size,
            vocab_hash=hashlib.sha256(pairs.encode()).hexdigest(),
            template_hash=hashlib.sha256(self.template.encode()).hexdigest() if self.template else "",
            stop_ids=self.stop_ids,
        )

    @cached_property
    def _compiled_template(self) -> jinja2.Template:
        if self.template is None:
            raise ConfigError(
                f"{self._origin}: has no chat template; add chat_template.jinja, or name the instruct model"
            )
        try:
            return _template_environment().from_string(self.template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{self._origin}: the chat template is not valid Jinja: {error}") from None

    def _special_id(self, name: str) -> int:
        token = self._special[name]
        index = self._backend.token_to_id(token) if token is not None else None
        if index is None:
            raise ConfigError(
                f"{self._origin / 'tokenizer_config.json'}: {name}_token {token!r} is not in the vocabulary;"
                " set it to one of the tokenizer's tokens"
            )
        return index


def difference(student: Tokenizer, teacher: Tokenizer, names: tuple[str, str] = ("student", "teacher")) -> str | None:
    """In words, why a teacher's tokenizer cannot score the student's tokens; None where it can.

    `names` is what the two are called in the message.
    """
    ours, theirs = student.fingerprint, teacher.fingerprint
    reasons = []
    if ours.vocab_hash != theirs.vocab_hash:
        changed = sorted(
            (index, token) for token, index in student.vocabulary.items() ^ teacher.vocabulary.items()
        )  # a moved token counts once per side, so divide by distinct tokens
        tokens = {token for _, token in changed}
        token = changed[0][1]
        reasons.append(
            f"the vocabulary: {ours.vocab_size} entries against {theirs.vocab_size}, {len(tokens)} differ,"
            f" first {token!r} ({names[0]}: {_id_of(student, token)}, {names[1]}: {_id_of(teacher, token)})"
        )
    if ours.template_hash != theirs.template_hash:
        reasons.append("the chat template")
    if ours.stop_ids != theirs.stop_ids:
        reasons.append(f"the stop tokens: {list(ours.stop_ids)} against {list(theirs.stop_ids)}")
    return f"{names[0]} and {names[1]} differ in {'; in '.join(reasons)}" if reasons else None


def _id_of(tokenizer: Tokenizer, token: str) -> str:
    index = tokenizer.vocabulary.get(token)
    return "missing" if index is None else f"id {index}"


def _content(token: Any) -> str | None:
    """tokenizer_config.json gives special tokens as strings or as {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(read_text(path, "tokenizer file"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template file goes before the key, and of several named templates the default one counts."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, "chat template")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Some models list added tokens in tokenizer_config.json only; they must get the ids given there."""
    listed = {int(index): entry for index, entry in config.get("added_tokens_decoder", {}).items()}
    for index, entry in sorted(listed.items()):
        if backend.token_to_id(entry["content"]) is None:
            backend.add_tokens([tokenizers.AddedToken(**{k: v for k, v in entry.items() if k != "__type"})])
        found = backend.token_to_id(entry["content"])
        if found != index:
            raise ConfigError(
                f"{folder}: tokenizer_config.json gives {entry['content']!r} the id {index}, tokenizer.json"
                f" {found}; take both files from the same release"
            )


def _generation_stops(folder: Path) -> list[int]:
    stops = _read_json(folder / "generation_config.json").get("eos_token_id")
    if stops is None:
        return []
    return stops if isinstance(stops, list) else [stops]


class _GenerationBlock(Extension):
    """`{% generation %}`, which some templates put around the assistant's text: its contents, unchanged."""

    tags = {"generation"}  # noqa: RUF012 - the attribute that Jinja reads

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_environment() -> jinja2.Environment:
    """The environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment

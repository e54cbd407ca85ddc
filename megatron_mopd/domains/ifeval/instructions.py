"""The 25 instruction kinds of IFEval, what arguments each takes, and how a record's instructions are read.

A record has "instruction_id_list" and, in the same order, "kwargs". Arguments that are null are absent: the
published data set pads with them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mopd.domains.ifeval import checks
from megatron_mopd.domains.ifeval.language import LANGUAGES
from megatron_mopd.yaml_config import ConfigError

RELATIONS = ("less than", "at least")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction of a prompt, with arguments that its check takes."""

    kind: str
    arguments: Mapping[str, Any]

    def followed_by(self, response: str) -> bool:
        """Whether this very text follows it; an empty text follows nothing."""
        return bool(response.strip()) and _KINDS[self.kind].check(response, **self.arguments)


def read_instructions(record: Mapping[str, Any], where: str) -> tuple[Instruction, ...]:
    """The instructions of a record; ConfigError begins with `where` and names what is wrong and what is known."""
    kinds, arguments = record.get("instruction_id_list"), record.get("kwargs")
    if not isinstance(kinds, list) or not kinds:
        raise ConfigError(
            f'{where}: verifier ifeval needs "instruction_id_list", a non-empty list; `mopd benchmark ifeval` writes it'
        )
    if not isinstance(arguments, list) or len(arguments) != len(kinds):
        raise ConfigError(
            f'{where}: "kwargs" must be a list with one mapping for each of the {len(kinds)} instructions'
        )
    return tuple(_read(kind, given, where) for kind, given in zip(kinds, arguments, strict=True))


def _read(kind: object, given: object, where: str) -> Instruction:
    if not isinstance(kind, str) or kind not in _KINDS:
        close = difflib.get_close_matches(str(kind), _KINDS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(
            f"{where}: unknown instruction kind {kind!r}; {hint}known: {', '.join(_KINDS)};"
            " for kinds of your own use verifier command"
        )
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: kwargs of {kind} must be a mapping, got {given!r}")
    wanted = _KINDS[kind].arguments
    arguments = {name: value for name, value in given.items() if value is not None}
    names = ", ".join(wanted) or "none"
    for name in arguments:
        if name not in wanted:
            raise ConfigError(f"{where}: {kind} takes no argument '{name}'; its arguments: {names}")
    for name, parameter in wanted.items():
        if name not in arguments:
            raise ConfigError(f"{where}: {kind} lacks its argument '{name}'; its arguments: {names}")
        if not parameter.accepts(arguments[name]):
            raise ConfigError(f"{where}: {kind}: {name} must be {parameter.words}, got {arguments[name]!r}")
    if kind.endswith("nth_paragraph_first_word") and arguments["nth_paragraph"] > arguments["num_paragraphs"]:
        raise ConfigError(f"{where}: {kind}: nth_paragraph {arguments['nth_paragraph']} is beyond num_paragraphs")
    return Instruction(kind=kind, arguments=arguments)


@dataclass(frozen=True, slots=True)
class _Parameter:
    words: str
    accepts: Callable[[object], bool]


@dataclass(frozen=True, slots=True)
class _Kind:
    check: Callable[..., bool]
    arguments: Mapping[str, _Parameter]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


_COUNT = _Parameter("a whole number >= 0", _is_count)
_PLACE = _Parameter("a whole number >= 1", lambda value: _is_count(value) and value != 0)
_TEXT = _Parameter("a non-empty text", _is_text)
_TEXTS = _Parameter(
    "a non-empty list of texts", lambda value: isinstance(value, list) and bool(value) and all(map(_is_text, value))
)
_RELATION = _Parameter(" or ".join(map(repr, RELATIONS)), lambda value: value in RELATIONS)
_LANGUAGE = _Parameter(f"one of {', '.join(LANGUAGES)}", lambda value: value in LANGUAGES)
_LETTER = _Parameter("one character", lambda value: isinstance(value, str) and len(value) == 1 and not value.isspace())

_KINDS: dict[str, _Kind] = {
    "keywords:existence": _Kind(checks.existence, {"keywords": _TEXTS}),
    "keywords:frequency": _Kind(checks.frequency, {"keyword": _TEXT, "frequency": _COUNT, "relation": _RELATION}),
    "keywords:forbidden_words": _Kind(checks.forbidden_words, {"forbidden_words": _TEXTS}),
    "keywords:letter_frequency": _Kind(
        checks.letter_frequency, {"letter": _LETTER, "let_frequency": _COUNT, "let_relation": _RELATION}
    ),
    "language:response_language": _Kind(checks.response_language, {"language": _LANGUAGE}),
    "length_constraints:number_sentences": _Kind(
        checks.number_sentences, {"num_sentences": _COUNT, "relation": _RELATION}
    ),
    "length_constraints:number_paragraphs": _Kind(checks.number_paragraphs, {"num_paragraphs": _COUNT}),
    "length_constraints:number_words": _Kind(checks.number_words, {"num_words": _COUNT, "relation": _RELATION}),
    "length_constraints:nth_paragraph_first_word": _Kind(
        checks.nth_paragraph_first_word, {"num_paragraphs": _COUNT, "nth_paragraph": _PLACE, "first_word": _TEXT}
    ),
    "detectable_content:number_placeholders": _Kind(checks.number_placeholders, {"num_placeholders": _COUNT}),
    "detectable_content:postscript": _Kind(checks.postscript, {"postscript_marker": _TEXT}),
    "detectable_format:number_bullet_lists": _Kind(checks.number_bullet_lists, {"num_bullets": _COUNT}),
    "detectable_format:constrained_response": _Kind(checks.constrained_response, {}),
    "detectable_format:number_highlighted_sections": _Kind(
        checks.number_highlighted_sections, {"num_highlights": _COUNT}
    ),
    "detectable_format:multiple_sections": _Kind(
        checks.multiple_sections, {"section_spliter": _TEXT, "num_sections": _COUNT}
    ),
    "detectable_format:json_format": _Kind(checks.json_format, {}),
    "detectable_format:title": _Kind(checks.title, {}),
    "combination:two_responses": _Kind(checks.two_responses, {}),
    "combination:repeat_prompt": _Kind(checks.repeat_prompt, {"prompt_to_repeat": _TEXT}),
    "startend:end_checker": _Kind(checks.end_checker, {"end_phrase": _TEXT}),
    "startend:quotation": _Kind(checks.quotation, {}),
    "change_case:capital_word_frequency": _Kind(
        checks.capital_word_frequency, {"capital_frequency": _COUNT, "capital_relation": _RELATION}
    ),
    "change_case:english_capital": _Kind(checks.english_capital, {}),
    "change_case:english_lowercase": _Kind(checks.english_lowercase, {}),
    "punctuation:no_comma": _Kind(checks.no_comma, {}),
}
KINDS = tuple(_KINDS)
"""Names of the 25 kinds."""

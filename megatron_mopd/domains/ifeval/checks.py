"""What each kind of IFEval instruction asks of a response: one pure function per kind.

The definitions are those of IFEval (arXiv 2311.07911, table 3, and the program published with it); every function
takes the response first and then the instruction's arguments under IFEval's own names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from megatron_mopd.domains.ifeval.language import detect_language, same_language
from megatron_mopd.domains.ifeval.text import capital_words, count_sentences, count_words

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""Of `detectable_format:constrained_response`."""

_FENCE = re.compile(r"\A```(?:json|Json|JSON)?|```\Z")
_SINGLE_STARS = re.compile(r"\*([^\n*]*)\*")
_DOUBLE_STARS = re.compile(r"\*\*([^\n*]*)\*\*")
_BULLET = re.compile(r"[ \t]*(?:\*[^*\n]|-)")
_PARAGRAPH_DIVIDER = "***"
_RESPONSE_DIVIDER = "******"
_WORD_END = re.compile(r"""[.,?!'"]""")


def _compare(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def existence(response: str, keywords: Sequence[str]) -> bool:
    """Every keyword occurs, in any case, also inside of a word."""
    return all(keyword.lower() in response.lower() for keyword in keywords)


def frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs so many times, in any case, also inside of words."""
    return _compare(response.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a whole word, in any case."""
    patterns = (rf"\b{re.escape(word)}\b" for word in forbidden_words)
    return not any(re.search(pattern, response, re.IGNORECASE) for pattern in patterns)


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The character occurs so many times, in any case.

    The published checker takes a random letter where the instruction names another character (two of IFEval's
    prompts ask for # and !); here that character is counted.
    """
    return _compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(response: str, language: str) -> bool:
    """The response is in the language of that ISO 639-1 code; text without letters passes."""
    return same_language(detect_language(response), language)


def number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(response), relation, num_sentences)


def number_words(response: str, num_words: int, relation: str) -> bool:
    return _compare(count_words(response), relation, num_words)


def number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Exactly so many parts between *** dividers; a divider may stand at either end, no part may be empty."""
    parts = [part.strip() for part in response.split(_PARAGRAPH_DIVIDER)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs between blank lines, and number `nth_paragraph` begins with that word."""
    parts = [part.strip() for part in response.split("\n\n")]
    filled = sum(map(bool, parts))
    if nth_paragraph > filled or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return filled == num_paragraphs and _WORD_END.split(word)[0].lower() == first_word.lower()


def number_placeholders(response: str, num_placeholders: int) -> bool:
    """At least so many [bracketed] places on one line each."""
    return sum(map(_placeholders, response.splitlines())) >= num_placeholders


def _placeholders(line: str) -> int:
    # Not a pattern: its search through ten thousand opening brackets would take minutes.
    count, start, end = 0, line.find("["), 0
    while start >= 0 and (end := line.find("]", start)) >= 0:
        count, start = count + 1, line.find("[", end)
    return count


def postscript(response: str, postscript_marker: str) -> bool:
    """The marker occurs, in any case; for P.S. and P.P.S a blank may follow each period."""
    marker = postscript_marker.strip()
    pattern = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, response.lower()) is not None


def number_bullet_lists(response: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with one * or with -."""
    return sum(_BULLET.match(line) is not None for line in response.splitlines()) == num_bullets


def constrained_response(response: str) -> bool:
    return any(option in response for option in OPTIONS)


def number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """At least so many *highlights* or **highlights** with something in them."""
    found = _SINGLE_STARS.findall(response) + _DOUBLE_STARS.findall(response)
    return sum(bool(text.strip()) for text in found) >= num_highlights


def multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings: the splitter followed by a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    """All of it is one JSON value, which may stand between ``` fences."""
    try:
        json.loads(_FENCE.sub("", response.strip()).strip())
    except (ValueError, RecursionError):  # the latter: thousands of opening brackets
        return False
    return True


def title(response: str) -> bool:
    """There is a <<title>> with something in it, on one line."""
    inner = (line.partition("<<")[2].rpartition(">>")[0] for line in response.splitlines())
    return any(text.strip("<> \t") for text in inner)


def two_responses(response: str) -> bool:
    """Two different parts with ****** between them; no part between dividers is empty."""
    parts = [part.strip() for part in response.split(_RESPONSE_DIVIDER)]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, end_phrase: str) -> bool:
    """The phrase is the end, in any case; quotation marks around all of the response do not count."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(len(capital_words(response)), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    return response.isupper() and same_language(detect_language(response), "en")


def english_lowercase(response: str) -> bool:
    return response.islower() and same_language(detect_language(response), "en")


def no_comma(response: str) -> bool:
    return "," not in response

"""Sentences and words as IFEval counts them, without the nltk data that its own program downloads.

The published checkers count sentences with nltk's trained English Punkt model and upper-case words with its
Treebank tokeniser. These are rules for the same two counts; they differ from the model on rare abbreviations.
"""

from __future__ import annotations

import re

_TITLES = frozenset("mr mrs ms dr prof st gen col capt lt sgt rev hon gov sen rep mt ft messrs".split())
"""Abbreviations before a name: what follows them is upper case and goes on."""
_ABBREVIATIONS = _TITLES | frozenset(
    "jr sr inc ltd co corp bros vs etc al dept est approx a.m p.m e.g i.e u.s u.k u.n u.s.a d.c ph.d b.c a.d p.s p.p.s"
    " jan feb mar apr jun jul aug sep sept oct nov dec vol fig ed eds cf ave blvd rd".split()
)
_END = re.compile(r"""(?<![.?!])[.?!]++["'”’)\]}*_]*+(?=\s|$)""")
_BEFORE_WORD = re.compile(r"""[\s("'\[{*_“‘]""")
_LONGEST_WORD = 32
"""Characters that are looked at before a period."""
_WORD = re.compile(r"\w+")

_BETWEEN = re.compile(r"""[\s\[\](){}<>;@#$%&?!"“”«»…]|--|\.{2,}|[,:](?!\d)""")
_CLITIC = re.compile(r"(?<=.)(?:N'T|'(?:S|M|D|LL|RE|VE))$")


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores: "don't" is two words, as in the published checker."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """Pieces that end with . ? or ! before white space, or with the text.

    A period does not end a sentence after an abbreviation or an initial that goes on, nor after an ellipsis
    before a lower-case word. A list's number does ("1. Mix" is two), as it does for the published checker.
    """
    count, start = 0, 0
    for end in _END.finditer(text):
        if _ends_sentence(text, end):
            count += 1
            start = end.end()
    return count + bool(text[start:].strip())


def _ends_sentence(text: str, end: re.Match[str]) -> bool:
    marks = end.group().rstrip("\"'”’)]}*_")
    following = text[end.end() :].lstrip(" \t\r\n\"'“‘([{*_")[:1]
    if not following or set(marks) & {"?", "!"}:
        return True
    if len(marks) > 1:
        return not following.islower()
    before = text[max(0, end.start() - _LONGEST_WORD) : end.start()]
    word = _BEFORE_WORD.split(before)[-1].lower()
    if word in _TITLES:
        return False
    if word in _ABBREVIATIONS or word.isdigit():
        return following.isupper()
    is_initial = len(word) == 1 and word.isalpha() and word != "i"
    return not is_initial


def capital_words(text: str) -> list[str]:
    """Words without a lower-case letter and with an upper-case one.

    Hyphens join, as IFEval says; a clitic is a word of its own (DON'T is DO and N'T), as its tokeniser has it.
    """
    words = [word.strip("'`.,:") for word in _BETWEEN.split(text)]
    parts = [part for word in words for part in _split_clitic(word)]
    return [part for part in parts if part.isupper()]


def _split_clitic(word: str) -> list[str]:
    clitic = _CLITIC.search(word)
    return [word[: clitic.start()], clitic.group()] if clitic else [word]

"""Sentences and words as IFEval counts them, without the nltk data that its own program downloads.

The published checkers count sentences with nltk's trained English Punkt model and upper-case words with its
Treebank tokeniser. These are rules for the same two counts; they differ from the model on rare abbreviations.
"""

# ruff: noqa: RUF001

from __future__ import annotations

import re

_TITLES = "mr mrs ms dr prof st gen col capt lt sgt rev hon gov sen rep mt ft messrs"
"""Abbreviations before a name: what follows them is upper case and goes on."""
_ABBREVIATIONS = (
    "jr sr inc ltd co corp bros vs etc al dept est approx a.m p.m e.g i.e u.s u.k u.n u.s.a d.c ph.d b.c a.d"
    " jan feb mar apr jun jul aug sep sept oct nov dec vol fig ed eds cf ave blvd rd"
)
_STARTERS = (
    "the a an it he she they we you i this that these those there here in on at for but and so if when while as his"
    " her their our its my no yes what who how why where then however also after before with by to let please"
)
"""Words that begin a sentence when they are capitalised after an abbreviation or an initial."""
_BEFORE_NAMES, _SHORT, _STARTING = (frozenset(words.split()) for words in (_TITLES, _ABBREVIATIONS, _STARTERS))
_POSTSCRIPTS = frozenset({"p.s", "p.p.s"})
"""They look like initials but stand alone."""
_CLOSERS = "\"'”’)]}*_"
_END = re.compile(rf"(?<![.?!])[.?!]++(?:[{re.escape(_CLOSERS)}]++,?)?(?=\s|$)")
_BEFORE_WORD = re.compile(r"""[\s("'\[{*_“‘]""")
_NEXT_WORD = re.compile(r"[\s\"'“‘(\[{*_]*(\w*)")
_INITIALS = re.compile(r"[^\W\d_](?:\.[^\W\d_])*")
_LONGEST_WORD = 32
"""Characters that are looked at before a period."""
_WORD = re.compile(r"\w+")

_BETWEEN = re.compile(r"""[\s\[\](){}<>;@#$%&?!"“”«»…]|--|\.{2,}|[,:](?!\d)""")
_CLITIC = re.compile(r"(?<=.)(?:n't|'(?:s|m|d|ll|re|ve))$", re.IGNORECASE)


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores: "don't" is two words, as in the published checker."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """Pieces that end with . ? or ! before white space or with closing quotes or brackets, or with the text.

    A period ends no sentence after an abbreviation or an initial that goes on, nor after an ellipsis before a
    lower-case word. A list's number does ("1. Mix" is two), as it does for the published checker.
    """
    ends = [end.end() for end in _END.finditer(text) if _ends_sentence(text, end)]
    rest = text[ends[-1] if ends else 0 :]
    return len(ends) + bool(rest.strip(_CLOSERS + " \t\r\n"))


def _ends_sentence(text: str, end: re.Match[str]) -> bool:
    marks = end.group().rstrip(_CLOSERS + ",")
    follower = _NEXT_WORD.match(text, end.end())
    following = follower.group(1) if follower else ""
    if not following or set(marks) & {"?", "!"}:
        return True
    if len(marks) > 1:
        return not following[0].islower()
    before = text[max(0, end.start() - _LONGEST_WORD) : end.start()]
    word = _BEFORE_WORD.split(before)[-1].lower()
    if word in _BEFORE_NAMES:
        return False
    if word.isdigit():
        return not following[0].islower()
    if word in _SHORT or (_INITIALS.fullmatch(word) and word not in _POSTSCRIPTS):
        return following[0].isupper() and following.lower() in _STARTING
    return True


def capital_words(text: str) -> list[str]:
    """Words without a lower-case letter and with an upper-case one.

    Hyphens join, as IFEval says; a clitic is a word of its own (DON'T is DO and N'T), as its tokeniser has it.
    """
    words = [word.strip("'`*.,:") for word in _BETWEEN.split(text)]
    parts = [part for word in words for part in _split_clitic(word)]
    return [part for part in parts if part.isupper()]


def _split_clitic(word: str) -> list[str]:
    clitic = _CLITIC.search(word)
    return [word[: clitic.start()], clitic.group()] if clitic else [word]

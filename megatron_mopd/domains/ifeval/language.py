"""The language of a text, by its script, its letters and its commonest words; nothing to download, no chance in it.

Made for the 30 languages of IFEval. The published checkers use langdetect, whose answer on short texts depends
on a random seed: a reward must not. Where a script belongs to one of the languages, the script decides. Among
languages of one script, each common word counts 1 and each letter that only one of them uses counts 1/2.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache

from megatron_mopd.domains.ifeval.common_words import COMMON_WORDS, OWN_LETTERS

_CODES = "en es pt ar hi fr ru de ja it bn uk th ur ta te bg ko pl he fa vi ne sw kn mr gu pa ml fi zh zh-cn zh-tw"
LANGUAGES = tuple(_CODES.split())
"""Codes (ISO 639-1) that an instruction may name; the two variants of zh are one here."""

_OF_SCRIPT = {
    "HEBREW": ("he",),
    "BENGALI": ("bn",),
    "GURMUKHI": ("pa",),
    "GUJARATI": ("gu",),
    "TAMIL": ("ta",),
    "TELUGU": ("te",),
    "KANNADA": ("kn",),
    "MALAYALAM": ("ml",),
    "THAI": ("th",),
    "HANGUL": ("ko",),
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "CJK": ("zh",),
    "GREEK": ("el",),
    "LATIN": ("en", "es", "pt", "fr", "de", "it", "pl", "vi", "sw", "fi", "nl", "sv", "tr", "id"),
    "CYRILLIC": ("ru", "uk", "bg"),
    "ARABIC": ("ar", "fa", "ur"),
    "DEVANAGARI": ("hi", "mr", "ne"),
}
_LETTER_WEIGHT = 0.5
_WORD = re.compile(r"[^\W\d_][\w\u0900-\u097f\u200c]*")
_MARKED_PLACE = re.compile(r"\[[^\[\]\n]{0,80}\]|https?://\S+")
"""Placeholders and addresses, which stand in English in a text of any language."""


def detect_language(text: str) -> str | None:
    """The ISO 639-1 code of most of the text; None when it has no letters.

    Latin text without any known word is taken for English. Looks at the first 20,000 characters.
    """
    text = unicodedata.normalize("NFC", _MARKED_PLACE.sub(" ", text[:20_000])).lower()
    letters = Counter(character for character in text if character.isalpha())
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        scripts[_script(letter)] += count
    if not scripts:
        return None
    # Japanese mixes scripts: a tenth of kana tells it from Chinese.
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    if kana and kana * 10 >= scripts["CJK"] + kana:
        scripts["HIRAGANA"] += scripts.pop("CJK", 0) + scripts.pop("KATAKANA", 0)
    languages = _OF_SCRIPT.get(scripts.most_common(1)[0][0], ("unknown",))
    if len(languages) == 1:
        return languages[0]
    words = Counter(_WORD.findall(text))
    scores = {language: _score(language, words, letters) for language in languages}
    return max(scores, key=lambda language: scores[language])


def same_language(found: str | None, wanted: str) -> bool:
    """Whether text of language `found` is in the `wanted` one; text without letters is in every language."""
    return found is None or found == wanted.partition("-")[0]


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0].removesuffix("-")


def _score(language: str, words: Counter[str], letters: Counter[str]) -> float:
    by_words = sum(words[word] for word in COMMON_WORDS[language])
    return by_words + _LETTER_WEIGHT * sum(letters[letter] for letter in OWN_LETTERS.get(language, ""))

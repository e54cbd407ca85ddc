"""Every IFEval instruction kind against responses judged by hand: at least three that follow it, three that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from megatron_mopd.domains.ifeval import read_instructions
from megatron_mopd.domains.ifeval.instructions import KINDS


@dataclass(frozen=True)
class Case:
    kind: str
    arguments: dict[str, Any]
    followed: tuple[str, ...]
    violated: tuple[str, ...]


CASES = (
    Case(
        "keywords:existence",
        {"keywords": ["correlated", "tea"]},
        ("Tea is correlated with sleep.", "CORRELATED TEA", "uncorrelated teapots"),
        ("Tea is good.", "correlated", "corre lated te a", ""),
    ),
    Case(
        "keywords:existence",
        {"keywords": ["c++ (new)"]},
        ("I like C++ (new).", "c++ (new)", "x c++ (NEW) y"),
        ("ccc new", "c+ (new)", "c++ new"),  # text, not a pattern
    ),
    Case(
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "at least"},
        ("War and war.", "Toward the war", "warwar"),
        ("war", "", "w a r w a r"),
    ),
    Case(
        "keywords:frequency",
        {"keyword": "war", "frequency": 2, "relation": "less than"},
        ("war", "peace", "Wa-rs and one war"),
        ("war war", "Warwick's war", "WAR, war, WAR"),
    ),
    Case(
        "keywords:forbidden_words",
        {"forbidden_words": ["rock", "roll"]},
        ("Rocket science", "unrolled scrolls", "stone"),
        ("We will rock you", "ROCK!", "rock-n-stone", "a roll."),
    ),
    Case(
        "keywords:letter_frequency",
        {"letter": "t", "let_frequency": 2, "let_relation": "less than"},
        ("a cat", "T", "dog"),
        ("cat Tom", "tt", "That"),
    ),
    Case(
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        ("#a #b", "##", "x # y # z #"),
        ("#a", "hash hash", "a b"),
    ),
    Case(
        "language:response_language",
        {"language": "de"},
        (
            "Das Wetter ist heute sehr schön.",
            "Ich weiß nicht, was ich sagen soll.",
            "HALLO UND DANKE",
            "123",  # no letters: nothing that contradicts
        ),
        (
            "The weather is very nice today.",
            "Il fait très beau aujourd'hui.",
            "Погода сегодня хорошая.",
            "今天天气很好",
        ),
    ),
    Case(
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        ("One. Two.", "Dr. Smith met J. K. Rowling in the U.S. Senate.", "It costs 3.50 dollars. Really!", "no end"),
        ("One. Two. Three.", "What? No! Yes", "1. Mix. 2. Bake.", 'He said "Stop!" and left. Then he slept. The end.'),
    ),
    Case(
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ("One. Two.", "Wait... What?", "We ate fruit, nuts, etc. The rest was gone.", "Yes!\nNo!"),
        ("One.", "Well... maybe not.", "e.g. this one goes on", "Mr. and Mrs. Brown"),
    ),
    Case(
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ("a\n***\nb", "a *** b", "***\na\n***\nb\n***"),
        ("a", "a\n***\nb\n***\nc", "a\n***\n***\nb", "a\n\nb"),
    ),
    Case(
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ("one two three four", "a b c d e", "don't stop me"),  # don and t are two
        ("one two three", "one-two, 3!", "...", ""),
    ),
    Case(
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        ("one two three", "one", "a_b c d"),
        ("one two three four", "a-b-c-d", "it's it's"),
    ),
    Case(
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "President"},
        ("Hello.\n\nPresident Lincoln", 'x\n\n"president, he said', "x\n\n  PRESIDENT's"),
        ("President\n\nHello", "a\n\nb\n\npresident", "a\npresident", "a\n\nPresidents"),
    ),
    Case(
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ("[name] of [city]", "[a][b][c]", "[x]\n[y]"),
        ("[name]", "[na\nme] [x]", "(a) {b}", "[[[["),
    ),
    Case(
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ("Bye.\nP.S. I love you", "Bye. p.s. me too", "P. S. spaced"),
        ("Bye", "PS me", "P.P.S"),
    ),
    Case(
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ("Bye.\nP.P.S more", "p.p.s.", "P. P. S. more"),
        ("P.S. once", "PPS", "Bye"),
    ),
    Case(
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ("* a\n* b", "Text\n- a\n  - b\nText", "*a\n-b"),
        ("* a", "* a\n* b\n* c", "**a**\n**b**", "1. a\n2. b"),
    ),
    Case(
        "detectable_format:constrained_response",
        {},
        ("My answer is yes.", "I think: My answer is no.", "My answer is maybe. Sorry."),
        ("My answer is yes", "my answer is no.", "Yes.", "My answer is perhaps."),
    ),
    Case(
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ("*a* and *b*", "**a** and **b**", "*one thing*\n**another**"),
        ("*a*", "** ** and **", "*a\nb* and *c*", "a * b"),
    ),
    Case(
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ("SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION2", "SECTION 1 SECTION 2 SECTION 3"),
        ("SECTION 1", "Section 1\nSection 2", "SECTION A SECTION B", "SECTION  1 SECTION  2"),
    ),
    Case(
        "detectable_format:json_format",
        {},
        ('{"a": [1, 2]}', '```json\n{"a": null}\n```', "```\n[]\n```", ' "text" '),
        ("{'a': 1}", 'Here: {"a": 1}', '{"a": 1', "[" * 100_000, "```json\n```"),
    ),
    Case(
        "detectable_format:title",
        {},
        ("<<Poem of joy>>\nRoses", "a <<b>>", "<<>> and << x >>"),
        ("<Poem>", "<<>>", "<<a\nb>>", "<< >>", ">>x<<"),
    ),
    Case(
        "combination:two_responses",
        {},
        ("God\n******\nAllah", "******\na\n******\nb\n******", "a****** b"),
        ("God", "a\n******\na", "a******b******c", "a******\n******b"),
    ),
    Case(
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        ("Write a poem. Roses", "  write A poem.", "\nWrite a poem.\nx"),
        ("Sure! Write a poem.", "Write a  poem.", "Write a poem"),
    ),
    Case(
        "startend:end_checker",
        {"end_phrase": "Any other questions?"},
        ("No. Any other questions?", '"any other questions?"', "Any other questions?\n"),
        ("Any other questions? No.", "Any other questions", "Any other questions?!"),
    ),
    Case(
        "startend:quotation",
        {},
        ('"All of it."', ' "a" ', '""'),
        ('"', '"a', 'a"', "'a'", "“a”"),
    ),
    Case(
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ("NASA and I", "DON'T", "SELF-MADE and B2B", "**BOLD** (NEW)", "I'm I"),
        ("Nasa and I", "SELF-MADE", "nothing", "123 456"),
    ),
    Case(
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        ("Only ONE", "none at all", "A"),
        ("ONE TWO", "I AM", "USA, UK"),
    ),
    Case(
        "change_case:english_capital",
        {},
        ("THIS IS ALL IN CAPITALS.", "YES", "THE 3 BEARS AREN'T HERE!"),
        ("This is not.", "THIS IS nOT", "DAS IST NICHT AUF ENGLISCH UND NICHT GUT", "123"),
    ),
    Case(
        "change_case:english_lowercase",
        {},
        ("this is all lower case.", "etchings", "the 3 bears aren't here!"),
        ("This is not.", "i am not Tom", "das ist nicht auf englisch und nicht gut", "123"),
    ),
    Case(
        "punctuation:no_comma",
        {},
        ("No comma here.", "a; b", "1.000"),
        ("a, b", ",", "1,000"),
    ),
)


def test_every_kind_has_cases() -> None:
    assert len(KINDS) == 25
    assert {case.kind for case in CASES} == set(KINDS)
    assert all(len(case.followed) >= 3 and len(case.violated) >= 3 for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.arguments}"[:70])
def test_kind(case: Case) -> None:
    record = {"instruction_id_list": [case.kind], "kwargs": [case.arguments]}
    (instruction,) = read_instructions(record, "here")
    assert [text for text in case.followed if not instruction.followed_by(text)] == []
    assert [text for text in case.violated if instruction.followed_by(text)] == []
    assert not instruction.followed_by(" \n ")

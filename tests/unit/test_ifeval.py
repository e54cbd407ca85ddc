"""IFEval's accuracies by hand, the language detector on all its languages, bad records, and hostile responses."""

# ruff: noqa: RUF001

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.domains.ifeval import Verdict, accuracy, judge, read_instructions
from megatron_mopd.domains.ifeval.__main__ import main
from megatron_mopd.domains.ifeval.instructions import KINDS
from megatron_mopd.domains.ifeval.language import LANGUAGES, detect_language
from megatron_mopd.domains.ifeval.text import capital_words, count_sentences
from megatron_mopd.yaml_config import ConfigError

NO_COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}

SENTENCES = {
    "en": ("Where can I find a good book about birds?", "She opened the door and looked at us."),
    "es": ("¿Dónde puedo comprar un billete de tren?", "El perro de mi vecino es muy grande."),
    "pt": ("Onde posso comprar uma passagem de trem?", "O cachorro do meu vizinho não é muito grande."),
    "fr": ("Où est-ce que je peux acheter un billet de train ?", "Le chien de mon voisin est très grand."),
    "de": ("Wo kann ich eine Fahrkarte kaufen?", "Der Hund meines Nachbarn ist sehr groß."),
    "it": ("Dove posso comprare un biglietto per il treno?", "Il cane del mio vicino è molto grande."),
    "pl": ("Gdzie mogę kupić bilet na pociąg?", "Pies mojego sąsiada jest bardzo duży."),
    "vi": ("Tôi có thể mua vé tàu ở đâu?", "Con chó của người hàng xóm rất lớn."),
    "sw": ("Ninaweza kununua tiketi ya treni wapi?", "Mbwa wa jirani yangu ni mkubwa sana."),
    "fi": ("Mistä voin ostaa junalipun ja kuinka paljon se maksaa?", "Naapurini koira on hyvin suuri."),
    "ru": ("Где я могу купить билет на поезд?", "Собака моего соседа очень большая."),
    "uk": ("Де я можу купити квиток на потяг?", "Собака мого сусіда дуже великий."),
    "bg": ("Къде мога да си купя билет за влака?", "Кучето на моя съсед е много голямо."),
    "ar": ("أين يمكنني شراء تذكرة القطار؟", "كلب جاري كبير جدا في هذه المدينة."),
    "fa": ("از کجا می‌توانم بلیط قطار بخرم؟", "سگ همسایه من بسیار بزرگ است."),
    "ur": ("میں ٹرین کا ٹکٹ کہاں سے خرید سکتا ہوں؟", "میرے پڑوسی کا کتا بہت بڑا ہے۔"),
    "hi": ("मैं ट्रेन का टिकट कहाँ से खरीद सकता हूँ?", "मेरे पड़ोसी का कुत्ता बहुत बड़ा है।"),
    "mr": ("मी रेल्वेचे तिकीट कुठे विकत घेऊ शकतो? ते महाग आहे.", "माझ्या शेजाऱ्याचा कुत्रा खूप मोठा आहे."),
    "ne": ("म रेलको टिकट कहाँ किन्न सक्छु?", "मेरो छिमेकीको कुकुर धेरै ठूलो छ।"),
    "bn": ("আমি ট্রেনের টিকিট কোথায় কিনতে পারি?", "আমার প্রতিবেশীর কুকুরটি খুব বড়।"),
    "pa": ("ਮੈਂ ਰੇਲ ਟਿਕਟ ਕਿੱਥੋਂ ਖਰੀਦ ਸਕਦਾ ਹਾਂ?", "ਮੇਰੇ ਗੁਆਂਢੀ ਦਾ ਕੁੱਤਾ ਬਹੁਤ ਵੱਡਾ ਹੈ।"),
    "gu": ("હું ટ્રેનની ટિકિટ ક્યાંથી ખરીદી શકું?", "મારા પાડોશીનો કૂતરો ખૂબ મોટો છે."),
    "ta": ("ரயில் டிக்கெட் எங்கே வாங்கலாம்?", "என் அண்டை வீட்டாரின் நாய் மிகவும் பெரியது."),
    "te": ("నేను రైలు టికెట్ ఎక్కడ కొనగలను?", "మా పొరుగువారి కుక్క చాలా పెద్దది."),
    "kn": ("ನಾನು ರೈಲು ಟಿಕೆಟ್ ಎಲ್ಲಿ ಖರೀದಿಸಬಹುದು?", "ನನ್ನ ನೆರೆಯವರ ನಾಯಿ ತುಂಬಾ ದೊಡ್ಡದು."),
    "ml": ("എനിക്ക് ട്രെയിൻ ടിക്കറ്റ് എവിടെ വാങ്ങാം?", "എന്റെ അയൽക്കാരന്റെ നായ വളരെ വലുതാണ്."),
    "th": ("ฉันจะซื้อตั๋วรถไฟได้ที่ไหน", "สุนัขของเพื่อนบ้านฉันตัวใหญ่มาก"),
    "ko": ("기차표를 어디에서 살 수 있나요?", "우리 이웃의 개는 아주 큽니다."),
    "ja": ("電車の切符はどこで買えますか。", "隣の人の犬はとても大きいです。"),
    "he": ("איפה אפשר לקנות כרטיס לרכבת?", "הכלב של השכן שלי גדול מאוד."),
    "zh": ("我在哪里可以买到火车票？", "我邻居的狗很大。"),
}


def test_strict_and_loose_by_hand() -> None:
    record = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "change_case:english_lowercase"],
        "kwargs": [{}, {}, {}],
    }
    instructions = read_instructions(record, "here")
    good = judge('"all of it is quoted."', instructions)
    introduced = judge('Sure, here it is:\n"all of it is quoted."', instructions)  # the first line is in the way
    starred = judge('*"all of it is quoted."*', instructions)
    bad = judge("No, never, Not.", instructions)
    assert good == Verdict(strict=(True, True, True), loose=(True, True, True))
    assert introduced == Verdict(strict=(False, False, False), loose=(True, True, True))
    assert starred == Verdict(strict=(True, False, True), loose=(True, True, True))
    assert bad == Verdict(strict=(False, False, False), loose=(False, False, False))
    assert [verdict.reward for verdict in (good, introduced, starred, bad)] == [1.0, 0.0, 2 / 3, 0.0]
    scores = accuracy([good, introduced, starred, bad])
    assert (scores.prompt_strict, scores.prompt_loose) == (1 / 4, 3 / 4)
    assert (scores.instruction_strict, scores.instruction_loose) == (5 / 12, 9 / 12)


@pytest.mark.parametrize(
    ("response", "loose"),
    [
        ("Sure, I will\nwithout one", True),  # without the first line
        ("without one\nI hope, this helps", True),  # without the last
        ("Sure, yes\nwithout one\nBye, friend", True),  # without both
        ("Sure, yes\na, b\nBye, friend", False),
        ("one, only", False),  # without its only line nothing is left, which follows nothing
    ],
)
def test_loose_drops_the_first_and_the_last_line(response: str, loose: bool) -> None:
    verdict = judge(response, read_instructions(NO_COMMA, "here"))
    assert (verdict.strict, verdict.loose) == ((False,), (loose,))


def test_an_empty_response_follows_nothing() -> None:
    assert judge("", read_instructions(NO_COMMA, "here")) == Verdict(strict=(False,), loose=(False,))


def test_accuracy_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one verdict"):
        accuracy([])


def test_every_language_has_sentences() -> None:
    assert set(SENTENCES) == {code for code in LANGUAGES if "-" not in code}


@pytest.mark.parametrize("language", SENTENCES)
def test_language(language: str) -> None:
    assert [detect_language(text) for text in SENTENCES[language]] == [language, language]
    assert [detect_language(text.upper()) for text in SENTENCES[language]] == [language, language]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", None),
        ("12 + 3 = 15 !?", None),
        ("xyzzy plugh", "en"),
        ("De hond van mijn buurman is heel groot en hij blaft niet.", "nl"),
        ("Hunden är inte stor men den har en bil.", "sv"),
        ("Η γάτα κοιμάται.", "el"),
        ("[Your Name and the address of it] आपका स्वागत है", "hi"),
        ("東京は大きな都市です。", "ja"),
        ("ᚠᚢᚦᚨᚱᚲ", "unknown"),
    ],
)
def test_language_of_short_and_mixed_text(text: str, language: str | None) -> None:
    assert detect_language(text) == language


def test_chinese_of_either_script_is_one_language() -> None:
    for code in ("zh", "zh-cn", "zh-tw"):
        record = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": code}]}
        assert read_instructions(record, "here")[0].followed_by("我邻居的狗很大。")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("Hello. World", 2),
        ("Dr. Jones met Mrs. Li at 5 p.m. in St. Louis.", 1),
        ("He works for Acme Inc. The pay is good.", 2),
        ("Pi is 3.14. It goes on...", 2),
        ("Really?! Yes!!! ok", 3),
        ('"Come in." He did.', 2),
        ("It ends (so he says.) Then more.", 2),
        ("See https://a.b/c.d?e=f now.", 1),
        ("P.S. Write soon.", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_capital_words() -> None:
    assert capital_words("I'm NOT going, U.S.A. (B2B) it's ABC-DEF; Abc 42 WE'LL") == [
        "I",
        "NOT",
        "U.S.A",
        "B2B",
        "ABC-DEF",
        "WE",
        "'LL",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, 'f:1: verifier ifeval needs "instruction_id_list"'),
        ({"instruction_id_list": []}, 'needs "instruction_id_list", a non-empty list'),
        ({"instruction_id_list": ["punctuation:no_comma"]}, '"kwargs" must be a list with one mapping for each of'),
        (
            {"instruction_id_list": ["punctuation:no_commas"], "kwargs": [{}]},
            "f:1: unknown instruction kind 'punctuation:no_commas'; did you mean 'punctuation:no_comma'",
        ),
        ({"instruction_id_list": ["count:words"], "kwargs": [{}]}, ", ".join(KINDS)),
        ({"instruction_id_list": [7], "kwargs": [{}]}, "unknown instruction kind 7"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}, "must be a mapping, got None"),
        (
            {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]},
            "punctuation:no_comma takes no argument 'num_words'; its arguments: none",
        ),
        (
            {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": None}]},
            "startend:end_checker lacks its argument 'end_phrase'",
        ),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "one"}]},
            "keywords must be a non-empty list of texts, got 'one'",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "at most"}],
            },
            "relation must be 'less than' or 'at least', got 'at most'",
        ),
        (
            {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "tlh"}]},
            "language must be one of en, es,",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:nth_paragraph_first_word"],
                "kwargs": [{"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "x"}],
            },
            "nth_paragraph 3 is beyond num_paragraphs",
        ),
    ],
)
def test_bad_records(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_instructions(record, "f:1")
    assert message in str(error.value)


def test_null_arguments_are_absent() -> None:
    record = {
        "instruction_id_list": ["detectable_format:number_bullet_lists"],
        "kwargs": [{"num_bullets": 1, "num_words": None, "language": None}],
    }
    assert read_instructions(record, "here")[0].arguments == {"num_bullets": 1}


HOSTILE = ("." * 50_000, "<" * 50_000, "[" * 50_000, "*" * 50_000, "' \"" * 20_000, "A.B." * 20_000, "\n-" * 30_000)


def test_repetitive_responses_take_linear_time() -> None:
    """A pattern that goes back and forth would need hours here."""
    arguments: dict[str, Any] = {
        "number_sentences": {"num_sentences": 1, "relation": "at least"},
        "title": {},
        "number_placeholders": {"num_placeholders": 1},
        "number_highlighted_sections": {"num_highlights": 1},
        "capital_word_frequency": {"capital_frequency": 1, "capital_relation": "at least"},
        "number_bullet_lists": {"num_bullets": 30_000},
        "postscript": {"postscript_marker": "P.S."},
        "two_responses": {},
    }
    kinds = [kind for kind in KINDS if kind.split(":")[1] in arguments]
    record = {"instruction_id_list": kinds, "kwargs": [arguments[kind.split(":")[1]] for kind in kinds]}
    instructions = read_instructions(record, "here")
    strict = [judge(text, instructions).strict for text in HOSTILE]
    bullets = kinds.index("detectable_format:number_bullet_lists")
    assert [flags[bullets] for flags in strict] == [False] * 6 + [True]
    # One sentence each but for * and quotation marks, the word A.B.A.B..., the bullets.
    assert sum(map(sum, strict)) == 5 + 1 + 1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, responses = tmp_path / "questions.jsonl", tmp_path / "responses.jsonl"
    kinds = {"p": ["punctuation:no_comma"], "q": ["punctuation:no_comma", "startend:quotation"]}
    lines = [{"prompt": p, "instruction_id_list": k, "kwargs": [{}] * len(k)} for p, k in kinds.items()]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [{"prompt": "p", "response": "<think>a, b</think>ab"}, {"prompt": "q", "response": "Sure, this:\nab"}]
    responses.write_text("".join(json.dumps(line) + "\n" for line in answers))
    assert main([str(questions), str(responses)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "prompt_strict": 1 / 2,
        "prompt_loose": 1 / 2,
        "instruction_strict": 1 / 3,
        "instruction_loose": 2 / 3,
        "prompts": 2,
    }
    responses.write_text(json.dumps(answers[0]) + "\n")
    assert main([str(questions), str(responses)]) == 2
    assert capsys.readouterr().err == f"error: {questions}:2: {responses} has no response to this prompt\n"
    responses.write_text('{"prompt": "p"}\n')
    assert main([str(questions), str(responses)]) == 2
    assert f"{responses}:1: expected an object with the texts prompt, response" in capsys.readouterr().err

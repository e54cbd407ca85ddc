"""The tiny tokenizer that ships, the wrapper against `transformers`, and what tells two tokenizers apart."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.tokenizer import Tokenizer, difference
from megatron_mopd.yaml_config import ConfigError

TINY = Path(__file__).parents[2] / "configs/tiny"
ASCII = "".join(map(chr, range(32, 127)))
QUESTIONS = (
    "State the final answer to the following arithmetic problem: 98 - 93 =",
    "Spell this word backward (example: sun -> nus): Bafyot",
    'a  b\n c\'s "quoted" <|end|',
)
# The constructs of published templates: loops with indices, namespaces, trimming, tools, tojson, generation.
RICH_TEMPLATE = """\
{%- set ns = namespace(seen=0) -%}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{% for message in messages %}
    {% if loop.first and messages[0].role != 'system' %}
{{- '<|system|>Be brief.\\n' }}
    {% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {% if message.content is not string %}{% continue %}{% endif %}
<|{{ message.role }}|>{{ message['content'] | trim }}
    {% if message.role == 'assistant' %}
        {% generation %}{{ eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ ns.seen }}<|assistant|>{{ {'a': 'é'} | tojson }}{% endif %}"""


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.load(TINY / "model")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY / "model", tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_shipped_files_are_what_the_script_writes(tmp_path: Path) -> None:
    runpy.run_path(str(TINY / "build_model.py"))["build"](tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in (TINY / "model").iterdir()}


def test_vocabulary_is_that_of_the_architecture(tiny: Tokenizer) -> None:
    assert tiny.vocab_size == read_architecture(TINY / "model").vocab_size == 114
    assert (tiny.pad_id, tiny.eos_id, tiny.stop_ids) == (0, 1, (1,))


@pytest.mark.parametrize("text", [ASCII, "", " ", "\n", "  two  blanks ", "['1.0', '22.0']", *QUESTIONS])
def test_ascii_survives_a_round_trip(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


def test_letters_and_digits_are_tokens_of_their_own(tiny: Tokenizer) -> None:
    assert len(tiny.encode("Bafyot")) == 6
    assert len(tiny.encode("98")) == 2
    assert len(tiny.encode("['11.0', '4.0']")) == 1 + 2 + 1 + 1 + 1


def test_other_characters_are_one_unknown_token_each(tiny: Tokenizer) -> None:
    assert tiny.encode("aé½b").tolist() == [tiny.vocabulary["a"], 5, 5, tiny.vocabulary["b"]]


def test_render_is_the_chat_up_to_the_answer(tiny: Tokenizer) -> None:
    ids = tiny.render([{"role": "system", "content": "Hi"}, *user("7 + 8 =")])
    assert tiny.decode(ids, keep_special=True) == "<|system|>Hi<|user|>7 + 8 =<|assistant|>"
    assert tiny.decode(ids) == "Hi7 + 8 ="
    assert ids.dtype == "int64"
    assert len(tiny.render(user(QUESTIONS[0]))) == 1 + 1 + 2 + 1 + 2 + 1 + 1


@pytest.mark.parametrize("template", [None, RICH_TEMPLATE], ids=["shipped", "rich"])
def test_same_ids_as_transformers(copy: Path, template: str | None) -> None:
    from transformers import AutoTokenizer

    if template:
        (copy / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer.load(copy), AutoTokenizer.from_pretrained(copy)
    assert len(theirs) == ours.vocab_size
    for text in QUESTIONS:
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        chat = [*user(text), {"role": "assistant", "content": "5"}, *user("again")]
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert ours.render_text(chat) == expected
        assert ours.render(chat).tolist() == theirs(expected, add_special_tokens=False)["input_ids"]


def test_stop_ids_are_those_of_tokenizer_and_generation_config(copy: Path) -> None:
    edit(copy / "generation_config.json", eos_token_id=[3, 0])
    assert Tokenizer.load(copy).stop_ids == (0, 1, 3)
    edit(copy / "generation_config.json", eos_token_id=4)
    assert Tokenizer.load(copy).stop_ids == (1, 4)
    (copy / "generation_config.json").unlink()
    assert Tokenizer.load(copy).stop_ids == (1,)


def test_template_in_the_configuration_counts_without_a_file(copy: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no chat template; add chat_template\.jinja"):
        Tokenizer.load(copy).render(user("x"))
    edit(copy / "tokenizer_config.json", chat_template=[{"name": "default", "template": template}])
    assert Tokenizer.load(copy).render(user("x")).tolist() == Tokenizer.load(TINY / "model").render(user("x")).tolist()


def test_tokens_that_only_the_configuration_lists_are_added(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", added_tokens_decoder={"114": {"content": "<|new|>", "special": True}})
    tokenizer = Tokenizer.load(copy)
    assert (tokenizer.vocab_size, tokenizer.encode("a<|new|>").tolist()[1]) == (115, 114)
    edit(copy / "tokenizer_config.json", added_tokens_decoder={"200": {"content": "<|new|>", "special": True}})
    with pytest.raises(ConfigError, match=r"'<\|new\|>' the id 200, tokenizer\.json 114"):
        Tokenizer.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer\.json: cannot be read"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json: not valid JSON"),
        (
            lambda f: edit(f / "tokenizer_config.json", eos_token="<eos>"),
            r"eos_token '<eos>' is not in the voc",
        ),
        (lambda f: (f / "tokenizer_config.json").unlink(), r"eos_token None is not in the vocabulary"),
        (lambda f: (f / "chat_template.jinja").write_text("{% if %}"), r"template is not valid Jinja"),
        (
            lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}"),
            r"template refuses the messages: no system role",
        ),
        (
            lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
            r"template refuses the messages: .*unsafe",
        ),
    ],
)
def test_broken_folders_are_named(copy: Path, change: Any, message: str) -> None:
    change(copy)
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.load(copy).render(user("x"))
    assert str(copy) in str(caught.value)


def test_no_difference_between_copies(tiny: Tokenizer, copy: Path) -> None:
    assert difference(tiny, Tokenizer.load(copy)) is None
    assert tiny.fingerprint == Tokenizer.load(copy).fingerprint


def test_differences_are_put_into_words(tiny: Tokenizer, copy: Path) -> None:
    tree = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(tree))
    edit(copy / "generation_config.json", eos_token_id=[2])
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    low = tiny.vocabulary["a"]
    assert difference(tiny, Tokenizer.load(copy)) == (
        "student and teacher differ in the vocabulary: 114 entries against 114, 2 differ, first 'a' "
        f"(student: id {low}, teacher: id {low + 1}); in the chat template; in the"
        " stop tokens: [1] against [1, 2]"
    )


def test_a_larger_vocabulary_differs(tiny: Tokenizer, copy: Path) -> None:
    edit(copy / "tokenizer_config.json", added_tokens_decoder={"114": {"content": "<|new|>"}})
    assert difference(tiny, Tokenizer.load(copy)) == (
        "student and teacher differ in the vocabulary: 114 entries against 115, 1 differ, first '<|new|>' "
        "(student: missing, teacher: id 114)"
    )

"""Items of both sources, their seeds, and the messages for what a user can get wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.domains import source as source_module
from megatron_mopd.domains.source import (
    JsonlSource,
    ReasoningGymSource,
    build_task,
    derive_seed,
    read_jsonl,
    split_off_tenth,
    unit_interval,
)
from megatron_mopd.yaml_config import ConfigError

SUM = {"min_terms": 2, "max_terms": 2}
KEY = "domains.math.source"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def numbered(path: Path, count: int) -> Path:
    return write(path, *({"prompt": f"question {i}", "answer": f"{i}"} for i in range(count)))


def test_items_of_a_task_are_a_function_of_seed_and_index() -> None:
    first, again, other = (ReasoningGymSource("chain_sum", SUM, seed) for seed in (3, 3, 4))
    indices = [5, 0, 123_456, 7]  # in any order, also past a chunk's end
    assert [first.item(i).key for i in indices] == [again.item(i).key for i in indices[::-1]][::-1]
    assert first.item(5).record["answer"] == first.item(5).answer
    # reasoning-gym's own seeds 3 and 4 would give the same items, shifted by one.
    assert not {first.item(i).key for i in range(40)} & {other.item(i).key for i in range(40)}


def test_a_stream_goes_on_over_the_end_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(source_module, "CHUNK", 10)
    monkeypatch.setattr(
        source_module,
        "build_task",
        lambda *a: built.append(a[2]) or build_task(*a),  # type: ignore[func-returns-value]
    )
    source = ReasoningGymSource("chain_sum", {**SUM, "min_digits": 4}, seed=1)
    keys = [source.item(i).key for i in range(40)]
    assert len(set(keys)) == 40
    assert len(built) == len(set(built)) == 4
    assert [source.item(i).key for i in (19, 20, 19, 20, 30)] == [keys[i] for i in (19, 20, 19, 20, 30)]
    assert len(built) == 7  # two chunks are kept: 1, 2 and then 3 were built again


def test_tasks_that_build_eagerly_or_limit_their_size_work() -> None:
    for task in ("word_ladder", "spell_backward", "propositional_logic"):
        item = ReasoningGymSource(task, {}, seed=1).item(12_345)
        assert item.messages[0]["role"] == "user"
        assert item.record["metadata"]["source_dataset"] == task
    assert item.answer == ""  # propositional_logic has a scorer and no reference answer


@pytest.mark.parametrize(
    ("task", "params", "message"),
    [
        ("chain_sums", {}, "domains.math.source.reasoning_gym: no task 'chain_sums'; did you mean chain_sum"),
        ("qqqq", {}, "domains.math.source.reasoning_gym: no task 'qqqq'; reasoning-gym lists its tasks"),
        (
            "chain_sum",
            {"max_digit": 2},
            "domains.math.source.max_digit: unknown parameter of task 'chain_sum'; did you mean 'max_digits'?"
            " it takes min_terms, max_terms, min_digits, max_digits, allow_negation",
        ),
        ("chain_sum", {"seed": 2}, "domains.math.source.seed: is set by this program; remove it"),
        (
            "chain_sum",
            {"min_terms": 9},
            "domains.math.source: reasoning-gym task 'chain_sum' refuses its parameters: max_",
        ),
        (
            "chain_sum",
            {"min_terms": "two"},
            "domains.math.source: reasoning-gym task 'chain_sum' refuses its parameters:",
        ),
        ("spell_backward", {"data_file": "no.txt"}, "task 'spell_backward' refuses its parameters: "),
    ],
)
def test_wrong_tasks_and_parameters_are_named(task: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ReasoningGymSource(task, params, seed=0, key=KEY)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_item_that_a_task_cannot_make_names_the_task() -> None:
    source = ReasoningGymSource("spell_backward", {"min_word_len": 90, "max_word_len": 91}, seed=0, key=KEY)
    with pytest.raises(ConfigError, match=r"source: reasoning-gym task 'spell_backward' cannot make item 7"):
        source.item(7)


def test_jsonl_takes_prompts_and_messages_of_its_domain(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write(
        tmp_path / "x.jsonl",
        {"prompt": "p", "answer": "a", "note": 1},
        "   ",
        {"prompt": "other", "answer": "b", "domain": "text"},
        {"messages": chat, "answer": "c", "domain": "math"},
    )
    items = read_jsonl(path, "math", needs_answer=True)
    assert [(item.messages, item.answer) for item in items] == [
        (({"role": "user", "content": "p"},), "a"),
        (tuple(chat), "c"),
    ]
    assert items[0].record["note"] == 1
    assert [item.key for item in items] == ["p", "s\nu"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "p", "answer": ', "not a line of JSON: Expecting value"),
        ("[1]", 'expected {"prompt" or "messages", "answer"}, got list'),
        ({"answer": "a"}, 'give exactly one of "prompt" and "messages"'),
        ({"prompt": "p", "messages": [], "answer": "a"}, 'give exactly one of "prompt" and "messages"'),
        ({"prompt": "", "answer": "a"}, "\"prompt\" must be a non-empty string, got ''"),
        ({"prompt": "p"}, '"answer" is missing'),
        ({"prompt": "p", "answer": 5}, '"answer" must be a string, got 5'),
        ({"messages": [], "answer": "a"}, '"messages" must be a non-empty list'),
        ({"messages": [{"role": "user"}], "answer": "a"}, 'a message must have "role" and "content" strings'),
        ({"messages": ["hi"], "answer": "a"}, "got 'hi'"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "answer": "a"},
            "the last message is the assistant's",
        ),
    ],
)
def test_a_broken_line_is_named_with_its_number(tmp_path: Path, line: Any, problem: str) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "p", "answer": "a"}, "", line)
    with pytest.raises(ConfigError) as caught:
        read_jsonl(path, "math", needs_answer=True)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert problem in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "p", "answer": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"x\.jsonl:2: not a line of JSON: .*utf-8"):
        read_jsonl(tmp_path / "x.jsonl", "math", needs_answer=True)


def test_files_without_lines_are_named(tmp_path: Path) -> None:
    for path, problem in (
        (write(tmp_path / "a"), "is empty"),
        (write(tmp_path / "b", {"prompt": "p", "answer": "a", "domain": "t"}), "is of domain 'math'"),
        (tmp_path / "c", "No such file"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            read_jsonl(path, "math", needs_answer=True)
        assert str(caught.value).startswith("domains.math.source: ")


def test_answers_may_be_missing_where_nothing_needs_them(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"prompt": "p"}, {"prompt": "q", "answer": None})
    assert [item.answer for item in read_jsonl(path, "math", needs_answer=False)] == ["", ""]


def test_every_epoch_has_all_lines_in_another_order(tmp_path: Path) -> None:
    items = read_jsonl(numbered(tmp_path / "x.jsonl", 50), "math", needs_answer=True)
    source = JsonlSource(items, seed=1)
    epochs = [[source.item(50 * epoch + i).answer for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(str(i) for i in range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [JsonlSource(items, seed=1).item(i).answer for i in range(149, 99, -1)] == epochs[2][::-1]
    assert [JsonlSource(items, seed=2).item(i).answer for i in range(50)] != epochs[0]


def test_a_tenth_is_held_out_by_the_hash_of_the_prompt(tmp_path: Path) -> None:
    items = read_jsonl(numbered(tmp_path / "x.jsonl", 2000), "math", needs_answer=True)
    training, held_out = split_off_tenth(items, 0)
    assert len(training) + len(held_out) == 2000
    assert 160 < len(held_out) < 240
    expected = {
        f"question {i}" for i in range(2000) if int(hashlib.sha256(f"question {i}".encode()).hexdigest(), 16) % 10 == 0
    }
    assert {item.key for item in held_out} == expected


def test_derived_seeds_differ_and_fit_in_31_bits() -> None:
    seeds = {derive_seed(seed, name) for seed in range(100) for name in ("a", "b")}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**31 for seed in seeds)
    draws = [unit_interval(i) for i in range(2000)]
    assert 0.48 < sum(draws) / 2000 < 0.52
    assert 0 <= min(draws) < 0.01 < 0.99 < max(draws) < 1

"""Windows over documents by hand: every token but a document's first is scored once, with enough before it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_mopd.evaluation.documents import read_documents, read_windows, sliding_windows
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.yaml_config import ConfigError

TINY = Path(__file__).parents[2] / "configs/tiny/model"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_windows_by_hand() -> None:
    document = np.arange(100, 111)
    assert [(tokens.tolist(), first) for tokens, first in sliding_windows(document, 4)] == [
        ([100, 101, 102, 103], 1),
        ([102, 103, 104, 105], 2),
        ([104, 105, 106, 107], 2),
        ([106, 107, 108, 109], 2),
        ([108, 109, 110], 2),
    ]
    assert [(len(tokens), first) for tokens, first in sliding_windows(document, 11)] == [(11, 1)]
    assert [(tokens.tolist(), first) for tokens, first in sliding_windows(document, 10)] == [
        (list(range(100, 110)), 1),
        ([105, 106, 107, 108, 109, 110], 5),
    ]
    assert sliding_windows(document[:1], 4) == sliding_windows(document[:0], 4) == []


@pytest.mark.parametrize(("length", "window"), [(2, 2), (17, 2), (40, 3), (101, 16), (64, 64)])
def test_each_token_is_scored_once_with_half_a_window_before_it(length: int, window: int) -> None:
    scored: list[int] = []
    for tokens, first in sliding_windows(np.arange(length), window):
        assert len(tokens) <= window
        assert all(place - tokens[0] >= min(place, window // 2) for place in tokens[first:])
        scored += tokens[first:].tolist()
    assert scored == list(range(1, length))


def test_windows_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", json.dumps({"text": "a" * 300}), "", json.dumps({"text": "b", "id": 3}))
    assert read_documents(file) == ["a" * 300, "b"]
    windows = read_windows(file, read_architecture(TINY), Tokenizer.load(TINY))
    # 256 positions: 0..255, then from 128 on; the second document is one token, which nothing predicts.
    assert [(len(w.token_ids), int(w.loss_mask.sum())) for w in windows] == [(256, 255), (172, 44)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"evaluation\.perplexity: \S+t\.jsonl:1: not a line of JSON"),
        (['{"text": "a b"}', '{"prompt": "a"}'], r"t\.jsonl:2: expected \{\"text\": a non-empty string\}"),
        (['{"text": ""}'], r"t\.jsonl:1: expected"),
        (["3"], r"t\.jsonl:1: expected"),
        ([""], r"t\.jsonl is empty; give"),
        (['{"text": "b"}'], r"t\.jsonl: no document has two tokens; give longer texts"),
    ],
)
def test_files_that_cannot_be_scored(lines: list[str], message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", *lines)
    with pytest.raises(ConfigError, match=message):
        read_windows(file, read_architecture(TINY), Tokenizer.load(TINY))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.perplexity: \S+gone\.jsonl: No such file .*; name a JSONL file"
    ):
        read_documents(tmp_path / "gone.jsonl")

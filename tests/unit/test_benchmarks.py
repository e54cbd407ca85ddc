"""`mopd benchmark`: small files of every kind through the command and into a domain; what is refused and how."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_mopd.cli import main
from megatron_mopd.domains.benchmarks import BENCHMARKS, convert
from megatron_mopd.domains.ifeval import read_instructions
from megatron_mopd.domains.source import read_jsonl
from megatron_mopd.yaml_config import ConfigError

AIME = [{"id": "60", "problem": "Find x.", "answer": "70"}, {"question": "Find y.", "answer": 7}]
IFEVAL = [
    {
        "key": 1000,
        "prompt": "Use no commas\u2028and 3 words.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "at least", "language": None}],
    }
]
IFBENCH = [{"key": "1", "prompt": "Hi", "instruction_id_list": ["count:keywords"], "kwargs": [{"N": None, "n": 3}]}]
SWE_BENCH = [
    {
        "repo": "a/b",
        "instance_id": "a__b-1",
        "base_commit": "abc123",
        "patch": "diff --git a/x b/x\n",
        "test_patch": "secret",
        "problem_statement": "Braces {like this} break it.",
    }
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def converted(name: str, rows: list[dict[str, Any]], folder: Path, suffix: str = ".jsonl") -> list[dict[str, Any]]:
    out = folder / f"{name}.out.jsonl"
    assert convert(name, write(folder / f"{name}{suffix}", rows), out) == len(rows)
    text = out.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", ["aime25", "aime26"])
def test_aime(tmp_path: Path, name: str, suffix: str) -> None:
    lines = converted(name, AIME, tmp_path, suffix)
    assert lines == [{"prompt": "Find x.", "answer": "70"}, {"prompt": "Find y.", "answer": "7"}]


def test_ifeval(tmp_path: Path) -> None:
    (line,) = converted("ifeval", IFEVAL, tmp_path)
    assert line["kwargs"] == [{}, {"num_words": 3, "relation": "at least"}]
    items = read_jsonl(tmp_path / "ifeval.out.jsonl", "d", needs_answer=False, check=read_instructions)
    assert [item.key for item in items] == ["Use no commas\u2028and 3 words."]
    instructions = read_instructions(items[0].record, "here")
    assert [[i.followed_by(text) for i in instructions] for text in ("a b c", "a, b")] == [[True, True], [False, False]]


def test_ifbench_takes_kinds_that_are_not_ours(tmp_path: Path) -> None:
    (line,) = converted("ifbench", IFBENCH, tmp_path)
    assert line == {"prompt": "Hi", "instruction_id_list": ["count:keywords"], "kwargs": [{"n": 3}]}


def test_swe_bench(tmp_path: Path) -> None:
    (line,) = converted("swe_bench_verified", SWE_BENCH, tmp_path)
    assert set(line) == {"prompt", "answer", "instance_id", "repo", "base_commit"}
    assert line["prompt"].startswith("Resolve this issue of the repository a/b at commit abc123.")
    assert line["prompt"].endswith("\n\nBraces {like this} break it.")
    assert (line["answer"], line["instance_id"]) == (SWE_BENCH[0]["patch"], "a__b-1")
    assert "diff --git" not in line["prompt"]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "ifeval.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(IFEVAL), path)
    assert convert("ifeval", str(path), tmp_path / "out.jsonl") == 1
    assert converted("ifeval", IFEVAL, tmp_path) == [json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))]
    path.write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match="not a parquet file that can be read"):
        convert("ifeval", str(path), tmp_path / "other.jsonl")


def test_without_optional_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"--from x.parquet: needs pyarrow; `pip install pyarrow`"):
        convert("aime25", "x.parquet", tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match=r"--from hub:math-ai/aime25: needs the package datasets; `pip install"):
        convert("aime25", "hub:math-ai/aime25", tmp_path / "out.jsonl")


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network in tests: a stand-in for the package says what it was asked for."""
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        if name == "no/such":
            raise ValueError("not on the Hub")
        return AIME

    package = ModuleType("datasets")
    monkeypatch.setattr(package, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert convert("aime25", "hub:a/b:train", tmp_path / "1.jsonl") == 2
    assert convert("aime25", "hub:a/b", tmp_path / "2.jsonl") == 2
    assert asked == [("a/b", "train"), ("a/b", "test")]
    with pytest.raises(ConfigError, match="--from hub:no/such: not on the Hub"):
        convert("aime25", "hub:no/such", tmp_path / "3.jsonl")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("aime27", AIME, "benchmark 'aime27': unknown; known: aime25, aime26, ifeval, ifbench, swe_bench_verified"),
        ("aime25", [], "holds no row"),
        ("aime25", [AIME[0], {"answer": "1"}], "row 2: needs a non-empty text 'problem' or 'question'; it has answer"),
        ("aime25", [{"problem": "p", "answer": "1/2"}], 'row 1: "answer" of AIME must be a whole number from 0 to 999'),
        ("aime25", [{"problem": "p", "answer": 1000}], "got 1000"),
        ("aime25", [{"problem": "p", "answer": True}], "got True"),
        ("aime25", [{"problem": "p"}], "got None"),
        ("ifeval", IFBENCH, "row 1: unknown instruction kind 'count:keywords'"),
        ("ifbench", [{"prompt": "p", "instruction_id_list": ["a"], "kwargs": []}], 'row 1: "instruction_id_list" and'),
        (
            "ifbench",
            [{"prompt": "p", "instruction_id_list": ["a"], "kwargs": ["x"]}],
            "must hold mappings, one per instru",
        ),
        ("swe_bench_verified", [{**SWE_BENCH[0], "patch": ""}], "row 1: needs a non-empty text 'patch'"),
    ],
)
def test_bad_rows(tmp_path: Path, name: str, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(name, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert message in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("in.csv", "a,b", "in.csv: give a .jsonl, .json or .parquet file, or hub:OWNER/NAME:SPLIT"),
        ("in.json", "{", "in.json: not JSON"),
        ("in.json", '{"rows": []}', "in.json: expected a list of JSON objects"),
        ("in.jsonl", '{"problem": "p", "answer": 1}\n[1]\n', "in.jsonl: expected a list of JSON objects"),
        ("in.jsonl", '{"problem": "p", "answer": 1}\n\nnope\n', "in.jsonl:3: not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        convert("aime25", str(tmp_path / name), tmp_path / "out.jsonl")
    assert message in str(error.value)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", AIME), tmp_path / "deep/out.jsonl"
    command = ["benchmark", "aime25", "--from", source, "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out}: 2 questions; verifier: math\n"
    assert main(command) == 2
    assert f"mopd: error: --out {out}: exists; remove it or name another file" in capsys.readouterr().err
    assert main([*command, "seed=1"]) == 2
    assert "benchmark: takes no 'seed=1'" in capsys.readouterr().err
    assert main(["benchmark", "aime25", "--from", f"{source}l.jsonl", "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in.jsonl"]
    assert all(name in BENCHMARKS for name in ("aime25", "aime26", "ifeval", "ifbench", "swe_bench_verified"))

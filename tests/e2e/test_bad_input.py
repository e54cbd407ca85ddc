"""Everything a user can get wrong: one line with the key or the file and the remedy, exit code 2, nothing started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mopd.cli import main
from megatron_mopd.student.random_init import write_random_model
from tests.e2e.conftest import run_tree, small_model, write_run

Edit = Callable[[dict, Path], None]


def refused(tree: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line that `mopd run` answers with."""
    code = main(["run", str(write_run(tmp_path / "run.yaml", tree)), *overrides])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2, captured
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    assert not (tmp_path / "run").exists(), "something was started"
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["domains.a.wieght=2"], ["domains.a.wieght", "weight"]),
        (["optim.lr=fast"], ["optim.lr", "float", "fast"]),
        (["domains.a.teacher=nobody"], ["domains.a.teacher", "nobody", "a, b, c"]),
        (["teachers.a.checkpoint=runs/not-there"], ["teachers.a.checkpoint", "runs/not-there"]),
        (["parallel.tensor=3", "parallel.ranks=3"], ["parallel.tensor", "3", "heads"]),
        (["parallel.pipeline=3", "parallel.ranks=3"], ["parallel.pipeline", "3", "2 layers"]),
        (["parallel.expert=3", "parallel.ranks=3"], ["parallel.expert", "3", "8 experts"]),
        (["parallel.tensor=2", "parallel.ranks=3"], ["tensor 2", "3 ranks"]),
        (["parallel.tensor=2", "parallel.pipeline=2"], ["4", "2 ranks"]),
        (["parallel.context=3"], ["context 3", "2 ranks", "parallel.context"]),
        (["parallel.expert=4"], ["parallel.expert", "4", "2 ranks"]),
        (["domains.a.source.reasoning_gym=chain_summ"], ["domains.a.source", "chain_summ", "chain_sum"]),
        (["domains.a.source.max_digit=2"], ["domains.a.source", "max_digit", "max_digits"]),
        (["domains.a.max_response_tokens=1000"], ["domains.a", "1000", "256"]),
        (["domains.a.max_prompt_tokens=2"], ["domains.a", "max_prompt_tokens"]),
        (["objective.kind=grpo"], ["objective.kind", "full_vocab"]),
        (["model.checkpoint=configs"], ["model.checkpoint", "config.json"]),
        (["run_dir=/proc/nowhere"], ["run_dir", "/proc/nowhere"]),
        (["log.wandb=project"], ["log.wandb", "wandb"]),
    ],
)
def test_values(
    overrides: list[str], expected: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(run_tree(models, tmp_path / "run"), tmp_path, capsys, *overrides)
    for part in expected:
        assert part in line, line


def test_a_domain_without_a_teacher(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = run_tree(models, tmp_path / "run")
    del tree["domains"]["b"]["teacher"]
    line = refused(tree, tmp_path, capsys)
    assert "domains.b.teacher" in line and "a, b, c" in line


def test_a_number_without_a_dot_is_a_number(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(run_tree(models, tmp_path / "run"), tmp_path, capsys, "optim.lr=1e-6", "optim.warmup_steps=-1")
    assert "warmup_steps" in line and "lr" not in line.replace("lr:", "")


def test_a_teacher_with_another_vocabulary(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = small_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    write_random_model(tmp_path / "teacher", other, 0)
    line = refused(run_tree(models, tmp_path / "run"), tmp_path, capsys, f"teachers.a.checkpoint={tmp_path}/teacher")
    assert "teachers.a.checkpoint" in line and "300" in line and "vocabulary" in line


def test_a_teacher_with_another_chat_template(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(models / "a", tmp_path / "teacher")
    template = tmp_path / "teacher" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    line = refused(run_tree(models, tmp_path / "run"), tmp_path, capsys, f"teachers.a.checkpoint={tmp_path}/teacher")
    assert "teachers.a.checkpoint" in line and "chat template" in line


def test_a_truncated_teacher(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(models / "a", tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refused(run_tree(models, tmp_path / "run"), tmp_path, capsys, f"teachers.a.checkpoint={tmp_path}/teacher")
    assert "teachers.a.checkpoint" in line and "model.safetensors" in line


def test_a_half_written_checkpoint(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(models / "a", tmp_path / "step_00000003.tmp" / "model")
    place = tmp_path / "step_00000003.tmp"
    line = refused(run_tree(models, tmp_path / "run"), tmp_path, capsys, f"teachers.a.checkpoint={place}")
    assert "teachers.a.checkpoint" in line and "incomplete" in line


def test_a_stop_token_outside_the_vocabulary(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(models / "student", tmp_path / "student")
    (tmp_path / "student" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 99999]}))
    line = refused(run_tree(models, tmp_path / "run"), tmp_path, capsys, f"model.checkpoint={tmp_path}/student")
    assert "99999" in line and "generation_config.json" in line


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"prompt": "1+1", "answer": "2"}', '{"prompt": "1+2"'], ["data.jsonl:2"]),
        (['{"prompt": "1+1"}'], ["data.jsonl:1", "answer"]),
        (['{"prompt": "1+1", "answer": " "}'], ["data.jsonl:1", "answer", "empty"]),
        ([], ["data.jsonl"]),
    ],
)
def test_data(
    lines: list[str], expected: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    tree = run_tree(models, tmp_path / "run")
    tree["domains"]["a"] |= {"source": {"jsonl": str(data)}, "verifier": "exact"}
    line = refused(tree, tmp_path, capsys)
    for part in expected:
        assert part in line, line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--split", "validation"], ["evaluation.validation_prompts", "0"]),
        (["evaluation.perplexity=gone.jsonl"], ["evaluation.perplexity", "gone.jsonl"]),
        (
            ["evaluation.perplexity=t.jsonl", "parallel.tensor=3", "parallel.ranks=3"],
            ["parallel.tensor", "checkpoint's"],
        ),
        (["evaluation.benchmarks.b.source.jsonl=gone.jsonl"], ["evaluation.benchmarks.b", "task"]),
        (
            ["evaluation.benchmarks.b={source: {jsonl: gone.jsonl}, verifier: exact, max_response_tokens: 9}"],
            ["evaluation.benchmarks.b", "max_prompt_tokens", "256 positions"],
        ),
        (
            ["evaluation.out_of_domain.b={source: {reasoning_gym: gcdd}, max_prompt_tokens: 9,max_response_tokens: 9}"],
            ["evaluation.out_of_domain.b.source", "gcdd", "gcd"],
        ),
        (
            [
                "evaluation.out_of_domain.b={source: {reasoning_gym: gcd}, verifier: command, command: [no-such-thing],"
                "max_prompt_tokens: 200, max_response_tokens: 9}"
            ],
            ["evaluation.out_of_domain.b.command", "no-such-thing"],
        ),
    ],
)
def test_evaluation(
    overrides: list[str], expected: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run.yaml", run_tree(models, tmp_path / "run"))
    assert main(["eval", str(run), "--checkpoint", str(models / "student"), *overrides]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for part in expected:
        assert part in line, line


def test_a_checkpoint_folder_of_other_teachers(models: Path, tmp_path: Path) -> None:
    from megatron_mopd.teachers.manifest import check_same_teachers
    from megatron_mopd.yaml_config import ConfigError

    saved = {"a": {"checkpoint": "x", "weights": "1" * 64, "vocabulary": "v", "chat_template": "t"}}
    check_same_teachers(saved, {"a": saved["a"] | {"checkpoint": "moved"}}, tmp_path)
    with pytest.raises(ConfigError, match=r"teachers\.a: weights 1{12} -> 2{12} \(x -> y\)"):
        check_same_teachers(saved, {"a": saved["a"] | {"checkpoint": "y", "weights": "2" * 64}}, tmp_path)
    with pytest.raises(ConfigError, match=r"teachers\.a is gone; teachers\.b was not there"):
        check_same_teachers(saved, {"b": saved["a"]}, tmp_path)

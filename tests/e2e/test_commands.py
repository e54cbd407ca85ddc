"""The commands in a row, as a user types them: run in two layouts, eval, export, and a resume that must be refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mopd.config import load_config
from megatron_mopd.metrics import read_records
from tests.e2e.conftest import run_tree, write_run

STEPS = 3


def mopd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_mopd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def runs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` on two data-parallel ranks and `cut` with tensor and expert parallelism, three steps each."""
    folder = tmp_path_factory.mktemp("runs")
    for name, parallel in (("plain", {"ranks": 2}), ("cut", {"tensor": 2, "expert": 2})):
        tree = run_tree(models, folder / name) | {"steps": STEPS, "parallel": parallel}
        result = mopd("run", str(write_run(folder / f"{name}.yaml", tree)))
        assert result.returncode == 0, result.stderr
        assert "initial reverse KL per token: a " in result.stdout
    return folder


def test_a_run_does_not_depend_on_the_layout(runs: Path) -> None:
    plain, cut = (read_records(runs / name / "metrics.jsonl") for name in ("plain", "cut"))
    assert [record["step"] for record in plain] == [record["step"] for record in cut] == list(range(STEPS))
    for left, right in zip(plain, cut, strict=True):
        # The very same rollouts: what is sampled depends on seed, prompt and sample only.
        for name in ("reward", "response_tokens", "truncation_rate", "token_share/a", "prompt_share/b"):
            assert left[name] == right[name], name
        for name in ("loss", "grad_norm", "reverse_kl/a", "reverse_kl/b", "reverse_kl/c", "entropy"):
            assert right[name] == pytest.approx(left[name], rel=1e-4), name


def test_what_a_run_folder_says(runs: Path) -> None:
    record = read_records(runs / "plain" / "metrics.jsonl")[-1]
    for metric in ("reverse_kl", "entropy", "reward", "response_tokens", "truncation_rate", "repetition_rate"):
        assert {f"{metric}/{domain}" for domain in "abc"} <= record.keys()
    for key in ("prompt_share/a", "token_share/a", "too_long/a", "held_out_skipped/a", "grad_norm", "lr"):
        assert key in record
    for phase in ("rollout", "teacher", "update"):
        assert record[f"seconds/{phase}"] > 0
        assert record[f"tokens_per_second/{phase}"] > 0
    assert record["seconds/sync"] > 0
    assert load_config(runs / "plain" / "config.yaml").steps == STEPS


def test_eval_and_export_agree(runs: Path) -> None:
    config, latest, out = str(runs / "plain.yaml"), str(runs / "plain" / "checkpoints" / "latest"), runs / "exported"
    result = mopd("export", config, "--checkpoint", latest, "--hf", str(out))
    assert result.returncode == 0, result.stderr
    again = mopd("export", config, "--checkpoint", latest, "--hf", str(out))
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1 and str(out) in again.stderr
    scores = []
    for checkpoint in (latest, str(out)):
        result = mopd("eval", config, "--checkpoint", checkpoint)
        assert result.returncode == 0, result.stderr
        scores.append(json.loads(result.stdout))
    assert scores[0] == scores[1]
    assert scores[0]["domains"].keys() == set("abc")
    logged = read_records(runs / "plain" / "metrics.jsonl", "eval")
    assert [record["step"] for record in logged] == [0]
    assert logged[0]["accuracy/a"] >= 0 and logged[0]["standard_error/a"] >= 0


def test_eval_of_everything_does_not_depend_on_the_layout(models: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(5)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a text of some length " * 20}) + "\n")
    limits = {"max_prompt_tokens": 200, "max_response_tokens": 4}
    sums = {"source": {"jsonl": str(tmp_path / "b.jsonl")}, "verifier": "math", "samples": 3, **limits}
    gcd = {"source": {"reasoning_gym": "gcd"}, "prompts": 4, **limits}
    tree = run_tree(models, tmp_path / "run")
    tree["evaluation"] = {
        "prompts": 6,
        "validation_prompts": 5,
        "samples": 2,
        "pass_at": [1, 2],
        "perplexity": str(tmp_path / "t.jsonl"),
        "benchmarks": {"sums": sums},
        "out_of_domain": {"gcd": gcd},
    }
    config = str(write_run(tmp_path / "run.yaml", tree))
    results = []
    for layout in ((), ("parallel.pipeline=2", "parallel.tensor=2", "parallel.expert=2", "parallel.ranks=4")):
        result = mopd("eval", config, "--checkpoint", str(models / "student"), "--split", "validation", *layout)
        assert result.returncode == 0, result.stderr
        results.append(json.loads(result.stdout))
    plain, cut = results
    assert cut.pop("perplexity") == pytest.approx(plain.pop("perplexity"), rel=1e-5)
    assert cut == plain
    assert plain["split"] == "validation"
    for domain in "abc":
        score = plain["domains"][domain]
        assert (score["prompts"], score["samples"], score["pass_at"].keys()) == (5, 2, {"1", "2"})
    assert (plain["benchmarks"]["sums"]["prompts"], plain["benchmarks"]["sums"]["samples"]) == (5, 3)
    assert (plain["out_of_domain"]["gcd"]["prompts"], plain["perplexity_tokens"]) == (4, 439)


def test_grpo_compares_with_the_distribution_that_was_sampled(models: Path, tmp_path: Path) -> None:
    tree = run_tree(models, tmp_path / "run") | {"stage": "rl", "steps": 1, "objective": {"kind": "grpo"}}
    del tree["teachers"]
    for domain in tree["domains"].values():
        del domain["teacher"]
    tree["rollout"] = {"samples_per_prompt": 4, "temperature": 0.5, "top_p": 0.9}
    result = mopd("run", str(write_run(tmp_path / "run.yaml", tree)))
    assert result.returncode == 0, result.stderr
    record = read_records(tmp_path / "run" / "metrics.jsonl")[0]
    assert record["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert record["clip_share"] == 0.0


def test_resuming_with_another_teacher_is_refused(models: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    tree = run_tree(models, tmp_path / "run") | {"steps": STEPS + 1}
    tree["teachers"]["b"]["checkpoint"] = str(models / "c")
    result = mopd("run", str(write_run(tmp_path / "run.yaml", tree)))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "teachers.b: weights" in result.stderr
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == STEPS


def test_a_teacher_that_is_the_student_is_refused_unless_allowed(models: Path, tmp_path: Path) -> None:
    tree = run_tree(models, tmp_path / "run") | {"steps": 1}
    tree["teachers"]["b"]["checkpoint"] = str(models / "student")
    config = str(write_run(tmp_path / "run.yaml", tree))
    result = mopd("run", config)
    assert result.returncode == 2
    assert "teachers.b" in result.stderr and "allow_identical_teacher=true" in result.stderr
    assert mopd("run", config, "allow_identical_teacher=true").returncode == 0
    assert read_records(tmp_path / "run" / "metrics.jsonl")[0]["reverse_kl/b"] == pytest.approx(0, abs=1e-6)


def test_a_checkpoint_of_another_run_is_not_continued(models: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "run")
    tree = run_tree(models, tmp_path / "run") | {"steps": STEPS + 1, "seed": 8}
    result = mopd("run", str(write_run(tmp_path / "run.yaml", tree)))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "is of another run: seed was 7, is 8" in result.stderr


def test_several_updates_a_step_see_every_domain(models: Path, tmp_path: Path) -> None:
    tree = run_tree(models, tmp_path / "run") | {"steps": 2, "prompts_per_step": 36}
    tree["optim"] |= {"updates_per_step": 3}
    result = mopd("run", str(write_run(tmp_path / "run.yaml", tree)))
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "manifest.json").read_text())
    assert manifest["state"]["num_updates"] == 6
    record = read_records(tmp_path / "run" / "metrics.jsonl")[0]
    for domain in "abc":  # the mean over updates of a domain's share: 1/3 each, none of them without it
        assert 0.2 < record[f"token_share/{domain}"] < 0.5
        assert record[f"reverse_kl/{domain}"] > 0

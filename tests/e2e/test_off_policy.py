"""Off-policy and one domain after another, as a user types it: sample, train, kill, resume, edit, refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_mopd.cli import main
from megatron_mopd.compute import read_compute
from megatron_mopd.config import load_config
from megatron_mopd.domains.dataset import Dataset, read_cost
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.metrics import read_records
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.rollout.load import load_engine
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.tokenizer import Tokenizer
from tests.e2e.conftest import run_tree, write_run
from tests.e2e.test_kill_and_resume import final_bytes, finish, rank_pids, start, steps_logged

STEPS, PROMPTS = 3, 24
LONG = 36
"""Steps of a run that is killed: enough that it is not over before it is."""


@pytest.fixture(scope="module")
def sampled(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `answers.jsonl`: 72 answers of three teachers, sampled on two ranks."""
    folder = tmp_path_factory.mktemp("sampled")
    config = write_run(folder / "sample.yaml", run_tree(models, folder / "run") | {"steps": STEPS})
    assert main(["sample", str(config), "--out", str(folder / "answers.jsonl")]) == 0
    return folder


def off_policy(models: Path, folder: Path, data: Path, **keys: object) -> dict:
    tree = run_tree(models, folder) | {"rollout": {"engine": "dataset", "dataset": str(data)}}
    return tree | {"objective": {"kind": "full_vocab", "divergence": "forward_kl"}} | keys


def test_every_domain_is_answered_by_its_own_teacher(sampled: Path, models: Path) -> None:
    config = load_config(sampled / "sample.yaml")
    tokenizer = Tokenizer.load(models / "student")
    dataset = Dataset.load(sampled / "answers.jsonl", 114)
    prompts = {prompt.id: prompt for prompt in DomainMixer(config, tokenizer).draw(PROMPTS)}
    for domain in "abc":
        assert dataset.size(domain) == STEPS * PROMPTS // 3
        arch = read_architecture(models / domain)
        engine = load_engine(config, arch, tokenizer, torch.device("cpu"), models / domain)
        for index in range(PROMPTS // 3):
            answer = dataset.answer(domain, index)
            prompt = prompts[answer.id]
            assert (answer.prompt, answer.question) == (prompt.token_ids.tolist(), prompt.question)
            expected = engine.generate([prompt], samples=1, sampling=Sampling(temperature=1.0), seed=7 * 1_000_003)[0]
            assert answer.response == expected.response_ids.tolist()


def test_the_dataset_does_not_depend_on_the_ranks_and_says_its_cost(
    sampled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.jsonl"
    assert main(["sample", str(sampled / "sample.yaml"), "--out", str(out), "parallel.ranks=1"]) == 0
    printed = capfd.readouterr().out
    summary = json.loads(printed[printed.index("{") :])
    dataset, first = Dataset.load(out, 114), Dataset.load(sampled / "answers.jsonl", 114)
    assert dataset.fingerprint == first.fingerprint
    answers = [dataset.answer(domain, index) for domain in "abc" for index in range(dataset.size(domain))]
    assert summary["sampled"] == dict.fromkeys("abc", STEPS * PROMPTS // 3)
    assert summary["generated_tokens"] == sum(len(answer.response) for answer in answers)
    assert read_compute(out).generated_tokens == summary["generated_tokens"]
    assert main(["sample", str(sampled / "sample.yaml"), "--out", str(out)]) == 2
    assert f"--out {out}: exists" in capfd.readouterr().err
    assert main(["sample", str(sampled / "sample.yaml"), "--out", "/proc/answers.jsonl"]) == 2
    assert "mopd: error: --out: /proc cannot be written (" in capfd.readouterr().err


def test_random_teachers_have_no_correct_answer(
    sampled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", str(sampled / "sample.yaml"), "--out", str(tmp_path / "x"), "--keep", "correct", "steps=1"]
    assert main(arguments) == 2
    assert "domains.a: none of 8 answers is correct; use --keep all" in capfd.readouterr().err
    assert main([*arguments[:4], "steps=1", "prompts_per_step=2"]) == 2
    assert "domains.c: has no prompt in so few steps" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stage=rl", "objective={kind: grpo}"], "teachers: not used in stage 'rl'"),
        (["domains.a.verifier=none", "--keep", "correct"], "domains.a.verifier: 'none' cannot tell correct answers"),
        (["steps=0"], "steps: 0 steps have no prompts"),
    ],
)
def test_what_cannot_be_sampled(
    changes: list[str], message: str, sampled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(sampled / "sample.yaml"), "--out", str(tmp_path / "x"), *changes]) == 2
    assert message in capfd.readouterr().err


def test_fine_tuning_on_stored_answers(sampled: Path, models: Path, tmp_path: Path) -> None:
    """More than an epoch; evaluated by the student's own answers, but nothing counts as generated."""
    tree = off_policy(models, tmp_path / "run", sampled / "answers.jsonl", stage="sft", steps=4)
    tree |= {"objective": {"kind": "cross_entropy"}, "evaluation": {"prompts": 8, "every": 2}}
    del tree["teachers"]
    for domain in tree["domains"].values():
        del domain["teacher"]
    assert main(["run", str(write_run(tmp_path / "run.yaml", tree))]) == 0
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    dataset = Dataset.load(sampled / "answers.jsonl", 114)
    answers = [dataset.answer(domain, index) for domain in "abc" for index in range(dataset.size(domain))]
    processed = [len(answer.prompt) + len(answer.response) for answer in answers]
    assert [record["drawn/a"] for record in records] == [8, 16, 24, 32]
    # The first three steps are an epoch: every answer once.
    assert sum(record["tokens/trained"] for record in records[:3]) == sum(processed)
    assert {record["tokens/generated"] for record in records} == {record["tokens/teacher"] for record in records} == {0}
    assert records[-1]["loss"] < records[0]["loss"]
    assert [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl", "eval")] == [0, 2, 4]


def test_a_killed_sample_goes_on_where_it_was(sampled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def command(out: Path) -> list[str]:
        return ["sample", str(sampled / "sample.yaml"), "--out", str(out), f"steps={LONG}"]

    smooth, rough = tmp_path / "smooth.jsonl", tmp_path / "rough.jsonl"
    record = tmp_path / "rough.jsonl.progress.json"
    assert main(command(smooth)) == 0
    process = subprocess.Popen([sys.executable, "-m", "megatron_mopd", *command(rough)], stdout=subprocess.DEVNULL)
    try:
        while not record.exists() or json.loads(record.read_text())["so_far"]["steps"] < LONG + 2:  # second teacher
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(rank_pids(process.pid)[0], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.wait()
    assert not rough.exists()
    capfd.readouterr()
    assert main(command(rough)) == 0
    assert f" of {3 * LONG}" in capfd.readouterr().out.split("going on from step ")[1][:12]
    assert Dataset.load(rough, 114).fingerprint == Dataset.load(smooth, 114).fingerprint
    costs = [replace(read_cost(path), seconds=0.0) for path in (rough, smooth)]
    assert costs[0] == costs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rough.jsonl", "smooth.jsonl"]


def test_killed_resumed_edited(sampled: Path, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A sequential run on a dataset: the same to the last bit after a kill -9, and refused when the data changed."""
    data = tmp_path / "answers.jsonl"
    data.write_bytes((sampled / "answers.jsonl").read_bytes())
    changes = {
        "domain_schedule": "sequential",
        "steps": LONG,
        "checkpoint": {"every": 5},
        "evaluation": {"prompts": 16},
    }
    trees = {name: off_policy(models, tmp_path / name, data, **changes) for name in ("smooth", "rough")}
    configs = {name: write_run(tmp_path / f"{name}.yaml", tree) for name, tree in trees.items()}
    assert main(["run", str(configs["smooth"])]) == 0
    process = start(configs["rough"])
    try:
        while steps_logged(tmp_path / "rough") < LONG // 3 + 2:  # past checkpoints, in the second domain's turn
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.005)
        os.kill(rank_pids(process.pid)[0], signal.SIGKILL)
        assert finish(process)[0] != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert steps_logged(tmp_path / "rough") < LONG
    assert main(["run", str(configs["rough"])]) == 0
    assert final_bytes(tmp_path / "rough") == final_bytes(tmp_path / "smooth")
    rough, smooth = (read_records(tmp_path / name / "metrics.jsonl") for name in ("rough", "smooth"))
    for name in ("step", "loss", "grad_norm", "tokens/trained", "tokens/teacher"):
        assert [record[name] for record in rough] == [record[name] for record in smooth]
    assert [record["prompt_share/b"] for record in smooth] == [
        float(LONG // 3 <= step < 2 * LONG // 3) for step in range(LONG)
    ]
    spent = [replace(read_compute(tmp_path / name), seconds=0.0) for name in ("rough", "smooth")]
    assert spent[0] == spent[1]
    assert spent[0].generated_tokens == 0
    assert spent[0].teacher_tokens == spent[0].trained_tokens > 0

    capfd.readouterr()
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:1], *lines[2:-1], lines[1], lines[-1]]))  # one answer moved
    assert main(["run", str(configs["rough"])]) == 2
    assert "is of another run: rollout.dataset was " in capfd.readouterr().err


def test_answers_of_another_teacher(
    sampled: Path, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = off_policy(models, tmp_path / "run", sampled / "answers.jsonl")
    tree["teachers"]["b"] = {"checkpoint": str(models / "c")}
    assert main(["run", str(write_run(tmp_path / "run.yaml", tree))]) == 2
    assert "domain 'b' was answered by weights " in capfd.readouterr().err

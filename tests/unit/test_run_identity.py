"""A run folder is one run's: what may change on resume, what may not, and that two never share it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mopd.config import DomainSpec, EvalSpec, ModelSpec, ObjectiveSpec, OptimSpec, RunConfig, SourceSpec
from megatron_mopd.run_identity import check_kept_out, check_same_run, run_identity
from megatron_mopd.run_lock import lock_run_folder
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.yaml_config import ConfigError

MODEL = Path(__file__).parents[2] / "configs" / "tiny" / "model"
CONFIG = RunConfig(
    run_dir="r",
    stage="sft",
    steps=3,
    prompts_per_step=4,
    model=ModelSpec(hf_config=str(MODEL)),
    domains={"a": DomainSpec(source=SourceSpec(reasoning_gym="chain_sum", params={"max_digits": 2}))},
    objective=ObjectiveSpec(kind="cross_entropy"),
    optim=OptimSpec(lr=1e-3),
)


def identity(config: RunConfig) -> dict:
    return json.loads(json.dumps(run_identity(config, Tokenizer.load(MODEL))))


def test_length_speed_and_layout_may_change(tmp_path: Path) -> None:
    longer = dataclasses.replace(CONFIG, steps=9, run_dir="moved", optim=OptimSpec(lr=1.0))
    check_same_run(identity(CONFIG), identity(longer), tmp_path)


def test_the_length_of_a_cascade_says_whose_turn_it_is(tmp_path: Path) -> None:
    cascade = dataclasses.replace(CONFIG, domain_schedule="sequential")
    with pytest.raises(ConfigError, match="of another run: steps was 3, is 9"):
        check_same_run(identity(cascade), identity(dataclasses.replace(cascade, steps=9)), tmp_path)
    with pytest.raises(ConfigError, match="domain_schedule was 'mixed', is 'sequential'"):
        check_same_run(identity(CONFIG), identity(cascade), tmp_path)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 7}, "seed was 0, is 7"),
        ({"prompts_per_step": 8}, "prompts_per_step was 4, is 8"),
        (
            {"domains": {"a": DomainSpec(source=SourceSpec(reasoning_gym="gcd"))}},
            "domains.a.source.reasoning_gym was 'chain_sum', is 'gcd'; domains.a.source.max_digits was 2, is None",
        ),
        ({"objective": ObjectiveSpec(kind="cross_entropy", aggregation="token")}, "objective.aggregation was"),
    ],
)
def test_what_makes_it_another_run_is_named(change: dict, difference: str, tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ConfigError, match=re.escape(difference)):
        check_same_run(identity(CONFIG), identity(other), tmp_path)


def evaluating(config: RunConfig, **evaluation: int) -> RunConfig:
    return dataclasses.replace(config, evaluation=EvalSpec(**evaluation))


def test_what_a_run_kept_out_of_training_is_what_it_is_evaluated_on() -> None:
    endless = identity(evaluating(CONFIG, prompts=300, validation_prompts=50))
    check_kept_out(endless, evaluating(CONFIG, prompts=300, validation_prompts=400), "held_out")
    check_kept_out(endless, evaluating(CONFIG, prompts=900, validation_prompts=50), "validation")
    others = dataclasses.replace(CONFIG, domains={"b": CONFIG.domains["a"]})
    check_kept_out(endless, evaluating(others, prompts=900), "held_out")
    with pytest.raises(ConfigError, match=r"evaluation\.prompts: is 900, the checkpoint's run kept 300 a domain out"):
        check_kept_out(endless, evaluating(CONFIG, prompts=900), "held_out")
    with pytest.raises(ConfigError, match=r"evaluation\.validation_prompts: is 51, .* kept 50 a domain"):
        check_kept_out(endless, evaluating(CONFIG, validation_prompts=51), "validation")
    with pytest.raises(ConfigError, match=r"evaluation\.seed: is 1, the checkpoint's run had 20260629"):
        check_kept_out(endless, evaluating(CONFIG, seed=1), "held_out")
    # Files keep all of their held-out lines out, whatever the number and the seed; a validation tenth only if asked.
    source = SourceSpec(jsonl="x.jsonl")
    lines = dataclasses.replace(CONFIG, domains={"a": DomainSpec(source=source, verifier="exact")})
    check_kept_out(identity(evaluating(lines, prompts=3)), evaluating(lines, prompts=900, seed=1), "held_out")
    with pytest.raises(ConfigError, match=r"evaluation\.validation_prompts: is 5, .* kept 0 a domain"):
        check_kept_out(identity(lines), evaluating(lines, validation_prompts=5), "validation")


def test_an_identity_without_validation_is_that_of_earlier_versions() -> None:
    assert identity(CONFIG)["evaluation"] == {"seed": 20260629, "prompts": 200}


def test_a_folder_is_locked_until_its_run_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_mopd.run_lock import lock_run_folder;"
        f"file = lock_run_folder(Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"in use by process {holder.pid} on "):
            lock_run_folder(tmp_path)
    finally:
        holder.kill()
        holder.wait(timeout=20)
    with lock_run_folder(tmp_path):  # a killed holder holds nothing
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")

"""The methods that are compared: same base, same domains, same number of generated rollouts."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mopd.config import RunConfig, load_config
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "configs" / "tiny"
METHODS = ("mix_rl", "cascade_rl", "off_policy", "off_policy_kl", "mopd_sampled", "mopd_topk", "mopd")
ROLLOUTS = 25_600


def load(name: str) -> RunConfig:
    return load_config(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", METHODS)
def test_budget_base_and_domains_are_the_same(name: str) -> None:
    config, mopd = load(name), load("mopd")
    # Off-policy methods learn from a dataset of as many rollouts: `mopd sample` takes steps x prompts_per_step prompts.
    assert config.steps * config.prompts_per_step * config.rollout.samples_per_prompt == ROLLOUTS
    assert config.model == mopd.model
    assert config.evaluation == mopd.evaluation
    assert config.run_dir == f"runs/tiny/{name}"
    plain = {key: replace(domain, teacher=None) for key, domain in config.domains.items()}
    assert plain == {key: replace(domain, teacher=None) for key, domain in mopd.domains.items()}
    if config.stage == "mopd":
        assert config.teachers == mopd.teachers


def test_methods_differ_where_they_should() -> None:
    configs = {name: load(name) for name in METHODS}
    kinds = {name: (c.objective.kind, c.objective.divergence, c.rollout.engine) for name, c in configs.items()}
    assert kinds == {
        "mix_rl": ("grpo", "reverse_kl", "in_process"),
        "cascade_rl": ("grpo", "reverse_kl", "in_process"),
        "off_policy": ("cross_entropy", "reverse_kl", "dataset"),
        "off_policy_kl": ("full_vocab", "forward_kl", "dataset"),
        "mopd_sampled": ("sampled", "reverse_kl", "in_process"),
        "mopd_topk": ("teacher_topk", "reverse_kl", "in_process"),
        "mopd": ("full_vocab", "reverse_kl", "in_process"),
    }
    assert [name for name, c in configs.items() if c.domain_schedule == "sequential"] == ["cascade_rl"]
    mix = configs["mix_rl"].domain_shares(0)
    assert mix == pytest.approx(dict.fromkeys(("math", "reverse", "sort"), 1 / 3))


def test_the_held_out_text_is_that_of_its_script_and_of_held_out_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    texts = runpy.run_path(str(FOLDER / "build_text.py"))["texts"]()
    lines = (FOLDER / "held_out_text.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts
    assert len(set(texts)) == 300
    tokenizer = Tokenizer.load(FOLDER / "model")
    evaluated = load_config(FOLDER / "mopd.yaml", ["evaluation.prompts=500", "evaluation.validation_prompts=200"])
    mixer = DomainMixer(evaluated, tokenizer)  # as reproduce.yaml evaluates, and so keeps back
    held_out = {
        tokenizer.decode(p.token_ids, keep_special=True) for name in evaluated.domains for p in mixer.held_out(name)
    }
    assert {text[: text.index("<|assistant|>") + len("<|assistant|>")] for text in texts} <= held_out

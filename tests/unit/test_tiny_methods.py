"""The methods that are compared: same base, same domains, same number of generated rollouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mopd.config import RunConfig, load_config

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

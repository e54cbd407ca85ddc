"""Objectives, engines and schedules: which go together, and what the schedule makes of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_mopd.config import RunConfig, load_config
from megatron_mopd.method_config import sequential_steps
from megatron_mopd.yaml_config import ConfigError

TREE = """\
run_dir: runs/x
steps: 10
prompts_per_step: 4
model: {hf_config: m}
optim: {lr: 1e-3}
"""
SFT = TREE + "stage: sft\nobjective: {kind: cross_entropy}\ndomains: {a: {source: {reasoning_gym: chain_sum}}}\n"
RL = SFT.replace("sft", "rl").replace("cross_entropy", "grpo") + "rollout: {samples_per_prompt: 2}\n"
MOPD = TREE + (
    "stage: mopd\nobjective: {kind: full_vocab}\nteachers: {t: {checkpoint: t}}\n"
    "domains: {a: {teacher: t, source: {reasoning_gym: chain_sum}}, b: {teacher: t, source: {reasoning_gym: gcd}}}\n"
)
DATASET = "rollout={engine: dataset, dataset: answers.jsonl}"


def load(folder: Path, text: str, overrides: Sequence[str]) -> RunConfig:
    (folder / "run.yaml").write_text(text)
    return load_config(folder / "run.yaml", overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MOPD, ["objective={kind: teacher_topk, top_k: 0}"], "objective: top_k: must be >= 1"),
        (MOPD, ["objective.top_k=8"], "objective.top_k: only for the kind 'teacher_topk', not 'full_vocab'"),
        (
            MOPD,
            ["objective={kind: sampled, divergence: jsd}"],
            "objective.divergence: only for the kind 'full_vocab', not 'sampled'",
        ),
        (
            MOPD,
            ["objective.domain_weights.kind=token_share"],
            "objective.domain_weights.kind: 'token_share' shares out",
        ),
        (RL, ["objective.domain_weights.kind=gap_aware"], "objective.domain_weights.kind: 'gap_aware' is of stage"),
        (
            MOPD,
            ["objective.domain_weights={kind: gap_aware, low: 2}"],
            "objective.domain_weights: low and high: must be 0 < low",
        ),
        (MOPD, ["objective.domain_weights.decay=0.5"], "objective.domain_weights: low, high and decay: only for"),
        (MOPD, ["objective.divergence=hellinger"], "objective.divergence: expected one of reverse_kl, forward_kl, jsd"),
        (
            MOPD,
            ["objective={kind: full_vocab, divergence: jsd, alpha: 0.1}"],
            "objective.alpha: only for divergence 'mixed', not 'jsd'",
        ),
        (
            MOPD,
            ["objective={kind: full_vocab, beta: 0.1}"],
            "objective.beta: only for divergence 'jsd', not 'reverse_kl'",
        ),
        (MOPD, ["objective={kind: full_vocab, divergence: jsd, beta: 1}"], "objective: beta: must be in (0, 1); its"),
        (MOPD, ["objective.alpha=2"], "objective: alpha: must be in [0, 1]"),
        (SFT, ["objective.kind=teacher_topk"], "objective.kind: stage 'sft' takes cross_entropy, got 'teacher_topk'"),
        (SFT, ["rollout.engine=dataset"], "rollout: dataset: missing; engine 'dataset' needs the file that `mopd sam"),
        (SFT, ["rollout.dataset=x"], "rollout: dataset: not read by engine 'in_process'; set engine: dataset"),
        (RL, [DATASET, "rollout.samples_per_prompt=2"], "rollout.engine: stage 'rl' learns from the student's own"),
        (MOPD, [DATASET, "objective.kind=sampled"], "objective.kind: 'sampled' is an estimate on the student's own"),
        (
            MOPD,
            [DATASET, "rollout.samples_per_prompt=2"],
            "rollout.samples_per_prompt: every line of a dataset is one answer; set it to 1",
        ),
        (SFT, [DATASET, "domains.a.wrong_answers=0.5"], "domains.a.wrong_answers: only in stage 'sft', the answers"),
        (MOPD, ["domain_schedule=random"], "domain_schedule: expected one of mixed, sequential, got 'random'"),
        (
            MOPD,
            ["domain_schedule=sequential", "domains.b.weight=0.01"],
            "domain_schedule: 'sequential' leaves none of the 10 steps to domain b; raise steps or domains.b.weight",
        ),
        (MOPD, ["teachers={}"], "domains.a.teacher: 't' is not in teachers (none)"),
    ],
)
def test_methods_that_cannot_run(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, overrides)
    assert str(caught.value).startswith(f"{tmp_path}/run.yaml: {message}")


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (MOPD, ["objective={kind: teacher_topk, top_k: 8}"]),
        (MOPD, ["objective={kind: full_vocab, divergence: mixed, alpha: 0.1}", DATASET]),
        (MOPD, ["objective.divergence=jsd", "objective.beta=0.1", "domain_schedule=sequential"]),
        (MOPD, ["objective.aggregation=token", "objective.domain_weights.kind=token_share"]),
        (MOPD, ["objective.domain_weights={kind: gap_aware, low: 0.2, high: 4, decay: 0.5}"]),
        (SFT, [DATASET]),
        (RL, ["domain_schedule=sequential"]),
    ],
)
def test_methods_that_can(tmp_path: Path, text: str, overrides: list[str]) -> None:
    load(tmp_path, text, overrides)


def test_reference_answers_are_read_by_sft_without_a_dataset(tmp_path: Path) -> None:
    assert load(tmp_path, SFT, []).reads_answers
    assert not load(tmp_path, SFT, [DATASET]).reads_answers
    assert not load(tmp_path, MOPD, []).reads_answers


@pytest.mark.parametrize(
    ("weights", "steps", "ends"),
    [
        ([1, 1, 1], 9, [3, 6, 9]),
        ([1, 1, 1], 10, [3, 7, 10]),
        ([2, 1, 1], 4, [2, 3, 4]),
        ([0.35, 0.30, 0.35], 100, [35, 65, 100]),
    ],
)
def test_the_steps_of_a_cascade_tile_the_run(weights: list[float], steps: int, ends: list[int]) -> None:
    turns = sequential_steps(dict(zip("abc", weights, strict=True)), steps)
    assert [turn.stop for turn in turns.values()] == ends
    assert [step for turn in turns.values() for step in turn] == list(range(steps))


def test_shares_of_a_step(tmp_path: Path) -> None:
    mixed = load(tmp_path, MOPD, ["domains.a.weight=3"])
    assert mixed.domain_shares(0) == mixed.domain_shares(9) == {"a": 0.75, "b": 0.25}
    cascade = load(tmp_path, MOPD, ["domains.a.weight=3", "domain_schedule=sequential"])
    assert [cascade.domain_shares(step)["b"] for step in range(10)] == [0.0] * 8 + [1.0] * 2  # 7.5 rounds to 8
    assert cascade.domain_shares(0) == {"a": 1.0, "b": 0.0}

"""Rewards of the verifiers, by hand; what garbage and hostile responses get; group advantages, by hand."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from megatron_mopd.config import (
    DomainSpec,
    ModelSpec,
    ObjectiveSpec,
    OptimSpec,
    RolloutSpec,
    RunConfig,
    SourceSpec,
)
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.domains.source import ReasoningGymSource
from megatron_mopd.domains.verifiers import (
    EVALUATING_TASKS,
    final_answer,
    group_advantages,
    score_math,
    score_task,
    verify,
)
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import FinishReason, Prompt, Rollout
from megatron_mopd.yaml_config import ConfigError

TINY = Path(__file__).parents[2] / "configs/tiny/model"
SPELL = SourceSpec(reasoning_gym="spell_backward", params={"min_word_len": 4, "max_word_len": 6})
LINES = SourceSpec(jsonl="unused.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TINY)


def run_config(stage: Literal["sft", "rl"] = "rl", **domains: DomainSpec) -> RunConfig:
    return RunConfig(
        run_dir="unused",
        stage=stage,
        steps=1,
        prompts_per_step=1,
        model=ModelSpec(hf_config=str(TINY)),
        domains=domains,
        optim=OptimSpec(lr=1e-3),
        objective=ObjectiveSpec(kind="grpo" if stage == "rl" else "cross_entropy"),
        rollout=RolloutSpec(samples_per_prompt=2 if stage == "rl" else 1),
    )


def answered(
    tokenizer: Tokenizer,
    prompt: Prompt,
    text: str,
    *,
    sample: int = 0,
    stop: FinishReason = "stop",
    reward: float = 0.0,
) -> Rollout:
    end = [tokenizer.eos_id] if stop == "stop" else []
    response = np.array([*tokenizer.encode(text), *end], dtype=np.int64)
    token_ids = np.concatenate([prompt.token_ids, response])
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=token_ids,
        loss_mask=np.arange(len(token_ids)) >= len(prompt.token_ids),
        rollout_logprobs=np.zeros(len(token_ids), dtype=np.float32),
        policy_version=0,
        finish_reason=stop,
        reward=reward,
    )


def question(tokenizer: Tokenizer, domain: str, answer: str, identity: str = "0", **record: Any) -> Prompt:
    ids = tokenizer.render([{"role": "user", "content": "?"}])
    return Prompt(
        id=f"{domain}/{identity}",
        domain=domain,
        token_ids=ids,
        answer=answer,
        max_response_tokens=9,
        record=record,
    )


def test_task_reward_is_the_tasks_own_score(tokenizer: Tokenizer) -> None:
    config = run_config(spell=DomainSpec(source=SPELL))
    prompt = next(p for p in DomainMixer(config, tokenizer).draw(50) if len(set(p.answer)) == len(p.answer) == 4)
    right = prompt.answer
    half = right[:2] + "##"
    texts = [
        right,
        right.upper(),
        half,
        "",
        "####",
        f" {right}\n",
        f"<think>hm</think><answer>{right}</answer>",
    ]
    rollouts = [answered(tokenizer, prompt, text) for text in texts]
    rewards = [r.reward for r in verify(rollouts, config.domains, tokenizer)]
    assert rewards == [1.0, 1.0, 0.5, 0.0, 0.0, 1.0, 1.0]


def test_a_truncated_response_is_scored(tokenizer: Tokenizer) -> None:
    config = run_config(lines=DomainSpec(source=LINES, verifier="exact"))
    prompt = question(tokenizer, "lines", "ab")
    rollouts = [answered(tokenizer, prompt, text, stop="length") for text in ("ab", "abc")]
    assert [r.reward for r in verify(rollouts, config.domains, tokenizer)] == [1.0, 0.0]


def test_each_rollout_is_scored_by_its_own_domain(tokenizer: Tokenizer) -> None:
    config = run_config(
        stage="sft",
        exact=DomainSpec(source=LINES, verifier="exact"),
        math=DomainSpec(source=LINES, verifier="math"),
        none=DomainSpec(source=LINES, verifier="none"),
    )
    rollouts = [answered(tokenizer, question(tokenizer, d, "1/2"), "0.5") for d in ("none", "math", "exact", "math")]
    assert [r.reward for r in verify(rollouts, config.domains, tokenizer)] == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("plain", "plain"),
        (" two\n", "two"),
        ("<think>a <answer>0</answer></think> b", "b"),
        ("no opening tag</think>5", "5"),
        ("<answer>1</answer> or <answer> 2 </answer> so", "2"),
        ("<answer>3", "3"),
    ],
)
def test_final_answer(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "truth", "reward"),
    [
        ("42", "42", 1.0),
        ("the answer is 42.", "42", 1.0),
        ("so \\boxed{0.5} it is", "\\frac{1}{2}", 1.0),
        ("$\\frac{2}{4}$", "1/2", 1.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("\\boxed{1,234}", "$1234$", 1.0),
        ("41", "42", 0.0),
        ("", "42", 0.0),
        ("]]]{{{\\frac\x00", "42", 0.0),
        ("\\boxed{" * 200, "42", 0.0),
        ("\\boxed{\\frac{1}{0}}", "42", 0.0),
        ("\\boxed{9^{9^{9^{9}}}}", "42", 0.0),
    ],
)
def test_math(answer: str, truth: str, reward: float) -> None:
    assert score_math(answer, truth) == reward


def test_a_reference_that_math_verify_cannot_read_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"reference answer ' ': math-verify cannot read it"):
        score_math("1", " ")


def test_math_works_in_a_forked_process() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.starmap(score_math, [("0.5", "1/2"), ("0.4", "1/2")]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("task", "garbage"),
    [
        ("prime_factorization", "abc"),
        ("coin_flip", "1e999"),
        ("game_of_life", '{"a": 1}'),
        ("countdown", "9**9**9"),
        ("binary_matrix", "9**99999999"),
        ("string_insertion", "exit()"),
        ("countdown", "().__class__"),
    ],
)
def test_garbage_scores_zero(task: str, garbage: str) -> None:
    record = ReasoningGymSource(task, {}, seed=1).item(0).record
    assert score_task(garbage, task, {}, record) == 0.0


def test_a_response_is_never_executed(tmp_path: Path) -> None:
    for task in sorted(EVALUATING_TASKS - {"composite"}):
        record = ReasoningGymSource(task, {}, seed=1).item(0).record
        for attack in (
            f"open('{tmp_path}/x', 'w')",
            f"[open('{tmp_path}/y', 'w')]",
            "__import__('os').abort()",
        ):
            score_task(attack, task, {}, record)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", sorted(EVALUATING_TASKS - {"composite", "countdown", "puzzle24"}))
def test_right_answers_of_evaluating_tasks_still_score(task: str) -> None:
    source = ReasoningGymSource(task, {}, seed=1)
    for index in range(3):
        item = source.item(index)
        assert score_task(item.answer, task, {}, item.record) == 1.0


def test_the_list_of_evaluating_tasks_is_complete() -> None:
    import reasoning_gym

    calls = re.compile(r"(?<!def )\b(?:eval\((?!entry)|(?:sympy\.|sp\.|^from sympy.*)parse_expr|sympify\()")
    # These evaluate what they generated themselves, never a response.
    own = {"basic_arithmetic", "bitwise_arithmetic", "generators_00_49", "generators_50_99"}
    files = Path(reasoning_gym.__file__).parent.rglob("*.py")
    found = {file.stem for file in files if any(calls.search(line) for line in file.read_text().splitlines())}
    imported = {"countdown", "puzzle24"}
    assert found - own | imported == EVALUATING_TASKS - {"composite"}


def test_a_slow_scorer_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mopd.domains import verifiers

    def forever(answer: str, entry: dict[str, Any]) -> float:
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    monkeypatch.setattr(verifiers, "CPU_SECONDS_PER_ANSWER", 0.1)
    monkeypatch.setattr(verifiers, "_task_scorer", lambda task, params: forever)
    assert score_task("1", "gcd", {}, {}) == 0.0


def test_group_advantages_by_hand(tokenizer: Tokenizer) -> None:
    rewards = {"a": [1.0, 0.0, 0.0, 1.0], "b": [0.1, 0.1, 0.1], "c": [1.0, 0.0, 0.0, 0.0]}
    prompts = {name: question(tokenizer, "d", "", name) for name in rewards}
    order = [
        ("a", 0),
        ("c", 0),
        ("b", 0),
        ("a", 1),
        ("c", 1),
        ("c", 2),
        ("b", 1),
        ("a", 2),
        ("b", 2),
        ("c", 3),
        ("a", 3),
    ]
    rollouts = [answered(tokenizer, prompts[n], "", sample=s, reward=rewards[n][s]) for n, s in order]
    result = {(r.prompt.id[2:], r.sample): r.outcome_advantage for r in group_advantages(rollouts, True)}
    assert [result["a", s] for s in range(4)] == pytest.approx([1.0, -1.0, -1.0, 1.0], abs=1e-5)
    assert [result["b", s] for s in range(3)] == [0.0, 0.0, 0.0]
    # mean 1/4, population variance 3/16
    assert [result["c", s] for s in range(4)] == pytest.approx([3**0.5] + [-(3**-0.5)] * 3, abs=1e-5)
    centred = {(r.prompt.id[2:], r.sample): r.outcome_advantage for r in group_advantages(rollouts, False)}
    assert [centred["c", s] for s in range(4)] == [0.75, -0.25, -0.25, -0.25]
    assert [r.reward for r in group_advantages(rollouts, True)] == [rewards[n][s] for n, s in order]

"""Evaluation of scripted answers in numbers, results through JSON and back, and what a configuration may ask for."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mopd.config import BenchmarkSpec, EvalSpec, SourceSpec, load_config, save_config
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.evaluation import EvalResult, Score
from megatron_mopd.evaluation.evaluate import evaluate, evaluate_benchmarks
from megatron_mopd.evaluation.results import score_metrics
from megatron_mopd.rollout.collect import Collector
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.yaml_config import ConfigError, build
from tests.unit.test_collect import MODEL, WORLD, Scripted, config

WORDS = SourceSpec(reasoning_gym="spell_backward", params={"min_word_len": 3, "max_word_len": 4})


def collector(evaluation: EvalSpec, right: list[int]) -> tuple[Any, DomainMixer, Collector, Scripted]:
    run = dataclasses.replace(config(), evaluation=evaluation)
    tokenizer = Tokenizer.load(MODEL)
    engine, mixer = Scripted(tokenizer, right), DomainMixer(run, tokenizer)
    return run, mixer, Collector(run, mixer, engine, tokenizer, WORLD), engine


def test_scores_of_scripted_answers_by_hand() -> None:
    run, mixer, answers, engine = collector(EvalSpec(prompts=4, samples=4, pass_at=(1, 2)), right=[1, 4, 0, 2])
    score = evaluate(run, mixer, answers)["words"]
    assert (score.accuracy, score.prompts, score.samples, score.too_long) == (7 / 16, 4, 4, 0)
    # Shares 1/4, 1, 0, 1/2; pass@2: 1 - C(3, 2)/6 = 1/2, 1, 0, 1 - 1/6.
    assert score.standard_error == pytest.approx(np.std([0.25, 1, 0, 0.5], ddof=1) / 2, rel=1e-15)
    assert score.pass_at == pytest.approx({"1": 7 / 16, "2": (1 / 2 + 1 + 5 / 6) / 4}, rel=1e-15)
    assert score.truncation_rate == 9 / 16
    assert engine.seeds == [run.evaluation.seed]
    assert evaluate(run, mixer, answers, seed=5) == {"words": score}
    assert engine.seeds[1:] == [5]
    assert score_metrics({"words": score}) == {
        "accuracy/words": score.accuracy,
        "standard_error/words": score.standard_error,
        "pass_at_1/words": score.pass_at["1"],
        "pass_at_2/words": score.pass_at["2"],
    }


def test_a_benchmark_has_its_own_sampling_and_verifier(tmp_path: Path) -> None:
    file = tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": "1/2"}) + "\n" for i in range(3)))
    math = BenchmarkSpec(source=SourceSpec(jsonl=str(file)), verifier="math", samples=2, max_response_tokens=8)
    spec = EvalSpec(prompts=5, samples=1, benchmarks={"m": math}, out_of_domain={"o": BenchmarkSpec(source=WORDS)})
    run, mixer, answers, _ = collector(spec, right=[1])
    score = evaluate_benchmarks(run, mixer, answers, "benchmarks")["m"]
    assert (score.accuracy, score.prompts, score.samples) == (0.5, 3, 2)
    assert score.standard_error == 0.0
    other = evaluate_benchmarks(run, mixer, answers, "out_of_domain")["o"]
    assert (other.accuracy, other.prompts, other.samples) == (1.0, 5, 1)


def test_benchmarks_are_scored_by_instructions_and_by_programs(tmp_path: Path) -> None:
    line = {"prompt": "Do not use any commas.", "answer": "a, b", "domain": "if"}
    line |= {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    program = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    print(json.dumps({"id": question["id"], "score": float(question["response"] == "~")}))
"""
    limits: dict[str, Any] = {"samples": 3, "max_response_tokens": 8}
    for verifier, extra in (("ifeval", {}), ("command", {"command": (sys.executable, "-c", program)})):
        (tmp_path / "if.jsonl").write_text(json.dumps(line))
        task = BenchmarkSpec(source=SourceSpec(jsonl=str(tmp_path / "if.jsonl")), verifier=verifier, **limits, **extra)
        run, mixer, answers, _ = collector(EvalSpec(prompts=2, benchmarks={"if": task}), right=[1])
        # One answer is "a, b", two are "~".
        score = evaluate_benchmarks(run, mixer, answers, "benchmarks")["if"]
        assert (score.accuracy, score.prompts, score.samples) == (2 / 3, 1, 3)
    (tmp_path / "if.jsonl").write_text(json.dumps(line | {"instruction_id_list": ["punctuation:no_full_stop"]}))
    task = BenchmarkSpec(source=task.source, verifier="ifeval")
    run, mixer, _, _ = collector(EvalSpec(prompts=2, benchmarks={"if": task}), right=[1])
    with pytest.raises(ConfigError, match=r"if\.jsonl:1: .*no_full_stop"):
        mixer.check()


def test_partial_credit_is_not_a_right_answer() -> None:
    run, mixer, _, engine = collector(EvalSpec(prompts=2), right=[1])
    spec = dataclasses.replace(run.domains["words"], verifier="task")
    run = dataclasses.replace(run, domains={"words": spec})
    almost = Collector(run, mixer, engine, Tokenizer.load(MODEL), WORLD)
    engine._right = [0]  # "~" gets a share of spell_backward's reward at most
    assert evaluate(run, mixer, almost)["words"].accuracy == 0.0
    engine._right = [1]
    assert evaluate(run, mixer, almost)["words"].accuracy == 1.0


def test_a_result_survives_json() -> None:
    a = Score.of(np.array([[1, 0], [1, 1]], bool), ks=(1, 2, 4), truncation_rate=0.25, too_long=3)
    b = Score.of(np.array([[0, 1]], bool), ks=(1,), truncation_rate=0.0, too_long=0)
    assert a.pass_at == {"1": 0.75, "2": 1.0}
    result = EvalResult(
        split="validation", domains={"a": a, "b": a}, perplexity=12.5, perplexity_tokens=99, benchmarks={"b": b}
    )
    tree = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert EvalResult.from_json(tree) == result
    assert tree["domains"]["a"]["pass_at"] == {"1": 0.75, "2": 1.0}
    assert tree["benchmarks"]["b"]["standard_error"] is None
    assert (tree["mean"], result.accuracy) == (0.75, {"a": 0.75, "b": 0.75})
    # Two domains with the error 0.25 each: sqrt(2) * 0.25 / 2.
    assert tree["mean_standard_error"] == pytest.approx(0.25 / 2**0.5, rel=1e-15)
    single = dataclasses.replace(result, domains={"a": a, "b": b})
    assert single.as_json()["mean_standard_error"] is None
    with pytest.raises(ConfigError, match=r"domains\.a\.accuracy: expected float, got 'x'"):
        EvalResult.from_json({"split": "held_out", "domains": {"a": {"accuracy": "x"}}})
    with pytest.raises(ConfigError, match="split: expected one of held_out, validation, got 'test'"):
        EvalResult.from_json({"split": "test", "domains": {}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"validation_prompts": -1}, "validation_prompts: must be >= 0"),
        ({"pass_at": [2]}, r"pass_at: 2 is not in 1..samples \(1\); raise samples"),
        ({"pass_at": [0], "samples": 4}, "pass_at: 0 is not in 1..samples"),
        ({"pass_at": [2, 2], "samples": 4}, "pass_at: a number appears twice"),
        ({"temperature": 0, "samples": 2}, r"samples: 2 greedy answers \(temperature 0\) would all be the same"),
        ({"benchmarks": {"b": {}}}, r"missing key 'benchmarks\.b\.source'"),
        ({"benchmarks": {"b": {"weight": 2}}}, r"benchmarks\.b: weight: only for domains that are trained on"),
        ({"benchmarks": {"b": {"teacher": "a"}}}, r"benchmarks\.b: teacher: only for domains that are trained on"),
        ({"benchmarks": {"b": {"samples": 0}}}, r"benchmarks\.b: samples: must be >= 1"),
        ({"benchmarks": {"b": {"prompts": 0}}}, r"benchmarks\.b: prompts: must be >= 1"),
        ({"benchmarks": {"b": {"verifier": "none"}}}, r"benchmarks\.b: verifier: 'none' gives no score"),
        ({"benchmarks": {"b": {"sample": 2}}}, r"unknown key 'benchmarks\.b\.sample'\. Did you mean 'samples'"),
        ({"samples": 4, "benchmarks": {"b": {"temperature": 0}}}, r"benchmarks\.b\.samples: 4 greedy answers"),
        ({"temperature": 0, "out_of_domain": {"b": {"samples": 4}}}, r"out_of_domain\.b\.samples: 4 greedy answers"),
    ],
)
def test_evaluations_that_make_no_sense(tree: dict[str, Any], message: str) -> None:
    for group in ("benchmarks", "out_of_domain"):
        for task in tree.get(group, {}).values():
            if task:
                task["source"] = {"reasoning_gym": "chain_sum"}
    with pytest.raises(ConfigError, match=f"^{message}"):
        build(EvalSpec, tree)


def test_a_benchmark_is_evaluated_whole() -> None:
    source = {"jsonl": "x", "held_out": "y"}
    with pytest.raises(ConfigError, match=r"^benchmarks\.b: source\.held_out: all of jsonl is evaluated"):
        build(EvalSpec, {"benchmarks": {"b": {"source": source, "verifier": "exact"}}})
    with pytest.raises(ConfigError, match=r"^source: validation: only beside jsonl"):
        build(BenchmarkSpec, {"source": {"reasoning_gym": "chain_sum", "validation": "x"}})


def test_an_evaluation_is_saved_and_read_back(tmp_path: Path) -> None:
    benchmark = BenchmarkSpec(source=WORDS, samples=32, temperature=0.6)
    spec = EvalSpec(samples=8, pass_at=(1, 8), validation_prompts=5, perplexity="t.jsonl", benchmarks={"b": benchmark})
    assert spec.sampling_of(benchmark) == (32, 0.6)
    assert spec.sampling_of(BenchmarkSpec(source=WORDS)) == (8, 1.0)
    run = dataclasses.replace(config(), evaluation=spec)
    save_config(run, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == run

"""The pure parts of `mopd reproduce`: order and cycles, costs and budgets, intervals, scores."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mopd.evaluation.results import EvalResult, Score
from megatron_mopd.reproduce.config import MethodSpec, load_reproduce_config
from megatron_mopd.reproduce.cost import Cost, budget_line, check_budget, drawing_more, node_cost, own_nodes
from megatron_mopd.reproduce.graph import Node, in_order, with_inputs
from megatron_mopd.reproduce.statistics import Estimate
from megatron_mopd.reproduce.store import write_json
from megatron_mopd.reproduce.summary import Figures, lost_leads, other_abilities, summary_path
from megatron_mopd.reproduce.table import shown
from megatron_mopd.reproduce.tune import trial_scores, tuning_table
from megatron_mopd.yaml_config import ConfigError
from tests.comparison import write_comparison


def node(name: str, *inputs: str) -> Node:
    return Node(name=name, kind="run", tree={}, inputs={f"key{index}": other for index, other in enumerate(inputs)})


def run(name: str, stage: str, *inputs: str, steps: int = 4, samples: int = 1, engine: str = "in_process") -> Node:
    domains = {
        "short": {"weight": 3.0, "max_prompt_tokens": 10, "max_response_tokens": 5},
        "long": {"weight": 1.0, "max_prompt_tokens": 20, "max_response_tokens": 15},
    }
    rollout = {"samples_per_prompt": samples, "engine": engine}
    tree = {"stage": stage, "steps": steps, "prompts_per_step": 8, "rollout": rollout, "domains": domains}
    return Node(name=name, kind="run", tree=tree, inputs={str(index): other for index, other in enumerate(inputs)})


def test_every_node_comes_after_its_inputs_and_otherwise_in_the_given_order() -> None:
    nodes = [node("d", "b", "c"), node("c", "a"), node("b", "a"), node("a"), node("e")]
    assert [item.name for item in in_order(nodes)] == ["a", "b", "c", "d", "e"]


def test_a_cycle_is_named_in_full() -> None:
    with pytest.raises(ConfigError, match="a needs c needs b needs a: a cycle"):
        in_order([node("a", "c"), node("b", "a"), node("c", "b")])


def test_a_missing_node_is_named() -> None:
    with pytest.raises(ConfigError, match="a: its key0 is the node 'x', which does not exist"):
        in_order([node("a", "x")])


def test_what_a_node_needs() -> None:
    nodes = {item.name: item for item in (node("a"), node("b", "a"), node("c", "b"), node("d", "a"))}
    assert with_inputs(nodes, ["c"]) == {"a", "b", "c"}
    assert with_inputs(nodes, []) == set()


def test_cost_of_a_node() -> None:
    # 4 steps x 8 prompts x 2 answers; (3 x 15 + 1 x 35) / 4 = 20 tokens at most each.
    assert node_cost(run("a", "rl", samples=2)) == Cost(steps=4, rollouts=64, most_tokens=1280)
    assert node_cost(run("a", "sft")) == Cost(steps=4, rollouts=0, most_tokens=640)
    assert node_cost(run("a", "mopd", engine="dataset")) == Cost(steps=4, rollouts=0, most_tokens=640)
    assert node_cost(Node(name="a", kind="merge", tree={})) == Cost()


def test_the_budget_counts_everything_but_base_and_teachers_once() -> None:
    nodes = {
        item.name: item
        for item in (
            run("seed0/base", "rl"),
            run("seed0/teachers.a", "rl", "seed0/base"),
            run("seed0/mopd", "mopd", "seed0/base", "seed0/teachers.a"),
            run("seed0/again.rl", "rl", "seed0/mopd", samples=2),
            run("seed0/again", "mopd", "seed0/mopd", "seed0/again.rl"),
        )
    }
    assert own_nodes(nodes, "again", 0) == {"seed0/mopd", "seed0/again.rl", "seed0/again"}
    methods = {name: MethodSpec(family="mopd", run="x.yaml") for name in ("mopd", "again")}
    check_budget(nodes, methods, {"mopd": 32, "again": 32 + 64 + 32}, 0)
    with pytest.raises(ConfigError, match=r"methods.again: its files generate 128 rollouts, the budget is 32"):
        check_budget(nodes, methods, {"mopd": 32, "again": 32}, 0)


def test_what_dynamic_sampling_draws_is_not_called_checked() -> None:
    plain, more = run("seed0/plain", "rl"), run("seed0/more", "rl")
    more = replace(more, tree=more.tree | {"objective": {"dynamic_sampling": True}})
    nodes = {item.name: item for item in (plain, more)}
    assert drawing_more(nodes, ["plain", "more"], 0) == ["more"]
    assert budget_line({"plain": 32, "more": 32}, 32, ["more"]) == (
        "budget, checked: 32 rollouts each: plain, more; at least, as dynamic sampling draws more: more"
    )
    assert budget_line({"plain": 32}, 32) == "budget, checked: 32 rollouts each: plain"


def test_interval_of_five_seeds() -> None:
    # s = sqrt(2.5 / 4) of 0, 1, 2, 3, 4 is sqrt(2.5); t(4) = 2.776445; half width 2.776445 x sqrt(2.5 / 5).
    estimate = Estimate.of({seed: float(seed) for seed in range(5)})
    assert estimate.mean == 2.0
    assert estimate.interval == pytest.approx((2 - 1.963243, 2 + 1.963243), abs=1e-5)
    assert estimate.half_width == pytest.approx(1.963243, abs=1e-5)


def test_one_seed_has_no_interval_and_nan_is_left_out() -> None:
    assert Estimate.of({3: 0.5}).as_json() == {"mean": 0.5, "interval": None, "per_seed": {"3": 0.5}}
    partly = Estimate.of({0: 1.0, 1: math.nan, 2: 3.0})
    assert partly.mean == 2.0
    assert partly.interval == pytest.approx((2 - 12.70620, 2 + 12.70620), abs=1e-4)
    assert partly.as_json()["per_seed"] == {"0": 1.0, "1": None, "2": 3.0}
    assert Estimate.of({0: math.nan}).as_json() == {"mean": None, "interval": None, "per_seed": {"0": None}}


def result(**accuracy: float) -> EvalResult:
    scores = {
        name: Score(accuracy=value, standard_error=None, prompts=1, samples=1) for name, value in accuracy.items()
    }
    return EvalResult(split="held_out", domains=scores)


def test_scores_are_normalised_by_the_teacher_of_each_domain_and_seed() -> None:
    figures = Figures(
        domains={"x": "one", "y": "two"},
        results={
            (0, "base"): result(x=0.5, y=0.2),
            (0, "teachers.one"): result(x=0.9, y=0.0),
            (0, "teachers.two"): result(x=0.1, y=0.6),
            (0, "mopd"): result(x=0.8, y=0.7),
            (1, "base"): result(x=0.5, y=0.4),
            (1, "teachers.one"): result(x=0.5, y=0.0),
            (1, "teachers.two"): result(x=0.0, y=0.8),
            (1, "mopd"): result(x=0.9, y=0.6),
        },
        compute={},
    )
    assert figures.score(0, "mopd", "x") == pytest.approx(0.75)
    assert figures.score(0, "mopd", "y") == pytest.approx(1.25)
    assert figures.mean_score(0, "mopd", ["x", "y"]) == pytest.approx(1.0)
    # (0.3 + 0.5) of (0.4 + 0.4); the second teacher alone, with a base of 0.4: 0.2 of 0.4.
    assert figures.headroom_recovered(0, "mopd", ["x", "y"]) == pytest.approx(1.0)
    assert figures.headroom_recovered(1, "mopd", ["x", "y"]) == pytest.approx((0.4 + 0.2) / (0.0 + 0.4))
    assert figures.headroom_recovered(1, "mopd", ["y"]) == pytest.approx(0.5)
    assert math.isnan(figures.headroom_recovered(1, "mopd", ["x"]))
    # A teacher that learned nothing normalises nothing: the mean is over the other domains.
    assert math.isnan(figures.score(1, "mopd", "x"))
    assert figures.mean_score(1, "mopd", ["x", "y"]) == pytest.approx(0.5)
    assert math.isnan(figures.mean_score(1, "mopd", ["x"]))
    (line,) = lost_leads(figures)
    assert line.startswith("seed 1: teacher one has 0.500 in x, the base 0.500: no lead to keep")


def test_benchmarks_are_averaged_over_seeds_and_null_where_there_are_none() -> None:
    def at(accuracy: float) -> EvalResult:
        return replace(result(x=0.5), benchmarks=result(aime25=accuracy, ifeval=0.5).domains)

    figures = Figures(
        domains={"x": "one"}, results={(0, "m"): at(0.25), (1, "m"): at(0.75), (0, "base"): result(x=0.1)}, compute={}
    )
    found = other_abilities(figures, "m", (0, 1))
    assert found["benchmarks"]["aime25"]["mean"] == 0.5
    assert found["benchmarks"]["aime25"]["per_seed"] == {"0": 0.25, "1": 0.75}
    assert found["benchmarks"]["ifeval"]["interval"] == [0.5, 0.5]
    assert found["perplexity"] is None and found["out_of_domain"] is None
    assert other_abilities(figures, "base", (0,))["benchmarks"] is None


def test_a_summary_of_fewer_seeds_never_replaces_one_of_more(tmp_path: Path) -> None:
    full = tmp_path / "summary.json"
    assert summary_path(tmp_path, 1) == full
    write_json(full, {"seeds": [0, 1, 2]})
    assert summary_path(tmp_path, 3) == summary_path(tmp_path, 5) == full
    assert summary_path(tmp_path, 1) == tmp_path / "summary-1-seed.json"
    assert summary_path(tmp_path, 2) == tmp_path / "summary-2-seeds.json"


def test_a_trial_without_a_score_is_null_and_never_the_best(tmp_path: Path) -> None:
    file = write_comparison(tmp_path / "project")
    config = load_reproduce_config(file)
    scores = {"base": 0.5, "teachers.a": 0.9, "teachers.b": 0.9, "mopd_trial1": 0.9, "mopd_trial2": 0.7}
    results = {(9, name): result(a=value, b=value) for name, value in scores.items()}
    figures = Figures(domains={"a": "a", "b": "b"}, results=results, compute={})
    assert trial_scores(config, figures)["methods"]["mopd"]["best"] == 0
    flat = {key: result(a=0.5, b=0.5) for key in results}
    tuning = trial_scores(config, Figures(domains={"a": "a", "b": "b"}, results=flat, compute={}))
    assert tuning["methods"]["mopd"]["best"] is None
    assert [trial["score"] for trial in tuning["methods"]["mopd"]["trials"]] == [None, None]
    write_json(tmp_path / "tuning.json", tuning)
    assert list(tuning_table(config, tuning).columns[2].cells) == ["-", "-"]


def test_a_figure_in_the_table() -> None:
    assert shown({"mean": 0.9512, "interval": [0.9012, 1.0012], "per_seed": {}}) == "0.951 ± 0.050"
    assert shown({"mean": 0.9512, "interval": None, "per_seed": {}}) == "0.951"
    assert shown({"mean": None, "interval": None, "per_seed": {}}) == "-"

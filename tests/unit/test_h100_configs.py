"""configs/qwen3_30b_a3b: the paper's values, and every check that needs no file of that size. Nothing of it is run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.cli import main
from megatron_mopd.config import RunConfig, check_layout, load_config
from megatron_mopd.merge.config import load_merge_config
from megatron_mopd.preflight import check_beforehand
from megatron_mopd.reproduce.command import Options, Plan, make_plan
from megatron_mopd.reproduce.config import load_reproduce_config
from megatron_mopd.student.architecture import check_architecture, read_architecture
from megatron_mopd.yaml_config import ConfigError, to_tree

ROOT = Path(__file__).parents[2]
FOLDER = Path("configs/qwen3_30b_a3b")
RUNS = ("sft", "teacher_math", "teacher_if", "teacher_swe", "mix_rl", "cascade_rl", "off_policy", "mopd", "eval")
SERVED = ("teacher_math", "teacher_if", "teacher_swe", "mix_rl", "cascade_rl", "mopd")
"""Those whose answers SGLang samples."""
WORLDS = (8, 64)
"""Ranks: the fewest of the layout, one machine's; and those that README.md counts with."""

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 65536,
}
"""Qwen3-30B-A3B-Base, with the positions that README.md asks for instead of its 32,768."""

RL: dict[str, Any] = {
    "stage": "rl",
    "objective.kind": "grpo",
    "objective.dynamic_sampling": True,
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.28,
    "rollout.engine": "sglang",
    "rollout.routing_replay": "R3",
    "rollout.samples_per_prompt": 8,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "optim.updates_per_step": 1,
}
TEACHER = {**RL, "optim.lr": 3e-6}
MOPD: dict[str, Any] = {
    "stage": "mopd",
    "steps": 50,
    "prompts_per_step": 2048,
    "objective.aggregation": "sequence",
    "objective.outcome_weight": 0.0,
    "objective.dynamic_sampling": False,
    "rollout.samples_per_prompt": 1,
    "rollout.temperature": 1.0,
    "optim.lr": 2e-6,
    "optim.warmup_steps": 30,
}
ON_POLICY = {**MOPD, "rollout.engine": "sglang", "rollout.routing_replay": "R3"}
SAMPLED = {**MOPD, "rollout.engine": "in_process"}
OFF_POLICY = {**MOPD, "rollout.engine": "dataset"}
NODES: dict[str, dict[str, Any]] = {
    "base": {"stage": "sft", "objective.kind": "cross_entropy", "rollout.engine": "in_process", "steps": 2000},
    "teachers.math": {**TEACHER, "prompts_per_step": 144, "steps": 152},
    "teachers.if": {**TEACHER, "prompts_per_step": 144, "steps": 152},
    "teachers.swe": {**TEACHER, "prompts_per_step": 80, "steps": 234},
    "mix_rl": {**RL, "optim.lr": 4e-6, "prompts_per_step": 256, "steps": 244},
    "cascade_rl.if": {**TEACHER, "prompts_per_step": 144, "steps": 152},
    "cascade_rl.math": {**TEACHER, "prompts_per_step": 144, "steps": 152},
    "cascade_rl": {**TEACHER, "prompts_per_step": 80, "steps": 234},
    "off_policy.sample": SAMPLED,
    "off_policy": {**OFF_POLICY, "stage": "sft", "objective.kind": "cross_entropy", "optim.schedule": "constant"},
    "off_policy_kl.sample": SAMPLED,
    "off_policy_kl": {**OFF_POLICY, "objective.kind": "full_vocab", "objective.divergence": "forward_kl"},
    "mopd_sampled": {**ON_POLICY, "objective.kind": "sampled", "objective.advantage_clip": 5.0},
    "mopd_topk": {**ON_POLICY, "objective.kind": "teacher_topk", "objective.top_k": 64},
    "mopd": {**ON_POLICY, "objective.kind": "full_vocab", "objective.divergence": "reverse_kl"},
    "mopd_rounds.rl_math": {**TEACHER, "prompts_per_step": 144, "steps": 152},
    "mopd_rounds.rl_if": {**TEACHER, "prompts_per_step": 144, "steps": 152},
    "mopd_rounds": {**ON_POLICY, "objective.kind": "full_vocab"},
}
"""Node -> its values, written by hand from Appendix A of arXiv 2606.30406 and from what our files call ours."""
LENGTHS = {"math": 32_768, "if": 32_768, "swe": 65_536}
"""Appendix A: tokens of prompt and answer."""
MIX = {"math": 0.35, "if": 0.35, "swe": 0.30}
ROLLOUTS = {"mix_rl": 499_712, "cascade_rl": 499_968, "mopd_rounds": 555_008}

NOT_HERE = (
    'evaluation.benchmarks.ifbench.command=["true"]',
    'evaluation.benchmarks.swe_bench_verified.command=["true"]',
)
"""In place of the programs of the benchmarks, which are not installed where tests run."""
INSTRUCTIONS = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, as the files want it: their own folder, a few lines of data, and a model without weights."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for name in data_files():
        record = INSTRUCTIONS if name.startswith("if") else {}
        lines = [{"prompt": f"{name} {number}", "answer": str(number), **record} for number in range(60)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_model(tmp_path / "models" / "Qwen3-30B-A3B-Base", QWEN3_30B_A3B)
    return tmp_path


def data_files() -> list[str]:
    own = [f"{domain}_{stage}" for domain in MIX for stage in ("sft", "rl")]
    return [*own, "aime25", "aime26", "ifeval", "ifbench", "swe_bench_verified"]


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A real config.json beside the tiny configuration's tokenizer."""
    folder.mkdir(parents=True)
    for file in (ROOT / "configs" / "tiny" / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / FOLDER / f"{name}.yaml", overrides)


def plan() -> Plan:
    return make_plan(load_reproduce_config(FOLDER / "reproduce.yaml"), Options())


def at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def test_every_node_has_the_papers_values(project: Path) -> None:
    nodes = {name.removeprefix("seed0/"): node for name, node in plan().nodes.items()}
    trained = {name: node for name, node in nodes.items() if node.kind in ("run", "sample")}
    assert list(trained) == list(NODES)
    for name, values in NODES.items():
        assert {path: at(trained[name].tree, path) for path in values} == values, name
        for domain, spec in trained[name].tree["domains"].items():
            assert spec["max_prompt_tokens"] + spec["max_response_tokens"] == LENGTHS[domain]


def test_the_graph_is_that_of_the_tiny_comparison() -> None:
    small = load_reproduce_config(ROOT / "configs" / "tiny" / "reproduce.yaml")
    large = load_reproduce_config(ROOT / FOLDER / "reproduce.yaml")
    described = [{name: (spec.label, spec.family) for name, spec in file.methods.items()} for file in (small, large)]
    assert described[0] == described[1]
    assert list(large.teachers) == list(MIX)
    expected = {name: 0 if spec.family == "merge" else 102_400 for name, spec in large.methods.items()} | ROLLOUTS
    assert {name: large.rollouts(name) for name in large.methods} == expected


def test_cascade_and_second_round_start_where_they_should(project: Path) -> None:
    inputs = {name.removeprefix("seed0/"): node.inputs for name, node in plan().nodes.items()}
    chain = ["cascade_rl", "cascade_rl.math", "cascade_rl.if"]
    starts = ["seed0/cascade_rl.math", "seed0/cascade_rl.if", "seed0/base"]
    assert [inputs[name] for name in chain] == [{"model.checkpoint": start} for start in starts]
    assert inputs["mopd_rounds"] == {
        "model.checkpoint": "seed0/mopd",
        "teachers.math.checkpoint": "seed0/mopd_rounds.rl_math",
        "teachers.if.checkpoint": "seed0/mopd_rounds.rl_if",
    }


@pytest.mark.parametrize("name", RUNS)
def test_files_agree_in_domains_evaluation_and_base(name: str) -> None:
    config, mopd = load(name), load("mopd")
    assert config.evaluation == mopd.evaluation
    assert config.run_dir == f"runs/qwen3_30b_a3b/{name}"
    layout = (config.parallel.tensor, config.parallel.expert)
    assert layout == (mopd.parallel.tensor, mopd.parallel.expert)
    assert config.rollout.sglang == (mopd.rollout.sglang if name in SERVED else None)
    if name == "sft":
        assert config.model.checkpoint == "models/Qwen3-30B-A3B-Base"
        return
    assert config.model == mopd.model
    for domain, spec in config.domains.items():
        assert spec == replace(mopd.domains[domain], teacher=spec.teacher, weight=spec.weight)


@pytest.mark.parametrize("name", ["sft", "mix_rl", "off_policy", "mopd"])
def test_domains_are_mixed_as_in_the_paper(name: str) -> None:
    assert load(name).domain_shares(0) == pytest.approx(MIX)


def test_evaluation_is_the_papers() -> None:
    evaluation = load("mopd").evaluation
    assert {name: evaluation.sampling_of(task) for name, task in evaluation.benchmarks.items()} == {
        "aime25": (32, 1.0),
        "aime26": (32, 1.0),
        "ifeval": (1, 1.0),
        "ifbench": (1, 1.0),
        "swe_bench_verified": (1, 1.0),
    }


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "dare_ties", "sce"])
def test_merges_are_of_the_three_teachers(method: str) -> None:
    spec = load_reproduce_config(ROOT / FOLDER / "reproduce.yaml").methods[method]
    merge = load_merge_config(ROOT / spec.file, spec.overrides)
    assert merge.method == method
    teachers = {name: f"runs/qwen3_30b_a3b/teacher_{name}/checkpoints/latest" for name in MIX}
    assert (merge.base, merge.models) == ("runs/qwen3_30b_a3b/sft/checkpoints/latest", teachers)
    recipe = merge.recipe()
    densities = {"ties": 0.2, "dare_ties": 0.8, "sce": 0.1}
    assert (recipe.scaling, recipe.density) == (1.0, densities.get(method, 1.0))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", RUNS)
def test_layout_fits_the_model(name: str, world: int, project: Path) -> None:
    arch = read_architecture(project / "models" / "Qwen3-30B-A3B-Base")
    parallel = load(name).parallel
    check_layout(parallel, world)
    check_architecture(arch, parallel)
    assert (arch.num_experts // parallel.expert, arch.num_kv_heads // parallel.tensor) == (16, 1)


@pytest.mark.parametrize("name", RUNS)
def test_what_can_be_checked_without_weights_passes(name: str, project: Path) -> None:
    has_command = "swe" in load(name).domains and name != "sft"
    config = load(name, *NOT_HERE, *(['domains.swe.command=["true"]'] if has_command else []))
    check_beforehand(config, project / "models" / "Qwen3-30B-A3B-Base", WORLDS[-1])


def test_the_published_positions_are_too_few_for_swe(project: Path) -> None:
    folder = write_model(project / "published", QWEN3_30B_A3B | {"max_position_embeddings": 32768})
    check_beforehand(load("teacher_math", *NOT_HERE, "evaluation.benchmarks.swe_bench_verified.max_response_tokens=1"),
                     folder, WORLDS[-1])  # fmt: skip
    with pytest.raises(ConfigError, match=r"domains\.swe: max_prompt_tokens 8192 \+ max_response_tokens 57344 exceed"):
        check_beforehand(load("teacher_swe", *NOT_HERE), folder, WORLDS[-1])


def test_dry_run_prints_the_graph(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(FOLDER / "reproduce.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "otherwise: mix_rl 499,712, cascade_rl 499,968, mopd_rounds 555,008;" in out
    assert re.search(r"teachers\.swe +run +base +234 +149,760 +9,814,671,360 +\? +0 of 1", out)
    assert "40 of 40 nodes to make: " in out
    assert not list(project.glob("runs/**/node.yaml"))


def test_dry_run_names_the_file_that_is_missing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "data" / "swe_rl.jsonl").unlink()
    assert main(["reproduce", str(FOLDER / "reproduce.yaml"), "--dry-run"]) == 2
    message = "mopd: error: seed0/teachers.swe: domains.swe.source.jsonl: data/swe_rl.jsonl: no such file"
    assert capsys.readouterr().err.startswith(message)


def test_every_number_has_its_source() -> None:
    number = re.compile(r"(?:: |=|\[)-?\d")
    files = [*(ROOT / FOLDER).rglob("*.yaml"), *(ROOT / "configs" / "recipes").rglob("*.yaml")]
    for file in sorted(files):
        for line, text in enumerate(file.read_text().splitlines(), start=1):
            value, _, comment = text.partition(" #")
            if number.search(value) and not text.startswith(("#", "run_dir:")):
                assert re.match(r" (the )?(paper|ours)\b", comment), f"{file.name}:{line}: {text}"


def test_readme_names_every_file_that_must_be_there() -> None:
    text = (ROOT / FOLDER / "README.md").read_text()
    sources = set[str]()
    for name in RUNS:
        config = load(name)
        sources |= {str(spec.source.jsonl) for spec in config.domains.values()}
        sources |= {str(task.source.jsonl) for task in config.evaluation.benchmarks.values()}
    assert sources == {f"data/{name}.jsonl" for name in data_files()}
    assert [source for source in sorted(sources) if f"`{source}`" not in text] == []
    assert to_tree(load("teacher_swe"))["domains"]["swe"]["command"][1] == "data/score_r2e.py"
    assert "`data/score_r2e.py`" in text

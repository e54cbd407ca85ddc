"""The strict configuration: every trap of YAML, every key path in an error, every check between fields."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.config import RunConfig, load_config, save_config
from megatron_mopd.yaml_config import ConfigError, apply_overrides, load_yaml

MOPD = """\
run_dir: runs/mopd
stage: mopd
steps: 60
prompts_per_step: 256
model: {hf_config: configs/tiny/model, checkpoint: runs/sft/checkpoints/latest}
teachers:
  math: {checkpoint: runs/rl_math/checkpoints/latest}
  text: {checkpoint: self}
domains:
  math:
    teacher: math
    source: {reasoning_gym: chain_sum, max_digits: 2}
    weight: 0.35
    max_response_tokens: 12
  text: {teacher: text, source: {jsonl: data/text.jsonl}, verifier: exact, weight: 1}
objective: {kind: full_vocab}
optim: {lr: 3.0e-4, warmup_steps: 5}
"""

SFT = """\
run_dir: runs/sft
stage: sft
steps: 3
prompts_per_step: 4
model: {hf_config: m}
domains: {a: {source: {reasoning_gym: chain_sum}}}
objective: {kind: cross_entropy}
optim: {lr: 1e-3}
"""

RL = SFT.replace("stage: sft", "stage: rl").replace("cross_entropy", "grpo") + "rollout: {samples_per_prompt: 2}\n"


def _load(folder: Path, text: str | bytes, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, overrides)


def _error(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(folder, text, *overrides)
    return str(caught.value)


def test_a_run_is_read_with_the_defaults_of_the_paper(tmp_path: Path) -> None:
    config = _load(tmp_path, MOPD)
    assert config.domain_names == ("math", "text")
    math = config.domains["math"]
    assert (math.teacher, math.weight, math.max_response_tokens) == ("math", 0.35, 12)
    assert (math.source.reasoning_gym, math.source.params) == ("chain_sum", {"max_digits": 2})
    assert config.domains["text"].weight == 1.0
    assert isinstance(config.domains["text"].weight, float)
    assert config.optim.lr == 3.0e-4
    assert (config.objective.advantage_clip, config.objective.outcome_weight) == (5.0, 0.0)
    assert (config.rollout.samples_per_prompt, config.rollout.temperature) == (1, 1.0)
    assert not config.needs_outcome


def test_every_spec_is_frozen(tmp_path: Path) -> None:
    config = _load(tmp_path, MOPD)
    specs = [config, *(getattr(config, field.name) for field in fields(config))]
    for spec in specs:
        if is_dataclass(spec):
            with pytest.raises(AttributeError):
                spec.seed = 1  # type: ignore[attr-defined, misc]


# --- YAML's traps


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.e-6", "1.0e-6", ".1e-5", "+1e-6", "0.000001"])
def test_a_float_may_be_written_without_a_dot(tmp_path: Path, text: str) -> None:
    assert _load(tmp_path, SFT.replace("1e-3", text)).optim.lr == 1e-6
    assert _load(tmp_path, SFT, f"optim.lr={text}").optim.lr == 1e-6


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "n", "NO", "TRUE"])
def test_words_that_yaml_takes_for_booleans_stay_words(tmp_path: Path, word: str) -> None:
    assert _load(tmp_path, SFT + f"log: {{wandb: {word}}}").log.wandb == word
    assert _load(tmp_path, SFT, f"log.wandb={word}").log.wandb == word


def test_a_key_that_yaml_takes_for_a_boolean_or_number_stays_a_word(tmp_path: Path) -> None:
    config = _load(tmp_path, SFT.replace("domains: {a:", "domains: {no: {source: {jsonl: x}, verifier: exact}, 1:"))
    assert config.domain_names == ("no", "1")


@pytest.mark.parametrize(("word", "value"), [("true", True), ("false", False), ("True", True)])
def test_true_and_false_are_booleans(tmp_path: Path, word: str, value: bool) -> None:
    assert _load(tmp_path, SFT, f"log.tensorboard={word}").log.tensorboard is value


@pytest.mark.parametrize(
    ("extra", "line", "key"),
    [("steps: 7\n", 9, "steps"), ("log:\n  wandb: a\n  tensorboard: true\n  wandb: b\n", 12, "wandb")],
)
def test_a_key_that_appears_twice_is_named_with_its_line(tmp_path: Path, extra: str, line: int, key: str) -> None:
    message = f"{tmp_path}/run.yaml: line {line}: key '{key}' appears twice; keep one"
    assert _error(tmp_path, SFT + extra) == message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "expected a mapping of keys at the top level, got NoneType"),
        ("- a\n- b\n", "got list"),
        (SFT + "seed: [1\n", "not valid YAML"),
        (SFT + "\tseed: 1\n", "not valid YAML"),
        (SFT + "---\nseed: 1\n", "not valid YAML"),
        (SFT + "seed: !!python/object:os.system x\n", "not valid YAML"),
        (SFT + "? [1]\n: 2\n", "line 9: a key must be a plain word"),
        (b"\xff\xfe" + SFT.encode(), "not UTF-8 text at byte 0"),
    ],
)
def test_text_that_is_no_configuration(tmp_path: Path, text: str | bytes, part: str) -> None:
    message = _error(tmp_path, text)
    assert part in message
    assert "run.yaml" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config file .*/none.yaml: No such file or directory"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"Is a directory"):
        load_config(tmp_path)


# --- keys and types


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", "unknown key 'sede'. Did you mean 'seed'?"),
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'. Known keys: lr, min_lr, "),
        ("optim.warmup_step=1", "unknown key 'optim.warmup_step'. Did you mean 'warmup_steps'?"),
        ("domains.a.wieght=1", "unknown key 'domains.a.wieght'. Did you mean 'weight'?"),
        ("parallel.tensors=2", "unknown key 'parallel.tensors'. Did you mean 'tensor'?"),
        ("steps=many", "steps: expected int, got 'many' (str)"),
        ("steps=1.5", "steps: expected int, got 1.5 (float)"),
        ("steps=true", "steps: expected int, got True (bool)"),
        ("optim.lr=fast", "optim.lr: expected float, got 'fast' (str)"),
        ("optim.lr=true", "optim.lr: expected float, got True (bool)"),
        ("optim.lr=", "optim.lr: expected float, got None (NoneType)"),
        ("run_dir=3", "run_dir: expected str, got 3 (int)"),
        ("log.tensorboard=1", "log.tensorboard: expected bool, got 1 (int)"),
        ("log.tensorboard=yes", "log.tensorboard: expected bool, got 'yes' (str)"),
        ("log=x", "log: expected a mapping of keys, got 'x'"),
        ("domains=[1]", "domains: expected a mapping, got [1]"),
        ("optim.betas=0.9", "optim.betas: expected a list, got 0.9"),
        ("optim.betas=[0.9, x]", "optim.betas[1]: expected float, got 'x' (str)"),
        ("stage=train", "stage: expected one of sft, rl, mopd, got 'train'"),
        ("model.dtype=[float32]", "model.dtype: expected one of float32, bfloat16, got ['float32']"),
        (
            "domains.a.verifier=null",
            "domains.a.verifier: expected one of task, math, exact, ifeval, command, environment, none, got None",
        ),
    ],
)
def test_wrong_keys_and_types_name_the_key_path(tmp_path: Path, override: str, message: str) -> None:
    assert _error(tmp_path, SFT, override).startswith(f"{tmp_path}/run.yaml: {message}")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("run_dir: runs/sft\n", "run_dir"),
        ("optim: {lr: 1e-3}\n", "optim"),
        ("objective: {kind: cross_entropy}\n", "objective"),
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, line: str, key: str) -> None:
    assert _error(tmp_path, SFT.replace(line, "")) == f"{tmp_path}/run.yaml: missing key '{key}'"


def test_a_missing_nested_key_is_named(tmp_path: Path) -> None:
    assert _error(tmp_path, SFT.replace("{lr: 1e-3}", "{}")).endswith("missing key 'optim.lr'")
    assert _error(tmp_path, MOPD.replace("{checkpoint: self}", "{}")).endswith("missing key 'teachers.text.checkpoint'")


# --- overrides


def test_overrides_reach_any_depth_and_make_new_entries(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        MOPD,
        "optim.lr=1e-4",
        "domains.math.source.min_terms=4",
        "teachers.code.checkpoint=runs/code",
        "domains.code={teacher: code, source: {jsonl: code.jsonl}, verifier: none}",
        "optim.betas=[0.9, 0.95]",
        "log.wandb=a=b",
        "parallel.ranks=null",
        "steps=5",
        "steps=6",
    )
    assert config.optim.lr == 1e-4
    assert config.domains["math"].source.params == {"max_digits": 2, "min_terms": 4}
    assert config.domains["code"].teacher == "code"
    assert config.optim.betas == (0.9, 0.95)
    assert config.log.wandb == "a=b"
    assert config.parallel.ranks is None
    assert config.steps == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "override 'steps': write it as key.path=value"),
        ("=5", "override '=5': write it as key.path=value"),
        ("steps.a=5", "override 'steps.a=5': 'steps' is a value, not a group"),
        ("seed=1: 2", "override 'seed=1: 2': not valid YAML"),
        (
            "log={wandb: a, wandb: b}",
            "override 'log={wandb: a, wandb: b}': line 1: key 'wandb' appears twice",
        ),
    ],
)
def test_broken_overrides_are_named(tmp_path: Path, override: str, message: str) -> None:
    assert _error(tmp_path, SFT, override).startswith(message)


def test_overrides_leave_the_tree_alone() -> None:
    tree = load_yaml("a: {b: 1}\nc: [1]", "text")
    assert apply_overrides(tree, ["a.b=2", "d.e=3"]) == {"a": {"b": 2}, "c": [1], "d": {"e": 3}}
    assert tree == {"a": {"b": 1}, "c": [1]}


# --- checks between fields


def _mopd_without(old: str, new: str) -> str:
    assert old in MOPD
    return MOPD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (SFT, ["model={}"], "model: hf_config and checkpoint are both missing; set hf_config"),
        (SFT, ["domains.a.source={}"], "domains.a.source: give exactly one of reasoning_gym"),
        (SFT, ["domains.a.source.jsonl=x"], "domains.a.source: give exactly one of reasoning_gym"),
        (
            SFT,
            ["domains.a.source={jsonl: x, max_digits: 2}"],
            "domains.a.source: unknown key 'max_digits'. Known keys: jsonl, held_out, validation.",
        ),
        (SFT, ["domains.a.source={jsonl: x}"], "domains.a: verifier: 'task' needs a reasoning_gym source"),
        (SFT, ["domains={}"], "domains: is empty; name at least one domain with a source"),
        (SFT, ["domains.a.weight=0"], "domains.a: weight: must be > 0, got 0.0; remove the domain"),
        (SFT, ["domains.a.weight=.nan"], "domains.a: weight: must be > 0"),
        (SFT, ["domains.a.max_prompt_tokens=0"], "domains.a: max_prompt_tokens: must be > 0"),
        (SFT, ["domains.a.max_response_tokens=0"], "domains.a: max_response_tokens: must be > 0"),
        (SFT, ["domains.a.wrong_answers=1"], "domains.a: wrong_answers: must be in [0, 1)"),
        (SFT, ["steps=-1"], "steps: must be >= 0"),
        (SFT, ["prompts_per_step=0"], "prompts_per_step: must be >= 1"),
        (SFT, ["optim.lr=0"], "optim: lr: must be > 0"),
        (SFT, ["optim.lr=.nan"], "optim: lr: must be > 0"),
        (SFT, ["optim.min_lr=1"], "optim: min_lr: must be in [0, lr]"),
        (SFT, ["optim.warmup_steps=-1"], "optim: warmup_steps: must be >= 0"),
        (SFT, ["optim.clip_grad=-1"], "optim: clip_grad: must be >= 0"),
        (SFT, ["optim.betas=[0.9]"], "optim: betas: two numbers in [0, 1)"),
        (SFT, ["optim.betas=[0.9, 1]"], "optim: betas: two numbers in [0, 1)"),
        (SFT, ["optim.updates_per_step=0"], "optim: updates_per_step: must be >= 1"),
        (SFT, ["optim.updates_per_step=5"], "optim.updates_per_step: more than prompts_per_step"),
        (SFT, ["optim.max_tokens_per_microbatch=0"], "optim: max_tokens_per_microbatch: must be >= 1"),
        (SFT, ["objective.advantage_clip=0"], "objective: advantage_clip: must be > 0"),
        (SFT, ["objective.outcome_weight=-1"], "objective: outcome_weight: must be >= 0"),
        (SFT, ["objective.clip_low=1"], "objective: clip_low: must be in (0, 1)"),
        (SFT, ["objective.clip_high=0"], "objective: clip_high: must be > 0"),
        (SFT, ["objective.max_sampling_rounds=0"], "objective: max_sampling_rounds: must be >= 1"),
        (SFT, ["rollout.samples_per_prompt=0"], "rollout: samples_per_prompt: must be >= 1"),
        (SFT, ["rollout.temperature=-1"], "rollout: temperature: must be >= 0"),
        (SFT, ["rollout.top_p=0"], "rollout: top_p: must be in (0, 1]"),
        (SFT, ["rollout.top_k=-1"], "rollout: top_k: must be >= 0"),
        (SFT, ["rollout.batch_size=0"], "rollout: batch_size: must be >= 1"),
        (SFT, ["parallel.tensor=0"], "parallel: tensor: must be >= 1"),
        (SFT, ["parallel.pipeline=0"], "parallel: pipeline: must be >= 1"),
        (SFT, ["parallel.expert=0"], "parallel: expert: must be >= 1"),
        (SFT, ["parallel.context=0"], "parallel: context: must be >= 1"),
        (SFT, ["parallel.ranks=0"], "parallel: ranks: must be >= 1"),
        (SFT, ["parallel.port=70000"], "parallel: port: must be in 1..65535"),
        (SFT, ["checkpoint.every=0"], "checkpoint: every: must be >= 1"),
        (SFT, ["checkpoint.keep_last=0"], "checkpoint: keep_last: must be >= 1"),
        (SFT, ["evaluation.prompts=0"], "evaluation: prompts: must be >= 1"),
        (SFT, ["evaluation.samples=0"], "evaluation: samples: must be >= 1"),
        (SFT, ["evaluation.temperature=-1"], "evaluation: temperature: must be >= 0"),
        (SFT, ["evaluation.every=-1"], "evaluation: every: must be >= 0"),
        (SFT, ["teachers.a.checkpoint=x"], "teachers: not used in stage 'sft'; remove them"),
        (
            _mopd_without("    teacher: math\n", ""),
            [],
            "domains.math.teacher: missing; name one of the teachers: math, text",
        ),
        (
            MOPD,
            ["domains.math.teacher=maths"],
            "domains.math.teacher: 'maths' is not in teachers (math, text)",
        ),
        (MOPD, ["teachers={}"], "domains.math.teacher: 'math' is not in teachers (none)"),
        (
            MOPD,
            ["domains.text.teacher=math"],
            "teachers.text: no domain uses it; remove it or route a domain to it",
        ),
        (SFT, ["objective.kind=grpo"], "objective.kind: stage 'sft' takes cross_entropy, got 'grpo'"),
        (RL, ["objective.kind=sampled"], "objective.kind: stage 'rl' takes grpo, got 'sampled'"),
        (
            MOPD,
            ["objective.kind=grpo"],
            "objective.kind: stage 'mopd' takes sampled, teacher_topk or full_vocab, got 'grpo'",
        ),
        (
            RL,
            ["rollout.samples_per_prompt=1"],
            "rollout.samples_per_prompt: group-normalised rewards need at least 2",
        ),
        (RL, ["domains.a.verifier=none"], "domains: an outcome reward needs a verifier other than 'none'"),
        (RL, ["rollout.temperature=0"], "rollout.temperature: group-normalised rewards need temperature > 0"),
        (
            MOPD,
            ["objective={kind: sampled, outcome_weight: 0.5}"],
            "rollout.samples_per_prompt: group-normalised rewards need at least 2",
        ),
    ],
)
def test_combinations_that_cannot_run(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    assert _error(tmp_path, text, *overrides).startswith(f"{tmp_path}/run.yaml: {message}")


def test_each_stage_has_a_valid_run(tmp_path: Path) -> None:
    assert _load(tmp_path, SFT).stage == "sft"
    assert _load(tmp_path, RL).needs_outcome
    sampled = ["objective={kind: sampled, outcome_weight: 0.5}", "rollout.samples_per_prompt=4"]
    assert _load(tmp_path, MOPD, *sampled).needs_outcome


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({}, 1),
        ({"tensor": 2, "pipeline": 2}, 4),
        ({"tensor": 2, "expert": 4}, 4),
        ({"tensor": 2, "expert": 3}, 6),
        ({"context": 2, "pipeline": 2}, 4),
        ({"tensor": 2, "context": 2, "expert": 8}, 8),
    ],
)
def test_default_ranks_are_the_fewest_that_fit(tmp_path: Path, layout: dict[str, Any], ranks: int) -> None:
    config = _load(tmp_path, SFT, *(f"parallel.{key}={value}" for key, value in layout.items()))
    assert config.parallel.default_ranks == ranks


# --- writing


@pytest.mark.parametrize("text", [SFT, RL, MOPD])
def test_a_saved_configuration_is_read_back_equal(tmp_path: Path, text: str) -> None:
    config = _load(
        tmp_path,
        text,
        "optim.lr=1e-7",
        "optim.eps=1e-12",
        "log.wandb='1e5'",  # a string that a loader would take for a number
        "run_dir='no'",
        "evaluation.seed=123456789012",
        "rollout.top_p=0.95",
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config.log.wandb == "1e5"


def test_a_saved_configuration_shows_every_default(tmp_path: Path) -> None:
    config = _load(tmp_path, MOPD)
    save_config(config, tmp_path / "saved.yaml")
    tree = load_yaml((tmp_path / "saved.yaml").read_text(), "saved.yaml")
    assert set(tree) == {field.name for field in fields(config)}
    assert tree["domains"]["math"]["source"] == {
        "reasoning_gym": "chain_sum",
        "jsonl": None,
        "held_out": None,
        "validation": None,
        "max_digits": 2,
    }
    assert set(tree["optim"]) == {field.name for field in fields(config.optim)}


def test_reading_a_configuration_imports_no_torch() -> None:
    heavy = "{'torch', 'megatron', 'transformers'} & set(sys.modules)"
    code = f"import sys, megatron_mopd.config; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        (MOPD, ["objective={kind: full_vocab, outcome_weight: 0.5}"], "objective.outcome_weight"),
        (MOPD, ["objective={kind: sampled, dynamic_sampling: true}"], "objective.dynamic_sampling"),
        (RL, ["domains.a.wrong_answers=0.5"], "domains.a.wrong_answers"),
        (SFT, ["rollout.samples_per_prompt=2"], "rollout.samples_per_prompt"),
        (SFT, ["domains.a.teacher=a"], "domains.a.teacher"),
    ],
)
def test_a_value_that_would_change_nothing_is_refused(
    tmp_path: Path, stage: str, overrides: list[str], message: str
) -> None:
    assert _error(tmp_path, stage, *overrides).startswith(f"{tmp_path}/run.yaml: {message}: ")

"""A small comparison in a folder: two teachers, two seeds, and a merge, a dataset's run and MOPD as methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

MODEL = Path(__file__).parents[1] / "configs" / "tiny" / "model"


def small_model(folder: Path) -> Path:
    """The tiny configuration's model and tokenizer with two layers."""
    folder.mkdir(parents=True)
    for file in MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_comparison(folder: Path) -> Path:
    """Write everything that the comparison needs into `folder`, which must not exist, and return its file."""
    folder.mkdir(parents=True)
    small_model(folder / "model")
    lines = [{"prompt": f"{left} + {right}", "answer": str(left + right)} for left in range(20) for right in range(9)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, tree in _runs(folder).items():
        write(folder / f"{name}.yaml", tree)
    models = dict.fromkeys("ab", "unused")
    write(folder / "merge.yaml", {"out": "unused", "base": "unused", "models": models, "method": "task_arithmetic"})
    return write(folder / "comparison.yaml", _comparison(folder))


def _runs(folder: Path) -> dict[str, dict[str, Any]]:
    domains: dict[str, dict[str, Any]] = {
        "a": {"source": {"jsonl": str(folder / "a.jsonl")}, "verifier": "exact"},
        "b": {"source": {"reasoning_gym": "spell_backward", "min_word_len": 3, "max_word_len": 4}},
    }
    for domain in domains.values():
        domain |= {"max_prompt_tokens": 24, "max_response_tokens": 6}
    taught = {name: domain | {"teacher": name} for name, domain in domains.items()}
    start = {"checkpoint": "unused", "dtype": "float32"}
    own = {
        "sft": {"stage": "sft", "model": {"hf_config": str(folder / "model"), "dtype": "float32"}, "domains": domains},
        "teacher": {"stage": "sft", "steps": 3, "model": start, "domains": domains},
        "off": {"stage": "sft", "model": start, "domains": domains, "rollout": {"engine": "dataset", "dataset": "-"}},
        "mopd": {
            "stage": "mopd",
            "model": start,
            "teachers": {name: {"checkpoint": "unused"} for name in taught},
            "domains": taught,
            "evaluation": {"prompts": 12, "samples": 2, "validation_prompts": 8},
        },
    }
    kinds = {"sft": "cross_entropy", "teacher": "cross_entropy", "off": "cross_entropy", "mopd": "full_vocab"}
    common = {
        "run_dir": "unused",
        "steps": 4,
        "prompts_per_step": 8,
        "optim": {"lr": 1e-3},
        "parallel": {"ranks": 2},  # one each in the comparison: an override of all runs
        "checkpoint": {"every": 2, "keep_last": 1},
        "log": {"tensorboard": False},
    }
    return {name: common | tree | {"objective": {"kind": kinds[name]}} for name, tree in own.items()}


def _comparison(folder: Path) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "title": "Two teachers",
        "seeds": [0, 1],
        "workers": 2,
        "overrides": ["parallel.ranks=1"],
        "evaluation": {"config": str(folder / "mopd.yaml")},
        "budget": {"rollouts": 32},
        "base": {"run": str(folder / "sft.yaml")},
        "teachers": {
            name: {"run": str(folder / "teacher.yaml"), "domains": [name], "overrides": ["optim.lr=0.01"]}
            for name in "ab"
        },
        "methods": {
            "arithmetic": {"label": "Task Arithmetic", "family": "merge", "merge": str(folder / "merge.yaml")},
            "off": {
                "family": "off_policy",
                "before": {"sample": {"sample": str(folder / "mopd.yaml")}},
                "run": str(folder / "off.yaml"),
                "dataset": "off.sample",
            },
            "mopd": {"label": "MOPD", "family": "mopd", "run": str(folder / "mopd.yaml")},
        },
        "tune": {"seed": 9, "trials": {"mopd": [["optim.lr=0.001"], ["optim.lr=0.002"]]}},
    }


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def read(path: Path) -> dict[str, Any]:
    tree = yaml.safe_load(path.read_text())
    assert isinstance(tree, dict)
    return tree

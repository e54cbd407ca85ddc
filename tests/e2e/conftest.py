"""A small complete project in a folder: model, tokenizer, three teachers, and a `mopd` run's file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_mopd.student.random_init import write_random_model
from tests.comparison import small_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `model` (no weights), `student` and the teachers `a`, `b`, `c`."""
    folder = tmp_path_factory.mktemp("models")
    small_model(folder / "model")
    for seed, name in enumerate(("student", "a", "b", "c")):
        write_random_model(folder / name, folder / "model", seed)
    return folder


def run_tree(models: Path, run_dir: Path) -> dict:
    """The run's file as a mapping: 12 steps, a checkpoint every 3, two ranks."""
    tasks = {
        "a": {"reasoning_gym": "chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        "b": {"reasoning_gym": "spell_backward", "min_word_len": 3, "max_word_len": 6},
        "c": {"reasoning_gym": "chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    }
    return {
        "run_dir": str(run_dir),
        "stage": "mopd",
        "seed": 7,
        "steps": 12,
        "prompts_per_step": 24,
        "model": {"checkpoint": str(models / "student"), "dtype": "float32"},
        "teachers": {name: {"checkpoint": str(models / name)} for name in tasks},
        "domains": {
            name: {"teacher": name, "source": source, "max_prompt_tokens": 24, "max_response_tokens": 8}
            for name, source in tasks.items()
        },
        "objective": {"kind": "full_vocab"},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "parallel": {"ranks": 2},
        "checkpoint": {"every": 3, "keep_last": 2},
        "evaluation": {"prompts": 16, "every": 4},
        "log": {"tensorboard": False},
    }


def write_run(path: Path, tree: dict) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path

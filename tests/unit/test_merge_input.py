"""Everything that can be wrong with a merge: one line with the key and the remedy, and nothing written."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_mopd.merge import MergeConfig, load_merge_config, merge
from megatron_mopd.merge.run import run_merge
from megatron_mopd.student import checkpoint_files
from megatron_mopd.yaml_config import ConfigError
from tests.unit.merge_models import load, write_checkpoint, write_tensors

GOOD = """\
out: out
base: base
models: {a: one, b: two}
method: METHOD
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `base`, `one` and `two`."""
    base = write_checkpoint(tmp_path / "base", 0)
    write_checkpoint(tmp_path / "one", 1, base=base)
    write_checkpoint(tmp_path / "two", 2, base=base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(method: str = "task_arithmetic", **keys: object) -> MergeConfig:
    defaults = {"out": "out", "base": "base", "models": {"a": "one", "b": "two"}}
    return MergeConfig(**(defaults | {"method": method} | keys))  # type: ignore[arg-type]


def refused(wrong: MergeConfig, pattern: str) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(ConfigError, match=pattern) as caught:
        merge(wrong)
    assert "\n" not in str(caught.value)
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("method", "overrides", "pattern"),
    [
        ("tied", [], "method: expected one of average, task_arithmetic, ties, dare, dare_ties, sce, got 'tied'"),
        ("ties", ["base=null"], "base: missing; method 'ties' needs the checkpoint that the models were trained from"),
        ("ties", ["models={}"], "models: 0 given, method 'ties' needs at least 1; name the checkpoints"),
        ("average", ["models={a: one}"], "models: 1 given, method 'average' needs at least 2"),
        ("sce", ["models={a: one}"], "models: 1 given, method 'sce' needs at least 2"),
        ("ties", ["models={a: one, a: two}"], "key 'a' appears twice; keep one"),
        ("ties", ["density=0"], r"density: must be in \(0, 1\], got 0.0"),
        ("ties", ["density=1.5"], r"density: must be in \(0, 1\], got 1.5"),
        ("ties", ["density=.nan"], r"density: must be in \(0, 1\], got nan"),
        ("dare", [], "density: missing; method 'dare' needs the share to keep"),
        ("average", ["density=0.2"], "density: method 'average' keeps every element; remove it"),
        ("task_arithmetic", ["density=0.2"], "density: method 'task_arithmetic' keeps every element; remove it"),
        ("task_arithmetic", ["scaling=0"], "scaling: must be a number > 0, got 0.0; 0 would give back the base"),
        ("task_arithmetic", ["scaling=.inf"], "scaling: must be a number > 0, got inf"),
        ("task_arithmetic", ["scaling=half"], r"scaling: expected float, got 'half' \(str\)"),
        ("average", ["scaling=1"], "scaling: method 'average' has no task vector to scale; remove it"),
        ("average", ["weights={a: 1, c: 1}"], r"weights.c: is not in models \(a, b\)"),
        ("average", ["weights={a: 1}"], "weights.b: missing; give every model a weight, or none"),
        ("average", ["weights={a: 1, b: 0}"], "weights.b: must be a number > 0, got 0.0; remove the model"),
        ("average", ["weights={a: 1, b: .nan}"], "weights.b: must be a number > 0, got nan"),
        ("sce", ["weights={a: 1, b: 1}"], "weights: method 'sce' calculates its own; remove them"),
        ("ties", ["dtype=int8"], "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ("ties", ["lambda=2"], "unknown key 'lambda'. Known keys: out, models, method"),
    ],
)
def test_values(method: str, overrides: list[str], pattern: str, tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(GOOD.replace("METHOD", method))
    with pytest.raises(ConfigError, match=pattern) as caught:
        load_merge_config(path, overrides)
    assert "\n" not in str(caught.value)


def test_the_tiny_file_is_valid_with_every_method() -> None:
    path = Path(__file__).parents[2] / "configs" / "tiny" / "param_merge.yaml"
    for overrides in (
        ["method=ties"],
        ["method=dare", "density=0.1"],
        ["method=sce"],
        ["method=average", "scaling=null"],
    ):
        assert load_merge_config(path, overrides).models.keys() == {"math", "reverse", "sort"}


def test_checkpoints_that_are_not_there(folder: Path) -> None:
    refused(config(base="runs/none"), "base: folder runs/none does not exist|base: 'runs/none' is no folder here")
    (folder / "empty").mkdir()
    refused(config(models={"a": "one", "b": "empty"}), "models.b: folder empty has no config.json")
    (folder / "two" / "model.safetensors").unlink()
    refused(config(), "models.b: two: neither model.safetensors nor model.safetensors.index.json in it")


def test_one_checkpoint_twice(folder: Path) -> None:
    refused(config(models={"a": "one", "b": "./one"}), r"models.b: ./one is the same folder as models.a; keep one")
    refused(config(models={"a": "one", "b": "base"}), "models.b: base is the same folder as base; keep one of them")
    write_checkpoint(folder / "copy", 1, base=folder / "base", shard_bytes=1000)
    refused(config(models={"a": "one", "b": "copy"}), "models.b: has the same weights as models.a; remove one of them")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"hidden_size": 24}, "models.b: its hidden_size is 24, that of base 16; merge models trained from one base"),
        ({"vocab_size": 128}, "models.b: its vocab_size is 128, that of base 114"),
        ({"num_hidden_layers": 2}, "models.b: its num_layers is 2, that of base 1"),
        ({"rope_theta": 5e5}, "models.b: its rope_theta is 500000.0, that of base 10000.0"),
        ({"model_type": "llama"}, "other/config.json: model_type 'llama' is not supported"),
    ],
)
def test_another_architecture(change: dict[str, object], pattern: str, folder: Path) -> None:
    if change.keys() & {"rope_theta", "model_type"}:
        write_checkpoint(folder / "other", 2)
        path = folder / "other" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        write_checkpoint(folder / "other", 2, **change)
    refused(config(models={"a": "one", "b": "other"}), pattern)


def test_another_tokenizer(folder: Path) -> None:
    (folder / "two" / "chat_template.jinja").write_text("{{ messages }}")
    refused(config(), "models.b: base and models.b differ in the chat template; merge models trained from one base")


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load(folder)
    change(tensors)
    write_tensors(folder, tensors)


def _without_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def test_other_tensors(folder: Path) -> None:
    _edit(folder / "two", lambda t: t.update({"model.norm.weight": torch.zeros(7)}))
    refused(config(), r"models.b: .*tensor 'model.norm.weight' has shape \[7\], config.json says \[16\]")
    _edit(folder / "two", _without_norm)
    refused(config(), "models.b: .*tensor 'model.norm.weight' is missing")


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "an infinity")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan(value: float, kind: str, dtype: torch.dtype, folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype)
        tensors["lm_head.weight"].view(-1)[-1] = value

    _edit(folder / "two", spoil)
    refused(config(), f"models.b: two/model.safetensors: tensor 'lm_head.weight' has {kind} in it; use an earlier")


def test_a_tied_model_with_another_output_layer(folder: Path) -> None:
    for name in ("base", "one", "two"):
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
        _edit(folder / name, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    merge(config(out="tied"))
    assert "lm_head.weight" not in load(folder / "tied")
    _edit(folder / "two", lambda t: t["lm_head.weight"][3, 4].add_(1))
    refused(config(), "models.b: .*'lm_head.weight' differs from the embedding, but config.json ties them")


def test_an_out_that_is_taken(folder: Path) -> None:
    refused(config(out="."), r"out: \. exists and is not a merged model; name a new folder")
    refused(config(out="one"), "out: one exists and is not a merged model; name a new folder")
    (folder / "file").write_text("")
    (folder / "new.tmp").mkdir()
    (folder / "new.tmp" / "thesis.txt").write_text("")
    refused(config(out="new"), r"out: .*/new\.tmp is in the way and not of a merge; move it away, or name another out")
    assert (folder / "new.tmp" / "thesis.txt").exists()
    (folder / "new.tmp" / "merge.json").write_text("{}")  # killed just before it got its name
    assert run_merge(config(out="new")).is_dir()
    refused(config(out="file"), "out: file exists and is not a merged model; name a new folder")
    refused(config(out="/proc/merged"), "out: /proc/merged cannot be written: ")
    run_merge(config())
    (folder / "out" / "merge.json").write_text("{")
    refused(config(), "out: out/merge.json is not valid JSON .*; delete out, or name a new one")
    (folder / "out" / "merge.json").write_text("[]")
    refused(config(), "out: out/merge.json is not a JSON object")


def test_weights_that_were_changed_after_the_merge(folder: Path) -> None:
    run_merge(config())
    (folder / "out" / "model.safetensors").write_bytes((folder / "one" / "model.safetensors").read_bytes()[:-2])
    refused(config(), "out/model.safetensors: .*damaged")
    _edit(folder / "two", _without_norm)
    (folder / "out" / "model.safetensors").write_bytes((folder / "two" / "model.safetensors").read_bytes())
    write_tensors(folder / "two", load(folder / "one") | {"model.norm.weight": torch.ones(16).bfloat16()})
    refused(config(), "out: the weights in out are not those of its merge.json; delete the folder")


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    refused(config(), r"out: out needs 0.1 GB, its disk has 0.0 GB free; make room, or name a folder on another disk")


def test_a_result_that_does_not_fit_its_dtype(folder: Path) -> None:
    refused(config(dtype="float16", scaling=1e9), "dtype: .* in tensor '.*' does not fit float16; lower scaling")

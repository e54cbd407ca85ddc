"""`mopd audit`: a healthy engine agrees in every layout, and each of five faults is called by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mopd.audit.options import Options
from megatron_mopd.cli import main
from megatron_mopd.config import RunConfig
from megatron_mopd.parallel import cpu
from megatron_mopd.types import Prompt, Rollout
from megatron_mopd.yaml_config import build
from tests.distributed.ranks import run_ranks
from tests.e2e.conftest import run_tree, write_run
from tests.e2e.test_commands import mopd

cpu.install()

from megatron_mopd.audit.audit import audit  # noqa: E402
from megatron_mopd.audit.findings import Audit  # noqa: E402
from megatron_mopd.audit.setting import audit_config  # noqa: E402
from megatron_mopd.parallel.runtime import World  # noqa: E402
from megatron_mopd.preflight import Inputs  # noqa: E402
from megatron_mopd.rollout.engine import Sampling  # noqa: E402
from megatron_mopd.rollout.in_process import InProcessEngine  # noqa: E402

SETTINGS = Options(prompts=8, tokens=24)
LAYOUTS = {"111": (1, {}), "212": (2, {"tensor": 2, "expert": 2}), "122": (4, {"pipeline": 2, "expert": 2})}


class Hot(InProcessEngine):
    """Samples at another temperature than it is told."""

    def generate(self, prompts: Sequence[Prompt], *, samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        return super().generate(prompts, samples=samples, sampling=Sampling(temperature=0.7), seed=seed)


class Changed(InProcessEngine):
    """Loses something of its weights on the way."""

    name: str

    def change(self, tensor: Tensor) -> None: ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        def changed() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name == self.name:
                    tensor = tensor.clone()
                    self.change(tensor)
                yield name, tensor

        super().load_weights(changed(), version)


class Rerouted(Changed):
    name = "model.layers.1.mlp.gate.weight"

    def change(self, tensor: Tensor) -> None:
        tensor[3] *= -1


class Heavy(Changed):
    name = "model.layers.0.self_attn.o_proj.weight"

    def change(self, tensor: Tensor) -> None:
        tensor *= 1.2


FAULTS: dict[str, type[InProcessEngine]] = {"none": InProcessEngine, "hot": Hot, "rerouted": Rerouted, "heavy": Heavy}


def config_of(models: Path, tmp_path: Path, **changes: Any) -> RunConfig:
    tree = run_tree(models, tmp_path / "run")
    for domain in tree["domains"].values():
        domain["max_response_tokens"] = 24
    return build(RunConfig, tree | {"parallel": {}} | changes)


def look(config: RunConfig, settings: Options, fault: str) -> Audit:
    def make(config: RunConfig, inputs: Inputs, world: World) -> InProcessEngine:
        return FAULTS[fault](
            inputs.arch,
            stop_ids=inputs.tokenizer.stop_ids,
            dtype=getattr(torch, config.model.dtype),
            device=world.device,
            batch_size=16,
        )

    return audit(config, settings, make)


def audited(config: RunConfig, *, world: int = 1, settings: Options = SETTINGS, fault: str = "none") -> Audit:
    found = run_ranks(look, world, audit_config(config, settings), settings, fault, init=False, timeout=240)
    assert all(other.as_json() == found[0].as_json() for other in found)
    return found[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_healthy_engine_agrees(layout: str, models: Path, tmp_path: Path) -> None:
    world, parallel = LAYOUTS[layout]
    settings = replace(SETTINGS, reference=True)
    found = audited(config_of(models, tmp_path, parallel=parallel), world=world, settings=settings)
    assert found.passed and found.blamed == []
    pairs = {pair.title: pair for pair in found.pairs}
    print(layout, {title: pair.overall for title, pair in pairs.items()})
    assert pairs.keys() == {
        "engine / student",
        "engine re-scoring / student",
        "teacher / student",
        "student / transformers fp32",
        "engine re-scoring / transformers fp32",
    }
    assert pairs["teacher / student"].overall.largest == 0.0
    for pair in pairs.values():
        assert pair.overall.largest < 1e-4, pair.title
        assert pair.by_domain.keys() == {"a", "b", "c", "all"}
    assert pairs["engine / student"].overall.tokens == found.about["sampled_tokens"] > 200
    assert pairs["teacher / student"].overall.tokens == found.about["tokens"] - found.about["sequences"]
    assert {routing.left: routing.same for routing in found.routing} == {
        "engine re-scoring": 1.0,
        "transformers fp32": 1.0,
    }
    assert [layer.name for layer in found.layers] == ["layer 0", "layer 1", "final norm"]
    assert all(0 < layer.largest < 1e-5 and layer.parted == 0 for layer in found.layers)


def test_another_temperature(models: Path, tmp_path: Path) -> None:
    found = audited(config_of(models, tmp_path), fault="hot")
    assert not found.passed and found.blamed == ["temperature"]
    assert found.fit is not None
    assert found.fit.best == pytest.approx(0.7, rel=1e-3)
    assert found.fit.mean_best < 1e-4 < 0.01 < found.fit.mean_configured
    assert found.pairs[1].overall.largest < 1e-4


def test_the_temperature_of_the_run_is_right(models: Path, tmp_path: Path) -> None:
    found = audited(config_of(models, tmp_path, rollout={"temperature": 0.7}), fault="hot")
    assert found.passed and found.blamed == []


def test_another_router_row(models: Path, tmp_path: Path) -> None:
    found = audited(config_of(models, tmp_path), fault="rerouted", world=2)
    assert not found.passed and found.blamed == ["routing"]
    (routing,) = found.routing
    print(routing)
    assert routing.per_layer[0] == 1.0 and 0.3 < routing.per_layer[1] < 0.95
    (parting,) = routing.partings
    assert (parting.layer, parting.expert, parting.expert_share) == (1, 3, 1.0)
    assert parting.margin > 1e-4
    # Where expert 3 is chosen by both its weight still differs a little.
    assert min(routing.split.same_tokens, routing.split.differing_tokens) > 20
    assert routing.split.differing_mean > 1e-2 > 1e-3 > routing.split.same_mean


def test_other_weights_are_the_engines_fault_and_the_reference_says_so(models: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, reference=True)
    found = audited(config_of(models, tmp_path), fault="heavy", settings=settings)
    assert not found.passed and found.blamed == ["engine"]
    pairs = {pair.title: pair.overall.largest for pair in found.pairs}
    assert pairs["student / transformers fp32"] < 1e-4 < 1e-2 < pairs["engine re-scoring / transformers fp32"]


def test_bfloat16(models: Path, tmp_path: Path) -> None:
    model = {"checkpoint": str(models / "student"), "dtype": "bfloat16"}
    found = audited(config_of(models, tmp_path, model=model))
    print({pair.title: pair.overall for pair in found.pairs}, found.routing)
    assert found.passed and found.blamed == ["dtype"]
    pairs = {pair.title: pair.overall for pair in found.pairs}
    assert pairs["teacher / student"].largest == 0.0
    assert pairs["engine re-scoring / student"].largest > 1e-3
    assert pairs["engine re-scoring fp32 / student fp32"].largest < 1e-4
    assert {routing.left: routing.same for routing in found.routing}["engine re-scoring fp32"] == 1.0


def test_another_chat_template(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "student", tmp_path / "student")
    template = tmp_path / "student" / "chat_template.jinja"
    text = template.read_text()
    assert text.count("message['content']") == 1
    template.write_text(text.replace("message['content']", "message['content'] + ' '"))
    model = {"hf_config": str(models / "model"), "checkpoint": str(tmp_path / "student"), "dtype": "float32"}
    found = audited(config_of(models, tmp_path, model=model))
    assert not found.passed and found.blamed == ["chat template"]
    (rendering,) = found.renderings
    assert rendering.differing > 0 and "from token" in rendering.first
    assert found.pairs[0].overall.largest < 1e-4


def test_the_command(models: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.yaml", run_tree(models, tmp_path / "run"))
    file = tmp_path / "audit.json"
    result = mopd("audit", str(path), "--prompts", "4", "--json", str(file))
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    assert figures["passed"] and figures["blamed"] == []
    assert figures["log_probs"][2]["all"]["largest"] == 0.0
    assert "within tolerance (max 0.0001)" in result.stdout
    assert result.stdout.isascii() or "│" in result.stdout
    result = mopd("audit", str(path), "--prompts", "4", "--tolerance", "1e-12")
    assert result.returncode == 1 and "NOT within" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompts", "0"], ["--prompts", ">= 1"]),
        (["--tolerance", "-1"], ["--tolerance", "> 0"]),
        (["--json", "/proc/nowhere/audit.json"], ["--json", "/proc"]),
        (["model.checkpoint=runs/nowhere"], ["model.checkpoint", "runs/nowhere"]),
        (["parallel.tensor=3", "parallel.ranks=3"], ["parallel.tensor", "3"]),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], expected: list[str], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused(run_tree(models, tmp_path / "run"), arguments, expected, tmp_path, capsys)


@pytest.mark.parametrize("kind", ["sft", "dataset", "random"])
def test_a_run_without_an_engine_is_refused(
    kind: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = run_tree(models, tmp_path / "run")
    if kind == "sft":
        del tree["teachers"]
        tree |= {"stage": "sft", "objective": {"kind": "cross_entropy"}}
        for domain in tree["domains"].values():
            del domain["teacher"]
        expected = ["stage 'sft'", "mopd or rl"]
    elif kind == "dataset":
        tree["rollout"] = {"engine": "dataset", "dataset": "answers.jsonl"}
        expected = ["'dataset'", "mopd or rl"]
    else:
        tree["model"] = {"hf_config": str(models / "model"), "dtype": "float32"}
        expected = ["model.checkpoint"]
    _refused(tree, [], expected, tmp_path, capsys)


def _refused(
    tree: dict, arguments: list[str], expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["audit", str(write_run(tmp_path / "run.yaml", tree)), *arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    for part in expected:
        assert part in captured.err
    assert not (tmp_path / "run").exists()

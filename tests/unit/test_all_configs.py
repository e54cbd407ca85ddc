"""Every YAML file under configs/ loads, plans in the layout that it is meant for, and passes what is checked before any
checkpoint exists: layout, lengths, data formats, verifiers, and Megatron's own checks of its configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatron_mopd.config import DomainSpec, RunConfig, load_config
from megatron_mopd.merge.config import load_merge_config
from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.count import ModelCount, count_model
from megatron_mopd.plan.faults import memory_share, warnings_of
from megatron_mopd.plan.memory import Setting, fullest, offloaded_bytes
from megatron_mopd.plan.published import student_shapes
from megatron_mopd.plan.report import make_report
from megatron_mopd.plan.setting import make_setting
from megatron_mopd.plan.suggest import verify
from megatron_mopd.plan.workload import workload_of
from megatron_mopd.preflight import check_beforehand
from megatron_mopd.reproduce.config import load_reproduce_config
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.yaml_config import ConfigError, build, load_yaml, to_tree

ROOT = Path(__file__).parents[2]
FILES = {str(file.relative_to(ROOT)): file for file in sorted((ROOT / "configs").rglob("*.yaml"))}
TREES = {name: load_yaml(file.read_text(), name) for name, file in FILES.items()}
RUNS = [name for name, tree in TREES.items() if "stage" in tree]
ON_GPUS = [name for name in RUNS if TREES[name]["model"].get("dtype") == "bfloat16"]
CLUSTERS = {
    "configs/qwen3_30b_a3b/one_node/": ClusterSpec(gpus=8),
    "configs/qwen3_30b_a3b/": ClusterSpec(gpus=32, rollout_gpus=96, rollout_tensor=4),
    "configs/recipes/m2rl/": ClusterSpec(gpus=8),
    "configs/recipes/": ClusterSpec(gpus=32, rollout_gpus=96, rollout_tensor=4),
}
"""What a folder's files are written for, by their own comments: the first that fits."""


@cache
def count(arch: Architecture) -> ModelCount:
    return count_model(arch, whole=False)


def cluster_of(name: str) -> ClusterSpec:
    config = load_config(FILES[name])
    if name not in ON_GPUS:
        return ClusterSpec(gpus=config.parallel.ranks or config.parallel.default_ranks, device="cpu")
    found = next(cluster for folder, cluster in CLUSTERS.items() if name.startswith(folder))
    return found if config.generates else ClusterSpec(gpus=found.gpus, device=found.device)


def setting_of(name: str) -> Setting:
    config, cluster = load_config(FILES[name]), cluster_of(name)
    student = student_shapes(config, FILES[name], None)
    return make_setting(
        config,
        {student.arch: count(student.arch)},
        student,
        ranks=cluster.gpus,
        workload=workload_of(config),
        on_cpu=cluster.is_cpu,
        servers=cluster.rollout_gpus > 0,
    )


def test_every_kind_of_file_is_known() -> None:
    kinds = {name: [key for key in ("stage", "method", "methods") if key in tree] for name, tree in TREES.items()}
    assert [name for name, found in kinds.items() if len(found) != 1] == []
    for name in FILES:
        if "method" in TREES[name]:
            load_merge_config(FILES[name])
        elif "methods" in TREES[name]:
            load_reproduce_config(FILES[name])


@pytest.mark.parametrize("name", RUNS)
def test_plans(name: str) -> None:
    setting, cluster = setting_of(name), cluster_of(name)
    verify(setting)  # constructs Megatron's TransformerConfig
    report = make_report(setting, cluster, 1.0)
    assert report is not None
    assert warnings_of(setting, cluster, fullest(setting)[1]) == []


@pytest.mark.parametrize("name", RUNS)
def test_validates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = []
    for path, spec in places(load_config(FILES[name])).items():
        if spec.command:
            overrides.append(f'{path}.command=["true"]')  # benchmarks' programs are not installed where tests run
        if spec.source.jsonl is not None:
            write_lines(tmp_path / spec.source.jsonl, spec)
    config = load_config(FILES[name], overrides)
    monkeypatch.chdir(tmp_path)
    check_beforehand(config, model_folder(name, config, tmp_path / "model"), cluster_of(name).gpus)


@pytest.mark.parametrize("name", [name for name in ON_GPUS if "/one_node/" in name or "/m2rl/" in name])
def test_servers_and_training_share_their_gpus(name: str) -> None:
    setting, cluster = setting_of(name), cluster_of(name)
    if not setting.config.generates:
        return
    memory = fullest(setting)[1]
    assert 0 < memory.server_share < 1
    assert memory_share(cluster, memory) < 0.9  # also while the servers answer
    sglang = setting.config.rollout.sglang
    assert sglang is not None and sglang.launch is not None and sglang.sync.colocated
    assert sglang.launch.servers * sglang.launch.tensor == cluster.gpus


def test_one_node_of_80_gb_needs_the_moments_in_host_memory() -> None:
    """README.md: 18 bytes a parameter and a teacher, before any activation; 8 of them can move."""
    setting = setting_of("configs/qwen3_30b_a3b/one_node/mopd.yaml")
    whole = replace(setting, config=replace(setting.config, optim=replace(setting.config.optim, offload=False)))
    least = 30_532_122_624 * (2 + 4 + 12 + 2) / 8
    assert fullest(whole)[1].always > least > (80 - 4) * 1e9
    assert memory_share(ClusterSpec(gpus=8), fullest(whole)[1]) > 1
    moved = offloaded_bytes(setting, 0)
    assert moved == pytest.approx(8 * 30_532_122_624 / 8, rel=0.01)
    assert fullest(whole)[1].always - fullest(setting)[1].always == pytest.approx(moved)


@pytest.mark.parametrize(
    ("arguments", "share"),
    [
        (["--mem-fraction-static", "0.5"], 0.5),
        (["--mem-fraction-static=0.25"], 0.25),
        ([], 0.88),
        (["--mem-fraction-static"], None),
        (["--mem-fraction-static", "half"], None),
    ],
)
def test_the_servers_share_is_read_from_their_arguments(arguments: list[str], share: float | None) -> None:
    setting = setting_of("configs/recipes/m2rl/mopd.yaml")
    tree = to_tree(setting.config)
    tree["rollout"]["sglang"]["launch"]["arguments"] = arguments
    setting = replace(setting, config=build(RunConfig, tree))
    if share is not None:
        assert fullest(setting)[1].server_share == share
        return
    with pytest.raises(
        ConfigError, match=r"launch\.arguments: --mem-fraction-static takes a number, got (half|nothing)"
    ):
        fullest(setting)


def places(config: RunConfig) -> dict[str, DomainSpec]:
    found = {f"domains.{name}": spec for name, spec in config.domains.items()}
    for group in ("out_of_domain", "benchmarks"):
        tasks = getattr(config.evaluation, group)
        found |= {f"evaluation.{group}.{name}": spec for name, spec in tasks.items()}
    return found


def write_lines(file: Path, spec: DomainSpec) -> None:
    extra = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} if spec.verifier == "ifeval" else {}
    lines = [{"prompt": f"{file.stem} {number}", "answer": str(number), **extra} for number in range(60)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def model_folder(name: str, config: RunConfig, folder: Path) -> Path:
    """The shapes that the file is planned with, beside the tiny configuration's tokenizer."""
    shapes = ROOT / student_shapes(config, FILES[name], None).origin
    if (shapes / "tokenizer.json").exists():
        return shapes
    folder.mkdir()
    for file in (ROOT / "configs" / "tiny" / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_bytes((shapes / "config.json").read_bytes())
    return folder

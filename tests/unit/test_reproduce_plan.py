"""From a comparison's file to nodes, hashes and reasons; and every mistake that is found before anything runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.config import RunConfig, load_config
from megatron_mopd.merge.config import load_merge_config
from megatron_mopd.reproduce.command import Options, Plan, make_plan
from megatron_mopd.reproduce.config import load_reproduce_config
from megatron_mopd.reproduce.execute import command_of, file_of
from megatron_mopd.reproduce.fingerprint import changes
from megatron_mopd.reproduce.store import RECORD, StoredNode, place, prune, write_json
from megatron_mopd.yaml_config import ConfigError, dump_yaml
from tests.comparison import read, write, write_comparison

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_comparison(tmp_path / "project")


def plan_of(config: Path, *overrides: str, **options: Any) -> Plan:
    return make_plan(load_reproduce_config(config, overrides), Options(**options))


def placed(config: Path, *overrides: str) -> dict[str, StoredNode]:
    return place(list(plan_of(config, *overrides).nodes.values()), config.parent / "run")


def finish(item: StoredNode) -> None:
    """What is left behind when the node's command has been run."""
    outputs = {"run": "checkpoints/latest/manifest.json", "merge": "model/config.json", "sample": "dataset.jsonl"}
    output = item.folder / outputs.get(item.node.kind, "result.json")
    output.parent.mkdir(parents=True)
    output.write_text("{}")
    write_json(item.folder / RECORD, {"made_of": item.made_of.as_json()})


def test_nodes_of_a_seed(config: Path) -> None:
    plan = plan_of(config, seeds=1)
    models = ("base", "teachers.a", "teachers.b", "arithmetic", "off", "mopd")
    assert list(plan.nodes) == [
        *(f"seed0/{name}" for name in (*models[:4], "off.sample", *models[4:])),
        *(f"seed0/{name}.eval" for name in models),
    ]
    assert plan.wanted == list(plan.nodes)
    mopd = plan.nodes["seed0/mopd"]
    assert mopd.inputs == {
        "model.checkpoint": "seed0/base",
        "teachers.a.checkpoint": "seed0/teachers.a",
        "teachers.b.checkpoint": "seed0/teachers.b",
    }
    assert plan.nodes["seed0/off"].inputs == {"model.checkpoint": "seed0/base", "rollout.dataset": "seed0/off.sample"}
    assert plan.nodes["seed0/arithmetic"].inputs["models.b"] == "seed0/teachers.b"
    assert plan.domains == {"a": "a", "b": "b"}


def test_every_run_keeps_the_same_prompts_back_and_has_its_seed(config: Path) -> None:
    nodes = plan_of(config).nodes
    runs = [node for node in nodes.values() if node.kind in ("run", "sample")]
    assert len(runs) == 2 * 6
    for node in runs:
        assert node.tree["evaluation"]["prompts"] == 12
        assert node.tree["evaluation"]["validation_prompts"] == 8
        assert node.tree["parallel"]["ranks"] == 1
        assert f"seed{node.tree['seed']}" == node.name.split("/")[0]
    assert list(nodes["seed1/teachers.b"].tree["domains"]) == ["b"]


def test_the_files_that_the_commands_get(config: Path) -> None:
    stored = placed(config)
    mopd = stored["seed1/mopd"]
    write_path = config.parent / "node.yaml"
    write_path.write_text(dump_yaml(file_of(mopd, stored)))
    run = load_config(write_path)
    assert isinstance(run, RunConfig)
    assert run.run_dir == str(mopd.folder)
    assert run.seed == 1
    assert run.model.checkpoint == f"{stored['seed1/base'].folder}/checkpoints/latest"
    assert run.teachers["a"].checkpoint == f"{stored['seed1/teachers.a'].folder}/checkpoints/latest"
    assert command_of(mopd, stored) == ["run", f"{mopd.folder}/node.yaml"]

    merged = stored["seed0/arithmetic"]
    write_path.write_text(dump_yaml(file_of(merged, stored)))
    merge = load_merge_config(write_path)
    assert (merge.out, merge.base) == (f"{merged.folder}/model", f"{stored['seed0/base'].folder}/checkpoints/latest")
    assert merge.models["b"] == f"{stored['seed0/teachers.b'].folder}/checkpoints/latest"

    evaluated = stored["seed0/arithmetic.eval"]
    assert command_of(evaluated, stored) == ["eval", f"{evaluated.folder}/node.yaml", "--checkpoint",
                                             f"{merged.folder}/model", "--split", "held_out"]  # fmt: skip
    sampled = stored["seed0/off.sample"]
    assert command_of(sampled, stored)[2:] == ["--out", f"{sampled.folder}/dataset.jsonl", "--keep", "all"]


def test_only_what_depends_on_a_change_has_another_folder(config: Path) -> None:
    before = placed(config)
    file = config.parent / "teacher.yaml"
    write(file, read(file) | {"prompts_per_step": 5})
    after = placed(config)
    moved = {name for name in before if before[name].folder != after[name].folder}
    assert moved == set(before) - {f"seed{seed}/{name}" for seed in (0, 1) for name in ("base", "base.eval")}


@pytest.mark.parametrize(
    "key", ["log.tensorboard=true", "checkpoint.every=1", "checkpoint.keep_last=3"], ids=lambda key: key.split("=")[0]
)
def test_where_and_how_often_something_is_written_is_no_change(config: Path, key: str) -> None:
    folders = {item.folder for item in placed(config).values()}
    assert folders == {item.folder for item in placed(config, f'overrides=["parallel.ranks=1", "{key}"]').values()}


def test_a_default_that_is_written_out_is_no_change(config: Path) -> None:
    before = placed(config)
    file = config.parent / "mopd.yaml"
    write(file, read(file) | {"allow_identical_teacher": False, "rollout": {"temperature": 1.0}})
    assert {item.folder for item in placed(config).values()} == {item.folder for item in before.values()}
    assert "allow_identical_teacher" not in before["seed0/mopd"].made_of.config
    assert before["seed0/mopd"].made_of.config["optim"] == {"lr": 0.01}
    assert before["seed0/mopd.eval"].made_of.config["evaluation"] == {
        "prompts": 12, "samples": 2, "validation_prompts": 8}  # fmt: skip


def test_another_order_of_the_domains_is_another_run(config: Path) -> None:
    before = placed(config)
    file = config.parent / "sft.yaml"
    domains = read(file)["domains"]
    write(file, read(file) | {"domains": dict(reversed(domains.items()))})
    after = placed(config)["seed0/base"]
    assert after.folder != before["seed0/base"].folder  # whose turn it is, and who wins a tie
    finish(before["seed0/base"])
    assert after.why() == "order_of_domains was None, is ['b', 'a']"


def test_what_a_node_read_before_and_no_more_is_said(config: Path) -> None:
    item = placed(config)["seed0/base"]
    finish(item)
    record = json.loads((item.folder / RECORD).read_text())
    record["made_of"]["files"] |= {"gone.jsonl": "0"}
    del record["made_of"]["files"][str(config.parent / "a.jsonl")]
    assert changes(record["made_of"], item.made_of, item.node) == [
        f"{config.parent / 'a.jsonl'} is read now",
        "gone.jsonl is not read any more",
    ]


def test_damaged_digests_are_made_again(config: Path) -> None:
    before = placed(config)["seed0/base"].folder
    (config.parent / "run").mkdir(exist_ok=True)
    (config.parent / "run" / "hashes.json").write_text('{"cut')
    assert placed(config)["seed0/base"].folder == before


def test_an_edited_dataset_is_found_under_a_cached_node_and_the_reason_said(config: Path) -> None:
    before = placed(config)
    for item in before.values():
        finish(item)
    assert all(item.is_done and item.why() is None for item in before.values())
    data = config.parent / "a.jsonl"
    known = data.stat()
    data.write_text(data.read_text().replace('"7"', '"8"', 1))
    os.utime(data, ns=(known.st_atime_ns, known.st_mtime_ns))  # small files are not taken at their time's word
    after = placed(config)
    assert not any(item.is_done for item in after.values())
    assert after["seed0/base"].why() == f"the content of {data} has changed"
    reason = after["seed1/mopd"].why() or ""
    assert reason.split("; ") == [f"the content of {data} has changed", "seed1/base has changed",
                                  "seed1/teachers.a has changed", "seed1/teachers.b has changed"]  # fmt: skip
    data.write_text(data.read_text().replace('"8"', '"7"', 1))
    write(config.parent / "mopd.yaml", read(config.parent / "mopd.yaml") | {"optim": {"lr": 5e-4}})
    assert "optim.lr was 0.01, is 0.0005" in (placed(config)["seed0/mopd"].why() or "")


def test_a_large_file_is_read_again_when_its_time_changes(config: Path) -> None:
    data = config.parent / "a.jsonl"
    data.write_text(data.read_text() * 20)
    assert data.stat().st_size > 1 << 16
    before = placed(config)["seed0/base"].folder
    assert placed(config)["seed0/base"].folder == before
    known = json.loads((config.parent / "run" / "hashes.json").read_text())
    assert list(known) == [str(data)]
    data.write_text(data.read_text().replace('"7"', '"8"', 1))
    assert placed(config)["seed0/base"].folder != before


def test_a_node_whose_output_is_gone_is_made_again(config: Path) -> None:
    item = placed(config)["seed0/off.sample"]
    finish(item)
    (item.folder / "dataset.jsonl").unlink()
    assert not item.is_done
    assert item.why() == f"{item.folder / 'dataset.jsonl'} is missing"


def test_prune_deletes_what_the_file_no_longer_leads_to(config: Path) -> None:
    old = placed(config)["seed0/base"]
    finish(old)
    write(config.parent / "sft.yaml", read(config.parent / "sft.yaml") | {"steps": 6})
    stored = placed(config)
    finish(stored["seed0/base"])
    assert prune(stored, config.parent / "run") == [old.folder]
    assert not old.folder.exists()
    assert stored["seed0/base"].is_done


def test_trials_change_the_last_node_and_share_those_before(config: Path) -> None:
    trials = {"off": [["optim.lr=0.002"], ["optim.lr=0.004"]], "mopd": [[], ["steps=4"]]}
    plan = plan_of(config, f"tune.trials={json.dumps(trials)}", tune=True)
    assert plan.seeds == (9,)
    assert [model for model in plan.models if "trial" in model] == [
        "off_trial1", "off_trial2", "mopd_trial1", "mopd_trial2"]  # fmt: skip
    assert plan.nodes["seed9/off_trial2"].tree["optim"]["lr"] == 0.004
    assert plan.nodes["seed9/off_trial2"].inputs["rollout.dataset"] == "seed9/off.sample"
    assert plan.nodes["seed9/off_trial1.eval"].arguments == ("--split", "validation")
    assert "seed9/off" not in plan.wanted and "seed9/off.sample" in plan.wanted


def test_scaling_keeps_the_first_domains_and_the_rollouts_per_domain(config: Path) -> None:
    plan = plan_of(config, "scaling={teachers: [1, 2], methods: [mopd, arithmetic]}", seeds=1)
    first = plan.nodes["seed0/mopd_n1"]
    assert list(first.tree["domains"]) == list(first.tree["teachers"]) == ["a"]
    assert first.tree["prompts_per_step"] == 4
    assert set(plan.nodes["seed0/arithmetic_n1"].inputs) == {"base", "models.a"}
    assert "seed0/mopd_n2" not in plan.nodes
    assert set(plan.models) == {
        "base",
        "teachers.a",
        "teachers.b",
        "arithmetic",
        "off",
        "mopd",
        "mopd_n1",
        "arithmetic_n1",
    }


def test_only_one_method(config: Path) -> None:
    wanted = plan_of(config, only="mopd", seeds=1).wanted
    assert "seed0/mopd.eval" in wanted and "seed0/teachers.a.eval" in wanted
    assert not [name for name in wanted if "off" in name or "arithmetic" in name]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seeds=[0, 1, 0]"], "seeds: 0 is listed twice; its runs would be the same runs"),
        (["seeds=[]"], "seeds: is empty; list at least one"),
        (["workers=0"], "workers: must be >= 1"),
        (["teachers={}"], "evaluation.config .*mopd.yaml: teacher 'a' is not in teachers \\(none\\)"),
        (["methods.arithmetic.teachers={}"], "methods.arithmetic: has no teachers to merge; name them in `teachers`"),
        (["methods.mopd.start=nowhere"], "methods.mopd.start: no node 'nowhere'; known: base, teachers.a, "),
        (["methods.mopd.start=off", "methods.off.start=mopd"], "seed0/off needs seed0/mopd needs seed0/off: a cycle"),
        (["teachers.a.start=mopd"], "seed0/teachers.a needs seed0/mopd needs seed0/teachers.a: a cycle"),
        (["methods.mopd.start=off.sample"], "methods.mopd.start: node 'off.sample' makes a dataset"),
        (["methods.off.dataset=base"], "methods.off.dataset: node 'base' makes a model"),
        (["methods.off.dataset=null", "methods.off.rollouts=0"], "seed0/off: rollout.dataset: -: no such file; make"),
        (["methods.mopd.merge=x.yaml"], "methods.mopd: give exactly one of run, sample and merge"),
        (["methods.mopd.family=best"], "methods.mopd.family: expected one of merge, rl, off_policy, mopd"),
        (["methods.mopd.overrides=[stepz=3]"], "methods.mopd: .*mopd.yaml: unknown key 'stepz'. Did you mean 'steps'"),
        (["overrides=[optim.lr=fast]"], "evaluation: .*mopd.yaml: optim.lr: expected float, got 'fast'"),
        (
            ["methods.mopd.overrides=[evaluation=3]"],
            "methods.mopd: .*mopd.yaml: evaluation: expected a mapping of keys",
        ),
        (
            ["teachers.a.overrides=[domains=3]"],
            "teachers.a: .*teacher.yaml: domains: expected a mapping of keys, got 3",
        ),
        (["teachers.a.overrides=[domains.a=3]"], "teachers.a: .*teacher.yaml: domains: a: expected a mapping of keys"),
        (["methods.mopd.overrides=[steps=5]"], "methods.mopd: its files generate 40 rollouts, the budget is 32; "),
        (["methods.mopd.run=nowhere.yaml"], "methods.mopd: config file nowhere.yaml: No such file"),
        (["teachers.a.domains=[c]"], "teachers.a: domains: .*teacher.yaml has no domain 'c'; it has a, b"),
        (["methods.base={family: mopd, run: x.yaml}"], "methods.base: is the name of something else here"),
        (["methods.a/b={family: mopd, run: x.yaml}"], "methods.a/b: names folders; use letters, digits"),
        (["scaling={teachers: [3], methods: [mopd]}"], "scaling.teachers: 3 is more than the 2 domains"),
        (["scaling={teachers: [1], methods: [off]}"], "scaling.methods: 'off' names nodes of its own"),
        (
            ["scaling={teachers: [1], methods: [mopd]}", "methods.mopd_n1={family: mopd, run: x.yaml}"],
            "methods.mopd_n1: is scaling's name for mopd; rename it",
        ),
        (["tune.trials.off=[[]]"], "tune: trials.off: 1 trials, but mopd has 2; give every method as many"),
        (["tune.trials.mix=[[], []]"], "tune.trials.mix: no such method; known: arithmetic, off, mopd"),
        (["tune.seed=1"], "tune.seed: 1 is one of seeds; choose another"),
        (["methodz={}"], "unknown key 'methodz'. Did you mean 'methods'?"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        placed(config, *overrides)
    assert "\n" not in str(caught.value)
    assert not list(config.parent.glob("run/seed*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 3}, "--seeds 3: the file lists 2 seeds; list more, or ask for fewer"),
        ({"seeds": 0}, "--seeds 0: the file lists 2 seeds"),
        ({"only": "mix"}, "--only mix: no such method; known: arithmetic, off, mopd"),
        ({"tune": True, "seeds": 1}, "--seeds: trials have a seed of their own"),
        ({"tune": True, "only": "off"}, "--only off: has no trials in tune.trials"),
    ],
)
def test_options_that_do_not_fit(config: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(config, **options)


def test_a_method_with_the_name_of_a_trial(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"methods\.mopd_trial1: is the name of a trial of mopd; rename it"):
        plan_of(config, "methods.mopd_trial1={family: mopd, run: x.yaml}", tune=True)


def test_a_teacher_without_a_node_is_named_with_the_remedy(config: Path) -> None:
    file = config.parent / "mopd.yaml"
    tree = read(file)
    tree["teachers"] = {name: {"checkpoint": "x"} for name in "ac"}
    tree["domains"]["b"]["teacher"] = "c"
    write(config.parent / "other.yaml", tree)
    with pytest.raises(ConfigError, match=r"has a teacher 'c', and there is no node 'teachers.c'; add it to teachers"):
        plan_of(config, f"methods.mopd.run={config.parent / 'other.yaml'}")


def test_an_edited_verifier_script_is_found(config: Path) -> None:
    script = config.parent / "score.py"
    script.write_text("first")
    file = config.parent / "teacher.yaml"
    tree = read(file)
    for domain in tree["domains"].values():
        domain |= {"verifier": "command", "command": ["python3", str(script), "--strict"]}
    write(file, tree)
    before = placed(config)["seed0/teachers.a"]
    assert str(script) in before.made_of.files
    finish(before)
    script.write_text("second")
    assert placed(config)["seed0/teachers.a"].why() == f"the content of {script} has changed"

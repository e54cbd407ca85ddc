"""From the comparison's file to the nodes of one seed: every run's, sample's and merge's file, resolved and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_mopd.config import RunConfig
from megatron_mopd.merge.config import MergeConfig
from megatron_mopd.reproduce.config import BASE, TEACHERS, MethodSpec, NodeSpec, ReproduceConfig
from megatron_mopd.reproduce.graph import Node, in_order
from megatron_mopd.yaml_config import ConfigError, apply_overrides, build, load_yaml, read_text, to_tree


def load_evaluation(config: ReproduceConfig) -> RunConfig:
    """The evaluation's file: all domains, each with its teacher, and the `evaluation` keys of everything."""
    spec = config.evaluation
    run = _load_run(spec.config, [*config.overrides, *spec.overrides], "evaluation")
    for name, domain in run.domains.items():
        if domain.teacher is None:
            raise ConfigError(
                f"evaluation.config {spec.config}: domains.{name}.teacher: missing; scores are shares of its lead"
            )
        if domain.teacher not in config.teachers:
            known = ", ".join(config.teachers) or "none"
            raise ConfigError(
                f"evaluation.config {spec.config}: teacher '{domain.teacher}' is not in teachers ({known}); add it"
            )
    return run


def seed_nodes(
    config: ReproduceConfig,
    evaluation: RunConfig,
    seed: int,
    *,
    methods: Mapping[str, MethodSpec],
    split: str = "held_out",
) -> tuple[Node, ...]:
    """All nodes of one seed, with an evaluation of the base, of each teacher and of each method, every node after its
    inputs. Raises ConfigError, which names the key of the comparison's file.
    """
    specs = _references(config, methods)
    _check_references(specs)
    nodes = [_node(reference, spec, config, evaluation, seed) for reference, spec in specs.items()]
    models = [BASE, *(f"{TEACHERS}.{name}" for name in config.teachers), *methods]
    tree = to_tree(evaluation)
    for model in models:
        nodes.append(
            Node(
                name=f"seed{seed}/{model}.eval",
                kind="eval",
                tree=tree,
                inputs={"--checkpoint": f"seed{seed}/{model}"},
                arguments=("--split", split),
            )
        )
    return in_order(nodes)


def _references(config: ReproduceConfig, methods: Mapping[str, MethodSpec]) -> dict[str, NodeSpec]:
    """Reference -> what the file says of that node."""
    specs: dict[str, NodeSpec] = {BASE: config.base}
    specs |= {f"{TEACHERS}.{name}": spec for name, spec in config.teachers.items()}
    for name, method in methods.items():
        specs |= {f"{name}.{before}": spec for before, spec in method.before.items()}
        specs[name] = method
    return specs


def _key(reference: str) -> str:
    """Where in the comparison's file the node stands."""
    if reference == BASE or reference.startswith(f"{TEACHERS}."):
        return reference
    method, dot, before = reference.partition(".")
    return f"methods.{method}.before.{before}" if dot else f"methods.{method}"


def _check_references(specs: Mapping[str, NodeSpec]) -> None:
    for reference, spec in specs.items():
        named = {"start": spec.start, "dataset": spec.dataset}
        named |= {f"teachers.{name}": target for name, target in (spec.teachers or {}).items()}
        for key, target in named.items():
            if target is None:
                continue
            where = f"{_key(reference)}.{key}"
            if target not in specs:
                raise ConfigError(f"{where}: no node '{target}'; known: {', '.join(specs)}")
            makes_dataset = specs[target].sample is not None
            if makes_dataset != (key == "dataset"):
                made = "a dataset" if makes_dataset else "a model"
                raise ConfigError(f"{where}: node '{target}' makes {made}; name one that does not")


def _node(reference: str, spec: NodeSpec, config: ReproduceConfig, evaluation: RunConfig, seed: int) -> Node:
    if spec.merge is not None:
        return _merge_node(reference, spec, config, seed)
    key = _key(reference)
    overrides = [*config.overrides, *spec.overrides, f"seed={seed}", "run_dir=node"]
    if spec.sample is not None:  # the file may be that of the run which reads the dataset
        overrides += ["rollout.engine=in_process", "rollout.dataset=null", "rollout.sglang=null"]
        overrides += ["rollout.routing_replay=off"]
    elif spec.dataset is not None:
        overrides += ["rollout.dataset=node"]
    run = _load_run(spec.file, overrides, key, spec, evaluation)
    inputs = {}
    if reference != BASE or spec.start is not None:
        inputs["model.checkpoint"] = spec.start or BASE
    if spec.dataset is not None:
        inputs["rollout.dataset"] = spec.dataset
    for name, teacher in run.teachers.items():
        if teacher.checkpoint != "self":
            inputs[f"teachers.{name}.checkpoint"] = _teacher_node(name, spec, key, config)
    return Node(
        name=f"seed{seed}/{reference}",
        kind="sample" if spec.sample else "run",
        tree=to_tree(run),
        inputs={path: f"seed{seed}/{target}" for path, target in inputs.items()},
        arguments=("--keep", spec.keep) if spec.sample else (),
    )


def _teacher_node(name: str, spec: NodeSpec, key: str, config: ReproduceConfig) -> str:
    if spec.teachers is not None and name in spec.teachers:
        return spec.teachers[name]
    if name not in config.teachers:
        raise ConfigError(
            f"{key}: {spec.file} has a teacher '{name}', and there is no node '{TEACHERS}.{name}'; "
            f"add it to teachers, or name its node in {key}.teachers"
        )
    return f"{TEACHERS}.{name}"


def _load_run(
    path: str,
    overrides: Sequence[str],
    key: str,
    spec: NodeSpec | None = None,
    evaluation: RunConfig | None = None,
) -> RunConfig:
    """`key` is what names the file in the comparison's; errors begin with it."""
    try:
        tree = apply_overrides(load_yaml(read_text(path, "config file"), path), overrides)
        if spec is not None and spec.domains is not None:
            tree = _keep_domains(tree, spec.domains, path)
        if evaluation is not None:
            every = _group(tree, "evaluation", path).get("every", 0)
            tree["evaluation"] = to_tree(evaluation.evaluation) | {"every": every}
        try:
            return build(RunConfig, tree)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _group(tree: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    """The keys below `name`, none where it is missing."""
    group = tree.get(name) or {}
    if not isinstance(group, dict):
        raise ConfigError(f"{path}: {name}: expected a mapping of keys, got {group!r}")
    return group


def _keep_domains(tree: dict[str, Any], domains: Sequence[str], path: str) -> dict[str, Any]:
    """The file with these domains only, in this order, and the teachers that they name."""
    known = _group(tree, "domains", path)
    for name in domains:
        if name not in known:
            raise ConfigError(f"domains: {path} has no domain '{name}'; it has {', '.join(known)}")
    kept = {name: known[name] for name in domains}
    used = {_group(kept, name, f"{path}: domains").get("teacher") for name in kept}
    teachers = {name: value for name, value in _group(tree, "teachers", path).items() if name in used}
    return {key: value for key, value in tree.items() if key != "teachers"} | {"domains": kept, "teachers": teachers}


def _merge_node(reference: str, spec: NodeSpec, config: ReproduceConfig, seed: int) -> Node:
    key = _key(reference)
    targets = spec.teachers if spec.teachers is not None else {name: f"{TEACHERS}.{name}" for name in config.teachers}
    if not targets:
        raise ConfigError(f"{key}: has no teachers to merge; name them in `teachers`")
    tree = apply_overrides(load_yaml(read_text(spec.file, "config file"), spec.file), spec.overrides)
    tree |= {"out": "node", "base": "node", "models": dict.fromkeys(targets, "node"), "seed": seed}
    try:
        merge = build(MergeConfig, tree)
    except ConfigError as error:
        raise ConfigError(f"{key}: {spec.file}: {error}") from None
    inputs = {"base": spec.start or BASE} | {f"models.{name}": target for name, target in targets.items()}
    return Node(
        name=f"seed{seed}/{reference}",
        kind="merge",
        tree=to_tree(merge),
        inputs={path: f"seed{seed}/{target}" for path, target in inputs.items()},
    )


def trial_methods(config: ReproduceConfig) -> dict[str, MethodSpec]:
    """`--tune`: one method per trial, `<method>_trial<i>`; the nodes before it are made once for all its trials."""
    trials = config.tune.trials if config.tune else {}
    methods: dict[str, MethodSpec] = {}
    for name, listed in trials.items():
        for index, overrides in enumerate(listed, start=1):
            spec = config.methods[name]
            if trial_name(name, index) in config.methods:
                raise ConfigError(f"methods.{trial_name(name, index)}: is the name of a trial of {name}; rename it")
            methods[trial_name(name, index)] = replace(spec, overrides=(*spec.overrides, *overrides), before={})
    return methods


def trial_name(method: str, index: int) -> str:
    return f"{method}_trial{index}"


def scaled_methods(config: ReproduceConfig, evaluation: RunConfig) -> dict[tuple[str, int], MethodSpec]:
    """(method, n) -> the method with the first n domains and as many rollouts a domain as with all of them.

    n = all domains is the method itself and is not in here. Raises ConfigError.
    """
    return dict(_scaled(config, evaluation))


def _scaled(config: ReproduceConfig, evaluation: RunConfig) -> Iterator[tuple[tuple[str, int], MethodSpec]]:
    if config.scaling is None:
        return
    domains = evaluation.domain_names
    for method in config.scaling.methods:
        spec = config.methods[method]
        if spec.before or spec.teachers is not None:
            raise ConfigError(f"scaling.methods: '{method}' names nodes of its own (before, teachers); leave it out")
        for count in config.scaling.teachers:
            if count > len(domains):
                raise ConfigError(f"scaling.teachers: {count} is more than the {len(domains)} domains")
            if scaled_name(method, count) in config.methods:
                raise ConfigError(f"methods.{scaled_name(method, count)}: is scaling's name for {method}; rename it")
            if count < len(domains):
                yield (method, count), _first_domains(config, evaluation, method, count)


def _first_domains(config: ReproduceConfig, evaluation: RunConfig, method: str, count: int) -> MethodSpec:
    spec, key = config.methods[method], f"methods.{method}"
    kept = evaluation.domain_names[:count]
    if spec.merge is not None:
        used = dict.fromkeys(evaluation.domains[name].teacher or "" for name in kept)
        return replace(spec, teachers={name: f"{TEACHERS}.{name}" for name in used})
    prompts = _load_run(spec.file, [*config.overrides, *spec.overrides], key).prompts_per_step * count
    if prompts % len(evaluation.domains):
        raise ConfigError(
            f"{key}: prompts_per_step is not a multiple of the {len(evaluation.domains)} domains, so that {count} of "
            "them cannot have their share of it; change it"
        )
    overrides = (*spec.overrides, f"prompts_per_step={prompts // len(evaluation.domains)}")
    rollouts = config.rollouts(method) * count // len(evaluation.domains)
    return replace(spec, domains=kept, overrides=overrides, rollouts=rollouts)


def scaled_name(method: str, count: int) -> str:
    return f"{method}_n{count}"

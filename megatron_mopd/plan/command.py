"""`mopd plan`: reads a configuration and a cluster, prints what a run of them needs. Touches no GPU and no network."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mopd.config import RunConfig, check_layout, load_config
from megatron_mopd.plan.arguments import Options
from megatron_mopd.plan.cluster import DEVICES, ClusterSpec, read_cluster
from megatron_mopd.yaml_config import ConfigError, require

if TYPE_CHECKING:  # torch is imported when the configuration is known to be good
    from megatron_mopd.plan.memory import Setting


def plan(path: str | None, overrides: Sequence[str], options: Options) -> int:
    """Print the plan; returns the exit code. Raises ConfigError."""
    # A plan must be the same on a login node as on a GPU node, and leave GPUs alone.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.scale_table:
        from megatron_mopd.plan.scale_table import as_markdown, scale_rows

        print(as_markdown(scale_rows()))
        return 0
    if path is None:
        raise ConfigError("plan: name the YAML file of a run, or give --scale-table")
    config = load_config(path, overrides)
    cluster = _cluster(config, options)
    _print_plan(config, Path(path), cluster, options)
    return 0


def _cluster(config: RunConfig, options: Options) -> ClusterSpec:
    """Where nothing else is said: H100s for bf16, this machine's cores for fp32, as many as the layout needs."""
    fallback = {"device": "cpu" if config.model.dtype == "float32" else "h100"}
    given = dict(options.cluster_values)
    values = given if options.cluster is not None else fallback | given
    device = values.get("device")
    require(device is None or device in DEVICES, f"--device: one of {', '.join(DEVICES)}, got {device}")
    cluster = read_cluster(options.cluster, values, config.parallel.ranks or config.parallel.default_ranks)
    if cluster.rollout_gpus and not config.generates:
        raise ConfigError(f"--rollout-gpus: stage '{config.stage}' with this rollout.engine samples no answers")
    return cluster


def _print_plan(config: RunConfig, file: Path, cluster: ClusterSpec, options: Options) -> None:
    from megatron_mopd.plan.published import student_shapes
    from megatron_mopd.plan.report import make_report
    from megatron_mopd.plan.setting import count_all, make_setting
    from megatron_mopd.plan.suggest import verify
    from megatron_mopd.plan.text import as_json, report_lines
    from megatron_mopd.plan.workload import workload_of

    student = student_shapes(config, file, options.model)
    if not options.suggest:
        check_layout(config.parallel, cluster.gpus)
    workload = workload_of(config, options.response_share)
    counts = count_all(student, config)
    lenient = replace(config, parallel=replace(config.parallel, tensor=1, pipeline=1, expert=1))
    setting = make_setting(
        lenient if options.suggest else config,
        counts,
        student,
        ranks=cluster.gpus,
        workload=workload,
        on_cpu=cluster.is_cpu,
        servers=cluster.rollout_gpus > 0,
    )
    if options.suggest:
        _suggest(setting, cluster, options)
        return
    verify(setting)
    report = make_report(setting, cluster, options.efficiency)
    result = {"config": str(file), "model": student.origin, **as_json(report)}
    lines = [f"{file}: {student.origin}; {cluster.gpus} x {cluster.device}", *report_lines(report)]
    if options.simulate:
        extra, more = _simulate(setting, cluster, options)
        result["simulation"] = extra
        lines += more
    print(json.dumps(result, indent=2) if options.as_json else "\n".join(lines))


def _suggest(setting: Setting, cluster: ClusterSpec, options: Options) -> None:
    """Layouts for the engine that the configuration names; where none of them fits, for servers besides, and then with
    `optim.offload`."""
    from megatron_mopd.plan.suggest import distinct, fewest_gpus, search, verify
    from megatron_mopd.plan.text import suggestion_json, suggestion_lines

    lines, results = [], []
    settings = [setting]
    while settings:
        base = settings.pop(0)
        found = distinct(search(base, cluster), 3)
        if not found:
            raise ConfigError(
                f"--suggest: no layout divides both the model and {cluster.gpus} ranks; give another --gpus"
            )
        for each in found:
            verify(each.setting)
        fewest = None if found[0].fits else fewest_gpus(base, cluster)
        lines += list(suggestion_lines(found, cluster, fewest))
        results.append({"fewest_gpus": fewest, "layouts": [suggestion_json(each) for each in found]})
        if found[0].fits:
            continue
        if base.engine_here and base.config.generates:
            settings.append(replace(base, engine_here=False))
        elif not (base.config.optim.offload or cluster.is_cpu):
            optim = replace(base.config.optim, offload=True)
            settings.append(replace(base, config=replace(base.config, optim=optim)))
    print(json.dumps({"gpus": cluster.gpus, "suggestions": results}, indent=2) if options.as_json else "\n".join(lines))


def _simulate(setting: Setting, cluster: ClusterSpec, options: Options) -> tuple[dict[str, object], list[str]]:
    """Every way to share out the nodes of `cluster` between training and servers."""
    from megatron_mopd.plan.faults import FULL, memory_share
    from megatron_mopd.plan.memory import fullest
    from megatron_mopd.plan.simulate import STEPS, simulate, splits
    from megatron_mopd.plan.text import split_json, split_lines
    from megatron_mopd.plan.times import generations, step_time

    if cluster.is_cpu or not setting.config.generates:
        raise ConfigError("--simulate: needs a run that samples answers, on GPUs (--device h100)")
    nodes = cluster.nodes
    if nodes < 2:
        raise ConfigError("--simulate: shares out nodes; give --gpus and --rollout-gpus of two nodes or more together")
    seeds = range(STEPS)

    def seconds(train_nodes: int, rollout_nodes: int) -> tuple[list[float], float, float] | None:
        split = replace(
            cluster,
            gpus=train_nodes * cluster.gpus_per_node,
            rollout_gpus=rollout_nodes * cluster.gpus_per_node,
        )
        own = replace(setting, ranks=split.gpus, engine_here=False)
        try:
            check_layout(own.parallel, own.ranks)
        except ConfigError:
            return None
        if memory_share(split, fullest(own)[1]) > FULL:
            return None
        generation = generations(own, split, options.efficiency, seeds)
        time = step_time(own, split, options.efficiency)
        return (generation, time.training, time.phase("sync")) if generation else None

    found = splits(nodes, options.lag, seconds)
    together = None
    if setting.engine_here:
        own = generations(setting, cluster, options.efficiency, seeds)
        time = step_time(setting, cluster, options.efficiency)
        together = simulate(own, time.training, time.phase("sync"), 0, colocated=True)
    result: dict[str, object] = {"lag": options.lag, "nodes": nodes, "splits": [split_json(split) for split in found]}
    return result, list(split_lines(found, together, options.lag, nodes))

"""`mopd reproduce`: check the file, say what is cached and why not, make the rest, print the tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_mopd.config import RunConfig
from megatron_mopd.environment import joined_world
from megatron_mopd.reproduce.config import BASE, TEACHERS, MethodSpec, ReproduceConfig, load_reproduce_config
from megatron_mopd.reproduce.cost import budget_line, check_budget, drawing_more
from megatron_mopd.reproduce.dry_run import cost_table
from megatron_mopd.reproduce.execute import execute
from megatron_mopd.reproduce.graph import Node, with_inputs
from megatron_mopd.reproduce.plan import load_evaluation, scaled_methods, scaled_name, seed_nodes, trial_methods
from megatron_mopd.reproduce.store import StoredNode, place, prune, write_json
from megatron_mopd.reproduce.summary import lost_leads, read_figures, summarise, summary_path
from megatron_mopd.reproduce.table import compute_table, scaling_table, score_table
from megatron_mopd.reproduce.tune import trial_scores, tuning_table
from megatron_mopd.run_lock import lock_run_folder
from megatron_mopd.yaml_config import ConfigError

WIDTH = 150
"""Characters of a line where there is no terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of the command line."""

    seeds: int | None = None
    """How many of the file's seeds, from the first; None: all."""
    only: str | None = None
    """A method: make it and what it needs, and nothing else."""
    dry_run: bool = False
    prune: bool = False
    tune: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for: a graph of all seeds, and the models that are to be compared."""

    config: ReproduceConfig
    evaluation: RunConfig
    nodes: Mapping[str, Node]
    """In order."""
    seeds: tuple[int, ...]
    models: tuple[str, ...]
    """References of what is evaluated, the base and the teachers first."""

    @property
    def wanted(self) -> list[str]:
        """The nodes that are needed, in order."""
        ends = [f"seed{seed}/{model}.eval" for seed in self.seeds for model in self.models]
        needed = with_inputs(self.nodes, ends)
        return [name for name in self.nodes if name in needed]

    @property
    def domains(self) -> dict[str, str]:
        """domain -> its teacher."""
        return {name: domain.teacher or "" for name, domain in self.evaluation.domains.items()}


def reproduce(path: str, overrides: Sequence[str], options: Options) -> int:
    """Returns the exit code: 0, or that of the first node that failed or was stopped. Raises ConfigError."""
    if joined_world() is not None:
        raise ConfigError("mopd reproduce starts its own ranks; start it once, without torchrun or srun")
    started = time.monotonic()
    config = load_reproduce_config(path, overrides)
    plan = make_plan(config, options)
    run_dir = Path(config.run_dir)
    stored = place(list(plan.nodes.values()), run_dir)
    more = drawing_more(plan.nodes, config.methods, plan.seeds[0])
    _say(budget_line({name: config.rollouts(name) for name in config.methods}, config.budget.rollouts, more))
    if options.dry_run:
        _say_changes(plan, stored)
        _show(cost_table(plan.nodes, stored, plan.wanted))
        _say(f"nothing was made; without --dry-run the results go to {run_dir}")
        return 0
    with lock_run_folder(run_dir):
        if options.prune:
            _prune(config, plan, stored, run_dir)
        todo = _say_changes(plan, stored)
        code = execute(stored, todo, config.workers, _say)
        if code:
            _say("the same command goes on from here")
            return code
        _report(plan, stored, run_dir, options)
    seconds = time.monotonic() - started
    made = (
        f"made {len(todo)} of {len(plan.wanted)} nodes"
        if todo
        else f"nothing to do: all {len(plan.wanted)} nodes are cached"
    )
    _say(f"{made} ({seconds:.1f} s)")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _show(table: Table) -> None:
    """As wide as the terminal; in a file wide enough for the tables."""
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=WIDTH)).print(table)


def make_plan(config: ReproduceConfig, options: Options) -> Plan:
    """Read all files that the comparison names and check everything that needs no checkpoint. Raises ConfigError."""
    evaluation = load_evaluation(config)
    if options.tune:
        return _tuning_plan(config, evaluation, options)
    if options.seeds is not None and not 1 <= options.seeds <= len(config.seeds):
        raise ConfigError(
            f"--seeds {options.seeds}: the file lists {len(config.seeds)} seeds; list more, or ask for fewer"
        )
    seeds = config.seeds[: options.seeds]
    scaled = {scaled_name(*key): spec for key, spec in scaled_methods(config, evaluation).items()}
    methods = {**config.methods, **scaled}
    rollouts = {name: config.rollouts(name) for name in config.methods}
    rollouts |= {name: 0 if spec.merge else spec.rollouts or 0 for name, spec in scaled.items()}
    shown = tuple(methods)
    if options.only is not None:
        if options.only not in config.methods:
            raise ConfigError(f"--only {options.only}: no such method; known: {', '.join(config.methods)}")
        points = [scaled_name(*key) for key in scaled_methods(config, evaluation) if key[0] == options.only]
        shown = (options.only, *points)
    return _plan(config, evaluation, seeds, methods, shown, "held_out", rollouts)


def _tuning_plan(config: ReproduceConfig, evaluation: RunConfig, options: Options) -> Plan:
    if config.tune is None:
        raise ConfigError("--tune: the file has no `tune`; list the trials of each method there")
    if options.seeds is not None:
        raise ConfigError("--seeds: trials have a seed of their own, tune.seed; leave it out with --tune")
    if evaluation.evaluation.validation_prompts == 0:
        raise ConfigError(
            f"{config.evaluation.config}: evaluation.validation_prompts is 0; trials are compared on that split, give "
            "it some"
        )
    trials = trial_methods(config)
    if options.only is not None:
        trials = {name: spec for name, spec in trials.items() if name.rpartition("_trial")[0] == options.only}
        if not trials:
            raise ConfigError(f"--only {options.only}: has no trials in tune.trials")
    rollouts = {name: config.rollouts(name) for name in config.methods}
    rollouts |= {name: rollouts[name.rpartition("_trial")[0]] for name in trials}
    methods = {**config.methods, **trials}
    return _plan(config, evaluation, (config.tune.seed,), methods, tuple(trials), "validation", rollouts)


def _plan(
    config: ReproduceConfig,
    evaluation: RunConfig,
    seeds: tuple[int, ...],
    methods: Mapping[str, MethodSpec],
    shown: tuple[str, ...],
    split: str,
    rollouts: Mapping[str, int],
) -> Plan:
    found = [node for seed in seeds for node in seed_nodes(config, evaluation, seed, methods=methods, split=split)]
    nodes = {node.name: node for node in found}
    check_budget(nodes, methods, rollouts, seeds[0])
    teachers = tuple(f"{TEACHERS}.{name}" for name in config.teachers)
    return Plan(config=config, evaluation=evaluation, nodes=nodes, seeds=seeds, models=(BASE, *teachers, *shown))


def _say_changes(plan: Plan, stored: Mapping[str, StoredNode]) -> list[str]:
    """The nodes to make, in order; says why those that were made before are made again."""
    todo = [name for name in plan.wanted if not stored[name].is_done]
    following = 0
    for name in todo:
        reason = stored[name].why()
        if reason is None:
            continue
        only_inputs = all(part.endswith(" has changed") and part.startswith("seed") for part in reason.split("; "))
        if only_inputs:
            following += 1
        else:
            _say(f"{name}: is made again: {reason}")
    if following:
        _say(f"{following} more that depend on these are made again")
    return todo


def _prune(config: ReproduceConfig, plan: Plan, stored: Mapping[str, StoredNode], run_dir: Path) -> None:
    """Delete what belongs to neither the comparison nor its trials, whatever part of it was asked for."""
    kept = dict(stored)
    plans = [make_plan(config, Options()), *([make_plan(config, Options(tune=True))] if config.tune else [])]
    for other in plans:
        kept |= place(list(other.nodes.values()), run_dir)
    gone = prune(kept, run_dir)
    _say(f"pruned {len(gone)} folders" + "".join(f"\n  {folder}" for folder in gone))


def _report(plan: Plan, stored: Mapping[str, StoredNode], run_dir: Path, options: Options) -> None:
    if options.tune:
        figures = read_figures(plan.domains, stored, plan.seeds, plan.models)
        tuning = trial_scores(plan.config, figures)
        write_json(run_dir / "tuning.json", tuning)
        _show(tuning_table(plan.config, tuning))
        _say(f"{run_dir / 'tuning.json'}")
        return
    # --only makes one method; the others are shown as well if they are complete.
    complete = [name for name in _evaluated(plan) if _is_complete(plan, stored, name)]
    figures = read_figures(plan.domains, stored, plan.seeds, complete)
    methods = [name for name in plan.config.methods if name in complete]
    for line in lost_leads(figures):
        _say(f"warning: {line}")
    summary = summarise(plan.config, figures, stored, plan.seeds, methods)
    path = summary_path(run_dir, len(plan.seeds))
    write_json(path, summary)
    _show(score_table(summary))
    if summary["scaling"]:
        _show(scaling_table(summary))
    _show(compute_table(summary))
    _say(str(path))


def _evaluated(plan: Plan) -> list[str]:
    prefix = f"seed{plan.seeds[0]}/"
    return [name.removeprefix(prefix).removesuffix(".eval") for name, node in plan.nodes.items()
            if node.kind == "eval" and name.startswith(prefix)]  # fmt: skip


def _is_complete(plan: Plan, stored: Mapping[str, StoredNode], model: str) -> bool:
    names = with_inputs(plan.nodes, [f"seed{seed}/{model}.eval" for seed in plan.seeds])
    return all(stored[name].is_done for name in names)

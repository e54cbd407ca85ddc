"""The file of a comparison: the base, the teachers, the methods, the seeds and the budget. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_mopd.yaml_config import ConfigError, apply_overrides, build, load_yaml, read_text, require

Family = Literal["merge", "rl", "off_policy", "mopd"]
BASE, TEACHERS = "base", "teachers"
"""The name of the base's node, and what the names of the teachers' nodes begin with."""
RESERVED = (BASE, TEACHERS)
_NAME = re.compile(r"[A-Za-z0-9_]+")


def _check_names(names: Mapping[str, object], key: str) -> None:
    for name in names:
        require(
            _NAME.fullmatch(name) is not None,
            f"{key}.{name}: names folders; use letters, digits and underscores only",
        )


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """One command: `mopd run`, `mopd sample` or `mopd merge` of a file, and which nodes its inputs are.

    A node is named `base`, `teachers.NAME`, `METHOD`, or `METHOD.NAME` for those in a method's `before`.
    """

    run: str | None = None
    """File for `mopd run`."""
    sample: str | None = None
    """File for `mopd sample`: answers of the teachers, written as a dataset."""
    merge: str | None = None
    """File for `mopd merge`."""
    overrides: tuple[str, ...] = ()
    """`key.path=value`, as on the command line."""
    start: str | None = None
    """Node whose checkpoint the run starts from, or the merge's base; default: `base`."""
    teachers: dict[str, str] | None = None
    """Teacher in the file -> node; default: each is the node `teachers.NAME`. A merge's models."""
    dataset: str | None = None
    """The `sample` node that `rollout.dataset` is."""
    keep: Literal["all", "correct"] = "all"
    """`sample`: correct keeps the answers with the verifier's full score only."""
    domains: tuple[str, ...] | None = None
    """Keep these domains of the file, and the teachers they need; default: all."""

    def __post_init__(self) -> None:
        given = [name for name in ("run", "sample", "merge") if getattr(self, name) is not None]
        require(len(given) == 1, "give exactly one of run, sample and merge (the file of that command)")
        require(self.run is not None or self.dataset is None, "dataset: only a run reads one; remove it")
        require(self.sample is not None or self.keep == "all", "keep: only for `sample`; remove it")
        require(self.merge is None or self.domains is None, "domains: a merge has none; choose its teachers instead")

    @property
    def file(self) -> str:
        return self.run or self.sample or self.merge or ""


@dataclass(frozen=True, kw_only=True)
class MethodSpec(NodeSpec):
    """A row of the table: its last node, whose model is evaluated, and those that only this method needs before."""

    family: Family
    """Its group in the report; a merge generates no rollouts of its own."""
    label: str | None = None
    """In tables and plots; default: the method's name."""
    rollouts: int | None = None
    """Rollouts that are generated for it, its teachers' training not counted; default: `budget.rollouts`, for a merge
    0. Checked against the files."""
    before: dict[str, NodeSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sample is None, "sample: makes a dataset and no model; put it into `before`")
        _check_names(self.before, "before")
        require("eval" not in self.before, "before.eval: is the name of the evaluation's own node; choose another")


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """Of every model: a run's file with all the domains. Its `evaluation` keys, but for `every`, become those of all
    runs, so that none of them trains on the held-out prompts."""

    config: str
    """The run's file."""
    overrides: tuple[str, ...] = ()
    """`key.path=value`, as on the command line."""


@dataclass(frozen=True, kw_only=True)
class BudgetSpec:
    rollouts: int
    """That every method generates, unless it says otherwise."""

    def __post_init__(self) -> None:
        require(self.rollouts > 0, "rollouts: must be > 0")


@dataclass(frozen=True, kw_only=True)
class TuneSpec:
    """`--tune`: the same number of trials for every method, on the validation split and a seed of its own."""

    trials: dict[str, tuple[tuple[str, ...], ...]]
    """Method -> trials; a trial is a list of `key.path=value` for the method's last node."""
    seed: int = 1000
    """Not one of `seeds`."""

    def __post_init__(self) -> None:
        counts = {method: len(trials) for method, trials in self.trials.items()}
        for method, count in counts.items():
            require(count > 0, f"trials.{method}: is empty; remove the method, or list its trials")
            first = next(iter(counts))
            require(
                count == counts[first],
                f"trials.{method}: {count} trials, but {first} has {counts[first]}; give every method as many",
            )


@dataclass(frozen=True, kw_only=True)
class ScalingSpec:
    """The methods named here are repeated with the first n domains of the evaluation's file, and their teachers."""

    teachers: tuple[int, ...]
    """The numbers n."""
    methods: tuple[str, ...]
    """Keys of the file's `methods`."""

    def __post_init__(self) -> None:
        require(bool(self.teachers) and bool(self.methods), "teachers, methods: name at least one of each")
        for count in self.teachers:
            require(count >= 1, f"teachers: must be >= 1, got {count}")
        require(len(set(self.teachers)) == len(self.teachers), "teachers: a number is listed twice; keep one")
        require(len(set(self.methods)) == len(self.methods), "methods: a method is listed twice; keep one")


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    run_dir: str
    """Folder of all results."""
    title: str
    """Of the report."""
    seeds: tuple[int, ...]
    """Every node is made once for each."""
    base: NodeSpec
    teachers: dict[str, NodeSpec]
    methods: dict[str, MethodSpec]
    evaluation: EvaluationSpec
    budget: BudgetSpec
    overrides: tuple[str, ...] = ()
    """`key.path=value` for every `run`, `sample` and evaluation: for example parallel.ranks=1."""
    workers: int = 1
    """Nodes that run side by side on this machine."""
    tune: TuneSpec | None = None
    scaling: ScalingSpec | None = None

    def __post_init__(self) -> None:
        require(bool(self.seeds), "seeds: is empty; list at least one")
        for seed in self.seeds:
            require(self.seeds.count(seed) == 1, f"seeds: {seed} is listed twice; its runs would be the same runs")
            require(seed >= 0, f"seeds: must be >= 0, got {seed}")
        require(self.workers >= 1, "workers: must be >= 1")
        require(bool(self.methods), "methods: is empty; name at least one")
        require(self.base.run is not None, "base.run: missing; the base is made by `mopd run`")
        for name, teacher in self.teachers.items():
            require(teacher.run is not None, f"teachers.{name}.run: missing; a teacher is made by `mopd run`")
        _check_names(self.teachers, TEACHERS)
        _check_names(self.methods, "methods")
        for name in self.methods:
            require(name not in RESERVED, f"methods.{name}: is the name of something else here; choose another")
        self._check_references()

    def _check_references(self) -> None:
        known = ", ".join(self.methods)
        if self.tune is not None:
            require(self.tune.seed not in self.seeds, f"tune.seed: {self.tune.seed} is one of seeds; choose another")
            for name in self.tune.trials:
                require(name in self.methods, f"tune.trials.{name}: no such method; known: {known}")
        if self.scaling is not None:
            for name in self.scaling.methods:
                require(name in self.methods, f"scaling.methods: no method '{name}'; known: {known}")

    def label(self, method: str) -> str:
        return self.methods[method].label or method

    def rollouts(self, method: str) -> int:
        """Rollouts that the method says it generates."""
        spec = self.methods[method]
        if spec.rollouts is not None:
            return spec.rollouts
        return 0 if spec.family == "merge" else self.budget.rollouts


def load_reproduce_config(path: str | Path, overrides: Sequence[str] = ()) -> ReproduceConfig:
    """Read a comparison's file, apply `key.path=value` overrides, and check it. Raises ConfigError."""
    tree = apply_overrides(load_yaml(read_text(path, "config file"), str(path)), overrides)
    try:
        return build(ReproduceConfig, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

"""One YAML file is one complete run: the dataclasses it is built into, and the checks between their fields.

The defaults are the MOPD paper's choices (arXiv 2606.30406, Appendix A) where it states them. Imports no torch,
so that a configuration is checked in a second. Checks that need files (tokenizer, checkpoints) or the model's
shape are in `preflight.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_mopd.data_config import BenchmarkSpec, DomainSpec, EvalSpec, SourceSpec, Split
from megatron_mopd.environments.config import EnvironmentSpec
from megatron_mopd.method_config import ObjectiveSpec, Stage, check_method, sequential_steps
from megatron_mopd.optim_config import OptimSpec
from megatron_mopd.rollout_config import LaunchSpec, RolloutSpec, SglangSpec
from megatron_mopd.teacher_config import TeacherMemorySpec, TeacherSpec
from megatron_mopd.yaml_config import (
    ConfigError,
    apply_overrides,
    build,
    dump_yaml,
    load_yaml,
    read_text,
    require,
)

__all__ = [
    "BenchmarkSpec",
    "CheckpointSpec",
    "DomainSpec",
    "EvalSpec",
    "LaunchSpec",
    "LogSpec",
    "ModelSpec",
    "ObjectiveSpec",
    "OptimSpec",
    "ParallelSpec",
    "RolloutSpec",
    "RunConfig",
    "SglangSpec",
    "SourceSpec",
    "Split",
    "Stage",
    "TeacherMemorySpec",
    "TeacherSpec",
    "check_layout",
    "load_config",
    "save_config",
]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The student: its architecture and tokenizer, and the weights it starts from."""

    hf_config: str | None = None
    """Folder or Hub name with config.json and the tokenizer; default: that of `checkpoint`."""
    checkpoint: str | None = None
    """Folder or Hub name with safetensors, or a checkpoint of this program; null starts from random weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and activations; gradients and the optimizer are always fp32."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """GPU only: the student's linear layers multiply in fp8 (Transformer Engine); weights stay bfloat16, teachers are
    scored in bfloat16. hybrid: e4m3 forward, e5m2 backward."""
    fp8_recipe: Literal["blockwise", "tensorwise", "delayed"] = "blockwise"
    """How values are scaled; blockwise is DeepSeek-V3's way (arXiv 2412.19437 sec. 3.3), with e4m3."""
    gradient_accumulation_fusion: bool = False
    """GPU only: weight gradients are added to the fp32 buffer by the product itself; needs NVIDIA's apex."""

    def __post_init__(self) -> None:
        require(
            self.hf_config is not None or self.checkpoint is not None,
            "hf_config and checkpoint are both missing; set hf_config to a folder with config.json",
        )
        require(
            self.fp8 is None or self.dtype == "bfloat16",
            f"fp8: weights and activations outside the products are bfloat16, not {self.dtype}; set dtype: bfloat16",
        )
        if self.fp8 is None and self.fp8_recipe != "blockwise":
            raise ConfigError(f"fp8_recipe: '{self.fp8_recipe}', but fp8 is off; set fp8 or remove it")

    @property
    def tokens_multiple(self) -> int:
        """The products of fp8 take a multiple of 16 tokens on each tensor-parallel rank."""
        return 1 if self.fp8 is None else 16

    @property
    def source(self) -> str:
        """Where config.json and the tokenizer are read from."""
        return self.hf_config or self.checkpoint or ""


@dataclass(frozen=True, kw_only=True)
class ParallelSpec:
    """Degrees of parallelism. Data parallel is what is left: world / (tensor * pipeline * context)."""

    tensor: int = 1
    """Ranks that share every matrix, with sequence parallelism; must divide the key/value heads."""
    pipeline: int = 1
    """Stages; must divide the layers."""
    context: int = 1
    """Ranks that share the tokens of every sequence, for long answers: activations / context. Each pads a sequence to
    a multiple of 2 * context tokens."""
    expert: int = 1
    """Expert parallel ranks; they lie in the tensor x context x data ranks of a pipeline stage."""
    ranks: int | None = None
    """Ranks that `mopd run` starts on this machine; default: one per GPU, or the fewest that fit on a CPU."""
    port: int | None = None
    """Rendezvous port on the loopback interface; default: a free one."""
    recompute: bool = False
    """Recompute activations in the backward pass, layer by layer."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context", "expert"):
            require(getattr(self, name) >= 1, f"{name}: must be >= 1")
        require(self.ranks is None or self.ranks >= 1, "ranks: must be >= 1")
        require(self.port is None or 1 <= self.port <= 65535, "port: must be in 1..65535")

    @property
    def default_ranks(self) -> int:
        """The fewest ranks with this layout: experts fold over tensor, context and data ranks."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert)


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    every: int = 20
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Older ones are removed once a newer one is complete."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "every: must be >= 1")
        require(self.keep_last >= 1, "keep_last: must be >= 1")


@dataclass(frozen=True, kw_only=True)
class LogSpec:
    tensorboard: bool = True
    """Write `tensorboard/` beside `metrics.jsonl` in the run folder."""
    wandb: str | None = None
    """Project name; needs the wandb package."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    run_dir: str
    """Folder of the run, made if need be; called again on it, the run goes on from its newest checkpoint."""
    stage: Stage
    """sft: learn from reference answers · rl: from verified rewards (GRPO); makes a teacher · mopd: from one teacher
    per domain, on the student's own answers."""
    steps: int
    """In all, those before a resumption among them."""
    prompts_per_step: int
    """Over all domains; each is answered `rollout.samples_per_prompt` times."""
    model: ModelSpec
    domains: dict[str, DomainSpec]
    optim: OptimSpec
    objective: ObjectiveSpec
    seed: int = 0
    """Of the prompts' order, of what is sampled, and of random weights."""
    domain_schedule: Literal["mixed", "sequential"] = "mixed"
    """mixed: all domains in every step, by `weight` · sequential: one domain after another in this file's order,
    `weight` shares out the steps (Cascade RL)."""
    teachers: dict[str, TeacherSpec] = field(default_factory=dict)
    teacher_memory: TeacherMemorySpec = field(default_factory=TeacherMemorySpec)
    allow_identical_teacher: bool = False
    """Let a teacher with the student's own weights pass; without it such a run is refused as inert."""
    rollout: RolloutSpec = field(default_factory=RolloutSpec)
    parallel: ParallelSpec = field(default_factory=ParallelSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    evaluation: EvalSpec = field(default_factory=EvalSpec)
    log: LogSpec = field(default_factory=LogSpec)

    def __post_init__(self) -> None:
        require(self.steps >= 0, "steps: must be >= 0")
        require(self.prompts_per_step >= 1, "prompts_per_step: must be >= 1")
        require(bool(self.domains), "domains: is empty; name at least one domain with a source")
        self._check_teachers()
        self._check_objective()

    def _check_teachers(self) -> None:
        names = ", ".join(self.teachers) or "none"
        if self.stage != "mopd":
            if self.teacher_memory != TeacherMemorySpec():
                raise ConfigError(f"teacher_memory: stage '{self.stage}' has no teachers; remove it")
            require(not self.teachers, f"teachers: not used in stage '{self.stage}'; remove them")
            for name, domain in self.domains.items():
                require(domain.teacher is None, f"domains.{name}.teacher: not used in stage '{self.stage}'; remove it")
            return
        for name, domain in self.domains.items():
            if domain.teacher is None:
                raise ConfigError(f"domains.{name}.teacher: missing; name one of the teachers: {names}")
            if domain.teacher not in self.teachers:
                raise ConfigError(f"domains.{name}.teacher: '{domain.teacher}' is not in teachers ({names})")
        used = {domain.teacher for domain in self.domains.values()}
        for name in self.teachers:
            require(name in used, f"teachers.{name}: no domain uses it; remove it or route a domain to it")

    def _check_objective(self) -> None:
        check_method(self.stage, self.objective, self.rollout)
        if self.needs_outcome and any(domain.verifier == "none" for domain in self.domains.values()):
            raise ConfigError("domains: an outcome reward needs a verifier other than 'none' in every domain")
        for name, domain in self.domains.items():
            if domain.source.validation is not None and not self.evaluation.validation_prompts:
                raise ConfigError(
                    f"domains.{name}.source.validation: evaluation.validation_prompts is 0; set it, or remove the file"
                )
            if domain.environment is not None and not self.generates:
                raise ConfigError(
                    f"domains.{name}.environment: only where the student answers by itself, in stage 'rl' or 'mopd' "
                    "without rollout.dataset; remove it"
                )
            if domain.environment is not None and self.rollout.samples_ahead:
                raise ConfigError(
                    f"rollout: domains.{name}.environment plays in turns within a step; set lag to 0 and waves to 1"
                )
            if domain.wrong_answers > 0 and not self.reads_answers:
                why = "the answers are those of rollout.dataset" if self.stage == "sft" else f"not '{self.stage}'"
                raise ConfigError(f"domains.{name}.wrong_answers: only in stage 'sft', {why}")
        updates = self.optim.updates_per_step
        require(updates <= self.prompts_per_step, "optim.updates_per_step: more than prompts_per_step")
        require(self.rollout.waves <= self.prompts_per_step, "rollout.waves: more than prompts_per_step")
        require(updates == 1 or self.rollout.waves == 1, "rollout.waves: must be 1 with several optim.updates_per_step")
        if self.domain_schedule == "sequential":
            sequential_steps(self._weights, self.steps)

    @property
    def domain_names(self) -> tuple[str, ...]:
        return tuple(self.domains)

    @property
    def needs_outcome(self) -> bool:
        """Whether rollouts get a group-normalised outcome advantage."""
        return self.objective.kind == "grpo" or self.objective.outcome_weight > 0

    @property
    def reads_answers(self) -> bool:
        """Whether the reference answers of the domains are what is learnt."""
        return self.stage == "sft" and self.rollout.engine != "dataset"

    @property
    def generates(self) -> bool:
        """Whether the student samples the answers that it is trained on."""
        return self.stage != "sft" and self.rollout.engine != "dataset"

    @property
    def environments(self) -> tuple[EnvironmentSpec | None, ...]:
        """Of every domain and every task of the evaluation."""
        tasks = (self.domains, self.evaluation.out_of_domain, self.evaluation.benchmarks)
        return tuple(spec.environment for group in tasks for spec in group.values())

    def domain_shares(self, step: int) -> dict[str, float]:
        """domain -> its share of the prompts of a step: its weight, or one domain after another (Cascade RL)."""
        if self.domain_schedule == "mixed":
            total = sum(self._weights.values())
            return {name: weight / total for name, weight in self._weights.items()}
        turns = sequential_steps(self._weights, self.steps)
        return {name: float(step in turn) for name, turn in turns.items()}

    @property
    def _weights(self) -> dict[str, float]:
        return {name: domain.weight for name, domain in self.domains.items()}


def check_layout(parallel: ParallelSpec, world_size: int) -> None:
    """Raise ConfigError when tensor x pipeline x context and expert do not fit `world_size` ranks.

    Megatron-Core lays two grids over a stage: tensor x context x data, and expert x its own data. Each must fill it.
    """
    tp, pp, cp, ep = parallel.tensor, parallel.pipeline, parallel.context, parallel.expert
    if world_size % (tp * pp * cp):
        degrees = {"tensor": tp, "pipeline": pp} | ({"context": cp} if cp > 1 else {})
        product = " x ".join(f"{name} {degree}" for name, degree in degrees.items())
        raise ConfigError(
            f"parallel: {product} = {tp * pp * cp} does not divide the {world_size} ranks; "
            f"start a multiple of {tp * pp * cp} ranks or change " + " / ".join(f"parallel.{name}" for name in degrees)
        )
    stage = world_size // pp
    if stage % ep:
        raise ConfigError(
            f"parallel.expert: {ep} does not divide the {stage} ranks of a pipeline stage "
            f"({world_size} ranks / pipeline {pp}); start more ranks or change parallel.expert"
        )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's file, apply `key.path=value` overrides, and check it. Raises ConfigError."""
    tree = apply_overrides(load_yaml(read_text(path, "config file"), str(path)), overrides)
    try:
        return build(RunConfig, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, every default included; `load_config` reads it back."""
    try:
        path.write_text(dump_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; free some space and resume") from None

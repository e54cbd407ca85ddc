"""A configuration and a cluster, put together: everything that a plan is a function of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_mopd.config import RunConfig, check_layout
from megatron_mopd.plan.count import ModelCount, count_model
from megatron_mopd.plan.memory import Setting
from megatron_mopd.plan.published import Shapes, student_shapes, teacher_shapes
from megatron_mopd.plan.workload import Workload, workload_of
from megatron_mopd.student.architecture import Architecture, check_architecture


def holds_engine(config: RunConfig) -> bool:
    """Whether the ranks of `run.py` hold an engine of their own: to answer, to be evaluated, or to be measured."""
    if config.rollout.engine not in ("in_process", "dataset"):
        return False
    return config.generates or config.evaluation.every > 0 or config.stage == "mopd"


def make_setting(
    config: RunConfig,
    counts: Mapping[Architecture, ModelCount],
    student: Shapes,
    *,
    ranks: int,
    workload: Workload,
    on_cpu: bool,
    servers: bool = False,
) -> Setting:
    """`servers`: answers come from GPUs of their own. Raises ConfigError for a layout that does not fit."""
    check_layout(config.parallel, ranks)
    check_architecture(student.arch, config.parallel)
    teachers = teacher_shapes(config, student)
    for name, shapes in zip(config.teachers, teachers, strict=True):
        check_architecture(shapes.arch, config.parallel, f"teacher {name}'s")
    return Setting(
        config=config,
        count=counts[student.arch],
        teachers=tuple(counts[shapes.arch] for shapes in teachers),
        workload=workload,
        parallel=config.parallel,
        ranks=ranks,
        max_tokens=config.optim.max_tokens_per_microbatch,
        spec="local" if on_cpu else "transformer_engine",
        engine_here=holds_engine(config) and not servers,
    )


def count_all(student: Shapes, config: RunConfig) -> dict[Architecture, ModelCount]:
    """The student, and teachers of other shapes."""
    distinct = {shapes.arch for shapes in (student, *teacher_shapes(config, student))}
    return {arch: count_model(arch) for arch in distinct}


def setting_on_cpu(config: RunConfig, file: Path, model: str | None, *, ranks: int) -> Setting:
    student = student_shapes(config, file, model)
    return make_setting(
        config, count_all(student, config), student, ranks=ranks, workload=workload_of(config), on_cpu=True
    )

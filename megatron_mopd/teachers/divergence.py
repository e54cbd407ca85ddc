"""Before the first step: how far each teacher is from the student, and how much of that is numerical noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_mopd.student.model import output_weight
from megatron_mopd.yaml_config import ConfigError

if TYPE_CHECKING:
    from megatron_mopd.run import Run

PROMPTS_PER_DOMAIN = 32


def check_initial_divergence(run: Run) -> None:
    """Print the initial reverse KL per token and domain beside the noise floor: the student scored by itself.

    Raises ConfigError for a teacher whose weights are the student's own, unless the configuration allows it: such
    a run would go through all its steps and learn nothing.
    """
    config, world = run.config, run.world
    for name, teacher in config.teachers.items():
        identical = run.teachers.equals(name, run.student.model)
        if identical and teacher.checkpoint != "self" and not config.allow_identical_teacher:
            raise ConfigError(
                f"teachers.{name}: its weights are the student's own, so there is nothing to learn from it; "
                f"check {teacher.checkpoint}, or set allow_identical_teacher=true"
            )
    prompts = [p for name in config.domains for p in run.mixer.held_out(name)[:PROMPTS_PER_DOMAIN]]
    run.refresh_evaluator()
    batches = run.updates.pack(run.evaluator.sample(prompts, seed=config.evaluation.seed, samples=1))
    measured = run.student.measure(batches, run.teachers.score(batches), run.teachers.heads())
    own = run.student.score(batches)
    heads = {name: output_weight(run.student.model) for name in config.teachers} if world.is_last_stage else {}
    floor = run.student.measure(batches, own, heads)["reverse_kl"]
    kls = ", ".join(f"{name} {measured[f'reverse_kl/{name}']:.4f}" for name in config.domains)
    run.progress.note(f"initial reverse KL per token: {kls} (noise floor {floor:.1e})")

"""The whole program on one screen: every rank runs this loop, for all three stages.

    prompts -> rollouts -> micro-batches -> teacher scores -> update -> weights -> next step

`sft` takes reference answers for rollouts and has no teachers; `rl` samples and has none either; `mopd` samples, and
each rollout is scored by the teacher of its domain.
"""

from __future__ import annotations

from megatron_mopd.config import RunConfig
from megatron_mopd.run import Run
from megatron_mopd.signals import StopFlag


def train(config: RunConfig) -> None:
    """Run `config` to its last step, on from its newest checkpoint if there is one. Called on every rank."""
    with StopFlag() as stop, Run(config) as run:
        for step in range(run.first_step, config.steps):
            reports = []
            for update in run.updates.of_step(step):
                batches, scores = [], []
                for part in update:  # all of it, or wave by wave as the answers come in
                    with run.timer("teacher"):
                        scores += run.teachers.score(part)
                    batches += part
                with run.timer("update"):
                    batches = run.updates.weighted(batches)
                    reports.append(run.student.update(batches, scores, run.teachers.heads(), step))
            with run.timer("sync"):
                run.engine.load_weights(run.student.hf_weights(), version=run.student.num_updates)
            run.log_step(step, reports)
            stopping = run.world.any(stop.requested)
            if stopping or run.is_checkpoint_due(step + 1):
                run.save(step + 1)
            if stopping:
                break

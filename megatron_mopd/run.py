"""A run's parts, put together: what `train.py` loops over. Nothing here decides anything; it wires."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megatron_mopd.compute import token_metrics
from megatron_mopd.config import RunConfig, save_config
from megatron_mopd.domain_weights import DomainGaps
from megatron_mopd.domains.mixer import DomainMixer
from megatron_mopd.evaluation.evaluate import evaluate
from megatron_mopd.evaluation.results import score_metrics
from megatron_mopd.metrics import MetricLog, PhaseTimer, read_records
from megatron_mopd.parallel.runtime import start_world, stop_world
from megatron_mopd.preflight import Inputs, resolve_inputs
from megatron_mopd.progress import Progress
from megatron_mopd.rollout.ahead import Ahead
from megatron_mopd.rollout.answers import ReferenceAnswers
from megatron_mopd.rollout.collect import Collector, rollout_metrics
from megatron_mopd.rollout.engine import RolloutEngine, RolloutFailure
from megatron_mopd.rollout.load import make_engine
from megatron_mopd.rollout.sglang.engine import SglangEngine
from megatron_mopd.rollout.stored_answers import StoredAnswers
from megatron_mopd.run_identity import check_same_run, run_identity
from megatron_mopd.run_lock import lock_run_folder
from megatron_mopd.student import checkpoint
from megatron_mopd.student.student import Student
from megatron_mopd.student.weight_stream import export_hf
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.divergence import check_initial_divergence
from megatron_mopd.teachers.manifest import check_same_teachers, teacher_manifest, teacher_weights
from megatron_mopd.types import UpdateReport
from megatron_mopd.updates import Updates
from megatron_mopd.yaml_config import ConfigError

DONE = "DONE"


class Run:
    """Everything that one rank holds while it trains; resumed from the run folder's newest checkpoint, if any."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = Path(config.run_dir)
        self.inputs: Inputs = resolve_inputs(config)
        self.world = start_world(config.parallel, config.seed)
        self.timer = PhaseTimer(torch.cuda.synchronize if self.world.device.type == "cuda" else None)
        self._lock = self.world.on_main(lambda: lock_run_folder(self.folder))
        self.mixer = DomainMixer(config, self.inputs.tokenizer, self.inputs.dataset)
        self.teachers = TeacherBank(config, self.inputs.teachers, self.world)
        self._teacher_manifest = teacher_manifest(config, self.inputs, self.world)
        self._identity = run_identity(config, self.inputs.tokenizer, self.inputs.dataset)
        if self.inputs.dataset is not None:
            self.inputs.dataset.check_teachers(teacher_weights(config, self._teacher_manifest))
        latest = checkpoint.find_latest(self.folder)
        self.student = Student(config, self.inputs.arch, self.world, self.inputs.weights)
        self.first_step = self._resume(latest) if latest else 0
        self.steps_saved = self.first_step
        self.engine = self._training_engine()
        self.ahead = self._answered_ahead(latest)
        self.collector = Collector(config, self.mixer, self.engine, self.inputs.tokenizer, self.world, self.ahead)
        self.updates = Updates(config, self.world, self.collector, self.student, self.timer)
        self.updates.gaps = self._saved_gaps(latest)
        # Where answers are looked up, the student samples only to be evaluated or measured.
        own_sampler = not config.generates and (config.evaluation.every > 0 or config.stage == "mopd")
        self._sampler = self._sampling_engine() if own_sampler else self.engine
        self.evaluator = Collector(config, self.mixer, self._sampler, self.inputs.tokenizer, self.world)
        self.engine.load_weights(self.student.hf_weights(), version=self.student.num_updates)
        self._done = (self.first_step, self._drawn())

    def __enter__(self) -> Self:
        self.world.on_main(lambda: save_config(self.config, self.folder / "config.yaml"))
        self.log = MetricLog(self.folder, self.config.log, rank=self.world.rank, resume_step=self.first_step)
        title = f"{self.config.stage} {self.folder.name}"
        self.progress = Progress(title, total=self.config.steps, rank=self.world.rank, start=self.first_step)
        self.progress.__enter__()
        self.world.on_main(self._mark_done)
        if self.first_step == 0 and self.config.stage == "mopd":
            check_initial_divergence(self)
        if self.first_step == 0:
            self._evaluate(0)
        elif self.first_step >= self.config.steps:
            self.progress.note(f"{self.folder}: already complete at step {self.first_step}; nothing to do")
        else:
            self.progress.note(f"{self.folder}: going on from step {self.first_step}")
        if self.first_step > 0 and self._missed_evaluation():
            self._evaluate(self.first_step)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.__exit__(kind, error, traceback)
        if isinstance(error, RolloutFailure):
            self._save_done()
        if isinstance(self.engine, SglangEngine):
            self.engine.close()
        if kind is None:
            self.log.close()
            stop_world()
        if self._lock is not None:
            self._lock.close()

    def log_step(self, step: int, reports: Sequence[UpdateReport]) -> None:
        """Write the step's metrics (means over its updates) and times; evaluate when it is time to."""
        report, rollouts = UpdateReport.mean(reports), self.collector.rollouts
        generated = sum(int(rollout.loss_mask.sum()) for rollout in rollouts)
        processed = sum(len(rollout.token_ids) for rollout in rollouts)
        scored = {"teacher": processed} if self.config.teachers else {}
        metrics = {
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            **report.metrics,
            **rollout_metrics(rollouts, self.config.domain_names),
            **self.collector.sampling_metrics,
            **(self.engine.sync_metrics if isinstance(self.engine, SglangEngine) else {}),
            **token_metrics(
                rollouts, generated=self.collector.generated_tokens, has_teachers=bool(self.config.teachers)
            ),
            **self.teachers.take_metrics(),
            **self.updates.learn_gaps(report.metrics),
            **{f"{what}/{name}": n for name, counts in self.mixer.counts().items() for what, n in counts.items()},
            **self.timer.take(tokens={"rollout": generated, **scored, "update": processed, "total": processed}),
        }
        self.log.step(step, metrics)
        self._done = (step + 1, self._drawn())
        self.progress.update(step + 1, metrics)
        if self.config.evaluation.every and (step + 1) % self.config.evaluation.every == 0:
            self._evaluate(step + 1)

    def is_checkpoint_due(self, steps_done: int) -> bool:
        return steps_done % self.config.checkpoint.every == 0 or steps_done == self.config.steps

    def save(self, steps_done: int, drawn: dict[str, Any] | None = None) -> None:
        """Checkpoint everything that the rest of the run depends on. Collective. drawn: another than `_drawn()`."""
        state = {
            "run": self._identity,
            "num_updates": self.student.num_updates,
            "gaps": dict(self.updates.gaps.gaps),
            "teachers": self._teacher_manifest,
            **(drawn or self._drawn()),
        }
        checkpoint.save(
            self.folder,
            steps_done,
            self.student.ddp,
            self.student.optimizer,
            self.world,
            state=state,
            write_model=lambda folder: export_hf(
                self.student.model, self.student.arch, self.world, folder, self.inputs.model_folder
            ),
            keep_last=self.config.checkpoint.keep_last,
        )
        self.steps_saved = steps_done
        self.world.on_main(self._mark_done)

    def _save_done(self) -> None:
        """Save the steps that were done before a failure in which no rank was lost: a resume repeats none of them."""
        steps_done, drawn = self._done
        if steps_done > self.steps_saved:
            self.save(steps_done, drawn)
        self.progress.note(f"{self.folder}: {steps_done} steps are saved; the same command goes on from there")

    def _mark_done(self) -> None:
        """DONE in the run folder says to launchers that the last step's checkpoint is there."""
        if self.steps_saved >= self.config.steps:
            (self.folder / DONE).write_text(f"{self.steps_saved}\n", encoding="utf-8")
        else:  # of an earlier run with fewer steps
            (self.folder / DONE).unlink(missing_ok=True)

    def _resume(self, path: Path) -> int:
        manifest = checkpoint.read_manifest(path)
        check_same_run(manifest.state["run"], self._identity, path)
        check_same_teachers(manifest.state["teachers"], self._teacher_manifest, path)
        checkpoint.load(path, self.student.ddp, self.student.optimizer, self.world)
        self.student.num_updates = manifest.state["num_updates"]
        self.mixer.load_state_dict(manifest.state["mixer"])
        return manifest.step

    def _saved_gaps(self, latest: Path | None) -> DomainGaps:
        return DomainGaps(checkpoint.read_manifest(latest).state.get("gaps", {}) if latest else {})

    def _drawn(self) -> dict[str, Any]:
        """Which prompts the steps done have trained on, as a checkpoint has it."""
        if self.ahead is None:
            return {"mixer": self.mixer.state_dict()}
        ahead = self.ahead.state_dict()
        return {"mixer": ahead.pop("cursors"), "ahead": ahead}

    def _answered_ahead(self, latest: Path | None) -> Ahead | None:
        saved = checkpoint.read_manifest(latest).state.get("ahead") if latest else None
        if not self.config.rollout.samples_ahead:
            if saved and saved["trained"]:
                raise ConfigError(
                    f"rollout.lag: {latest} has trained on prompts of later steps too; go on with the lag it had"
                )
            return None
        assert isinstance(self.engine, SglangEngine)
        ahead = Ahead(self.config, self.mixer, self.engine, self.first_step)
        if saved:
            ahead.load_state_dict(saved)
        return ahead

    def _training_engine(self) -> RolloutEngine:
        if self.config.rollout.engine == "dataset":
            return StoredAnswers()
        return ReferenceAnswers(self.inputs.tokenizer) if self.config.reads_answers else self._sampling_engine()

    def _sampling_engine(self) -> RolloutEngine:
        if self.config.rollout.engine == "sglang":
            return SglangEngine(self.config, self.inputs, self.world)
        return make_engine(self.config, self.inputs.arch, self.inputs.tokenizer, self.world.device)

    def refresh_evaluator(self) -> None:
        """Give `evaluator` the student's weights, where it has an engine of its own. Collective."""
        if self._sampler is not self.engine:
            self._sampler.load_weights(self.student.hf_weights(), version=self.student.num_updates)

    def _missed_evaluation(self) -> bool:
        """Whether the run was saved in the middle of the evaluation that was due. Collective."""
        every, path = self.config.evaluation.every, self.folder / "metrics.jsonl"
        due = bool(every) and self.first_step % every == 0
        done = due and any(record["step"] == self.first_step for record in read_records(path, "eval"))
        return self.world.any(self.world.is_main and due and not done)

    def _evaluate(self, steps_done: int) -> None:
        """Accuracy on the held-out prompts, into the log at the step that was just done."""
        if not self.config.evaluation.every:
            return
        self.refresh_evaluator()
        scores = evaluate(self.config, self.mixer, self.evaluator)
        self.log.step(steps_done, score_metrics(scores), kind="eval")

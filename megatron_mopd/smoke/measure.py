"""One rank of a small run, measured: `python -m megatron_mopd.smoke.measure FOLDER OUT`, under RANK and WORLD_SIZE.

Uses the GPU if one is visible. The first rank writes OUT: what the model says about given tokens, and loss and
gradient norm of one update with each objective. Another process does the same elsewhere, and the two are compared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_mopd.config import (
    DomainSpec,
    ModelSpec,
    ObjectiveSpec,
    OptimSpec,
    ParallelSpec,
    RolloutSpec,
    RunConfig,
    SourceSpec,
    TeacherMemorySpec,
    TeacherSpec,
)
from megatron_mopd.method_config import ImportanceSpec
from megatron_mopd.types import MicroBatch, Prompt, Rollout

if TYPE_CHECKING:
    from megatron_mopd.parallel.runtime import World
    from megatron_mopd.student.architecture import Architecture

TEACHERS = ("a", "b", "c")
OBJECTIVES = {
    "sampled": ObjectiveSpec(kind="sampled", importance=ImportanceSpec(kind="tis", low=0.1, high=2.0)),
    "teacher_topk": ObjectiveSpec(kind="teacher_topk", top_k=16),
    "full_vocab": ObjectiveSpec(kind="full_vocab"),
    "full_vocab, jsd": ObjectiveSpec(kind="full_vocab", divergence="jsd"),
    "grpo": ObjectiveSpec(kind="grpo"),
    "cross_entropy": ObjectiveSpec(kind="cross_entropy"),
}


def run_config(folder: Path, objective: ObjectiveSpec, parallel: ParallelSpec) -> RunConfig:
    """A run of the models in `folder`: bf16 where there is a GPU."""
    stage = {"cross_entropy": "sft", "grpo": "rl"}.get(objective.kind, "mopd")
    mopd, source = stage == "mopd", SourceSpec(reasoning_gym="chain_sum")
    return RunConfig(
        run_dir=str(folder / "run"),
        stage=stage,  # type: ignore[arg-type]
        steps=1,
        prompts_per_step=12,
        model=ModelSpec(
            checkpoint=str(folder / "student"), dtype="bfloat16" if torch.cuda.is_available() else "float32"
        ),
        teachers={name: TeacherSpec(checkpoint=str(folder / name)) for name in TEACHERS} if mopd else {},
        teacher_memory=TeacherMemorySpec(buffers=2) if mopd else TeacherMemorySpec(),
        domains={name: DomainSpec(source=source, teacher=name if mopd else None) for name in TEACHERS},
        optim=OptimSpec(lr=1e-3, max_tokens_per_microbatch=256),
        objective=objective,
        parallel=parallel,
        rollout=RolloutSpec(samples_per_prompt=4 if stage == "rl" else 1),
    )


def rollouts(vocab_size: int) -> list[Rollout]:
    """12 random ones, of uneven lengths."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(12):
        domain, before, after = TEACHERS[index % 3], int(rng.integers(4, 24)), int(rng.integers(8, 64))
        prompt_ids = rng.integers(0, vocab_size, before)
        prompt = Prompt(id=f"{domain}/{index}", domain=domain, token_ids=prompt_ids, answer="", max_response_tokens=64)
        mask = np.arange(before + after) >= before
        found.append(
            Rollout(
                prompt=prompt,
                sample=0,
                token_ids=np.concatenate([prompt_ids, rng.integers(0, vocab_size, after)]),
                loss_mask=mask,
                rollout_logprobs=np.where(mask, rng.normal(-5, 1, len(mask)), 0).astype(np.float32),
                policy_version=0,
                finish_reason="stop",
                outcome_advantage=float(rng.normal()),
            )
        )
    return found


def measure(folder: Path, parallel: ParallelSpec) -> dict[str, torch.Tensor]:
    """Name -> numbers: `logprobs` of every teacher's tokens, `swap` (its largest difference between the bank and a
    model that was loaded in place), `loss`, `grad_norm` for each objective, and `offload`. Called on every rank."""
    from megatron_mopd.packing import pack_step
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.model import build_model
    from megatron_mopd.student.step import score
    from megatron_mopd.student.student import Student
    from megatron_mopd.student.weights import load_hf
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(parallel, 0)
    arch = read_architecture(folder / "student")
    found: dict[str, torch.Tensor] = {"on_gpu": torch.tensor(float(world.device.type == "cuda"))}
    for name, objective in OBJECTIVES.items():
        config = run_config(folder, objective, parallel)
        batches = pack_step(rollouts(arch.vocab_size), config, data_rank=world.data.rank, data_ranks=world.data.size,
                            multiple_of=world.tensor.size, device=world.device)  # fmt: skip
        bank = TeacherBank(config, {t: (arch, folder / t) for t in config.teachers}, world)
        student = Student(config, arch, world, folder / "student")
        scores = bank.score(batches)
        if name == "sampled":
            again, apart = bank.score(batches), 0.0  # the second time every teacher comes from its other buffer
            for teacher in TEACHERS:
                model = build_model(arch, parallel, world, getattr(torch, config.model.dtype), training=False)
                load_hf(model, arch, folder / teacher, world)
                own = [index for index, batch in enumerate(batches) if batch.teacher == teacher]
                direct = score(model, [batches[i] for i in own], arch.vocab_size, world, replace(objective))
                for index, exact in zip(own, direct, strict=True):
                    for swapped in (scores[index].logprobs, again[index].logprobs):
                        assert swapped is not None and exact.logprobs is not None
                        apart = max(apart, float((swapped - exact.logprobs).abs().max()))
            found["swap"] = torch.tensor(apart)
            found["logprobs"] = torch.cat([each.logprobs.float().cpu() for each in scores if each.logprobs is not None])
        report = student.update(batches, scores, bank.heads(), step=0)
        found[f"loss {name}"], found[f"grad_norm {name}"] = torch.tensor(report.loss), torch.tensor(report.grad_norm)
    found["offload"] = torch.tensor(_offloaded(config, arch, world, batches))
    stop_world()
    return found


def _offloaded(config: RunConfig, arch: Architecture, world: World, batches: list[MicroBatch]) -> float:
    """Largest difference that AdamW with its moments in host memory makes to a weight in two updates, over `lr`."""
    from megatron_mopd.student.sharded_state import optimizer_parts
    from megatron_mopd.student.student import Student
    from megatron_mopd.types import TeacherScores

    weights = []
    for offload in (False, True):
        own = replace(config, optim=replace(config.optim, offload=offload))
        student = Student(own, arch, world, Path(config.model.source))
        for step in range(2):
            student.update(batches, [TeacherScores()] * len(batches), {}, step)
        groups = [group for part in optimizer_parts(student.optimizer) for group in part.optimizer.param_groups]
        weights.append([parameter.detach().clone() for group in groups for parameter in group["params"]])
    differences = [float((a - b).abs().max()) for a, b in zip(*weights, strict=True) if a.numel()]
    return max(differences) / config.optim.lr


def main(arguments: Sequence[str]) -> int:
    """Measure on this rank; rank 0 writes."""
    folder, out = map(Path, arguments)
    size = int(os.environ["WORLD_SIZE"])
    found = measure(folder, ParallelSpec(tensor=size, expert=size))
    if os.environ["RANK"] == "0":
        torch.save(found, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

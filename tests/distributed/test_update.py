"""One optimizer update is the same in every layout: loss, gradient norm, and the updated weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mopd.config import ParallelSpec, RunConfig
from megatron_mopd.packing import pack_step
from megatron_mopd.parallel import cpu
from tests import tiny
from tests.distributed.ranks import run_ranks

cpu.install()

DOMAINS = ["a"] * 9 + ["b"] * 5 + ["c"] * 2
LAYOUTS = [  # world, TP, PP, EP
    (1, 1, 1, 1),
    (2, 1, 1, 1),  # DP 2
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (2, 1, 1, 2),
    (2, 2, 1, 2),  # experts folded over the tensor ranks
    (4, 2, 1, 2),
    (4, 2, 2, 1),
    (8, 2, 2, 2),
]
WEIGHTED = ("icepop", "tis", "sequence_tis", "sequence_mis", "geometric")
KINDS = ("full_vocab", "sampled", "teacher_topk", "forward_kl", "mixed", "jsd", "grpo", "cross_entropy", *WEIGHTED)
CASES = [(kind, layout) for kind in ("full_vocab", "sampled") for layout in LAYOUTS[1:]] + [
    # What differs from these is in the loss only: data, tensor, pipeline and expert ranks once each, and all of them.
    *(("teacher_topk", layout) for layout in (*LAYOUTS[1:5], LAYOUTS[-1])),
    *(("forward_kl", layout) for layout in LAYOUTS[1:5]),
    ("mixed", (4, 2, 1, 2)),
    ("jsd", (4, 2, 2, 1)),
    *(("icepop", layout) for layout in LAYOUTS[1:5]),
    *((kind, (4, 2, 2, 1)) for kind in WEIGHTED[1:]),
]


def one_update(config: RunConfig, folder: Path, ratio: float = 0.0) -> dict:
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.student import Student
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(config.parallel, config.seed)
    arch = read_architecture(folder / "student")
    sources = {name: (read_architecture(folder / name), folder / name) for name in config.teachers}
    bank = TeacherBank(config, sources, world)
    student = Student(config, arch, world, folder / "student")
    batches = pack_step(
        tiny.rollouts(DOMAINS),
        config,
        data_rank=world.data.rank,
        data_ranks=world.data.size,
        multiple_of=world.tensor.size,
        device=world.device,
        context_ranks=world.context.size,
        context_rank=world.context.rank,
    )
    report = student.update(batches, bank.score(batches), bank.heads(), step=0)
    weights = {name: tensor.clone() for name, tensor in student.hf_weights()}
    stop_world()
    return {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "metrics": dict(report.metrics),
        "micro_batches": len(batches),
        "weights": weights if world.is_main else None,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "a", "b", "c")):
        tiny.write_model(folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def reference(models: Path) -> dict[str, dict]:
    return {kind: run_ranks(one_update, 1, tiny.run_config(models, kind=kind), models, init=False)[0] for kind in KINDS}


def assert_same(result: dict, expected: dict) -> None:
    # AdamW's first update is lr * g / (|g| + eps), here about 1e-3 for every weight: a hundred times the tolerance.
    # Gradients carry rounding of about 1e-8 (sums of terms near 0.1 in fp32); with eps = 1e-8 the one weight in 10^5
    # whose gradient is as small as that would show it as 1e-5 and more. eps = 1e-5 keeps the comparison well-posed.
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, value in expected["metrics"].items():
        assert result["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("kind", "layout"), CASES, ids=["{}-w{}-tp{}-pp{}-ep{}".format(kind, *layout) for kind, layout in CASES]
)
def test_layout_does_not_change_an_update(
    kind: str, layout: tuple[int, int, int, int], models: Path, reference: dict[str, dict]
) -> None:
    world, tp, pp, ep = layout
    config = tiny.run_config(models, kind=kind, parallel=ParallelSpec(tensor=tp, pipeline=pp, expert=ep))
    results = run_ranks(one_update, world, config, models, init=False)
    assert_same(results[0], reference[kind])
    assert all(result["loss"] == results[0]["loss"] for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batch_size_does_not_change_an_update(kind: str, models: Path, reference: dict[str, dict]) -> None:
    config = tiny.run_config(models, kind=kind, max_tokens=24)
    result = run_ranks(one_update, 1, config, models, init=False)[0]
    assert result["micro_batches"] >= 2 * reference[kind]["micro_batches"]
    assert_same(result, reference[kind])


@pytest.mark.parametrize("kind", WEIGHTED)
def test_importance_weights_are_those_of_the_definition(kind: str, models: Path, reference: dict[str, dict]) -> None:
    """Loss and metrics of a whole update against the definition, from the log-probs of a plain measurement."""
    config = tiny.run_config(models, kind=kind)
    (measured,) = run_ranks(row_logprobs, 1, config, models, init=False)
    metrics = reference[kind]["metrics"]
    spec = config.objective.importance
    low, high = spec.bounds
    ratio = np.exp(measured["student"] - measured["rollout"])
    sequence = measured["sequence"]
    total = np.bincount(sequence, np.log(ratio))
    product, mean = np.exp(total)[sequence], np.exp(total / np.bincount(sequence))[sequence]
    inside = {"icepop": ratio, "sequence_mis": product, "geometric": mean}.get(kind)
    value = {"icepop": ratio, "tis": ratio, "geometric": np.ones_like(ratio)}.get(kind, product)
    weights = np.clip(value, low, high) if inside is None else value * ((inside >= low) & (inside <= high))
    assert 0 < np.mean(weights != value) < 1  # the bounds cut some and not all
    assert metrics["importance_weight"] == pytest.approx(weights.mean(), rel=1e-5)
    assert metrics["importance_max"] == pytest.approx(weights.max(), rel=1e-5)
    assert metrics["importance_kept"] == pytest.approx((weights > 0).mean(), rel=1e-6)
    assert metrics["rollout_kl"] == pytest.approx(-np.log(ratio).mean(), rel=1e-5)
    assert metrics["rollout_kl_k3"] == pytest.approx((ratio - 1 - np.log(ratio)).mean(), rel=1e-5)


def row_logprobs(config: RunConfig, folder: Path) -> dict:
    """Of every trained token of the step, by the student: log-prob at temperature 1, and what the rollout says."""
    from megatron_mopd.config import ObjectiveSpec
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.step import score
    from megatron_mopd.student.student import Student

    world = start_world(config.parallel, config.seed)
    student = Student(config, read_architecture(folder / "student"), world, folder / "student")
    batches = pack_step(tiny.rollouts(DOMAINS), config, data_rank=0, data_ranks=1, multiple_of=1, device=world.device)
    scores = score(student.model, batches, student.arch.vocab_size, world, ObjectiveSpec(kind="sampled"))
    first = np.cumsum([0, *(int(batch.sequence_index.max()) + 1 for batch in batches)])
    stop_world()
    return {
        "student": np.concatenate([item.logprobs.numpy() for item in scores if item.logprobs is not None]),
        "rollout": np.concatenate([batch.rollout_logprobs.numpy() for batch in batches]),
        "sequence": np.concatenate(
            [batch.sequence_index.numpy() + start for batch, start in zip(batches, first, strict=False)]
        ),
    }

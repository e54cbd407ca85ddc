"""Context parallelism changes no number: updates, scores, logits and checkpoints are those of one rank.

Packed sequences of 3 to 16 tokens: most are no multiple of the 2C chunks, some are shorter than that.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_mopd.config import ObjectiveSpec, ParallelSpec, RunConfig
from megatron_mopd.method_config import ImportanceSpec
from megatron_mopd.packing import pack, pack_step
from megatron_mopd.parallel import cpu
from megatron_mopd.types import MicroBatch, Rollout
from tests import tiny
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import assert_identical, draws
from tests.distributed.test_update import DOMAINS, assert_same
from tests.distributed.trainee import MOE, Trainee

cpu.install()

from megatron_mopd.parallel.runtime import World, start_world, stop_world  # noqa: E402

SEED = 53
"""Of sequences as the first test wants them."""
LAYOUTS = {
    "cp2": (2, ParallelSpec(context=2)),
    "cp2-tp2": (4, ParallelSpec(context=2, tensor=2)),
    "cp2-ep2": (2, ParallelSpec(context=2, expert=2)),  # experts folded over the context ranks
    "cp2-pp2": (4, ParallelSpec(context=2, pipeline=2)),
    "cp2-ep4-dp2": (4, ParallelSpec(context=2, expert=4)),
    "cp4": (4, ParallelSpec(context=4)),
    "cp4-tp2": (8, ParallelSpec(context=4, tensor=2)),
    "cp4-ep2": (4, ParallelSpec(context=4, expert=2)),
    "cp4-pp2": (8, ParallelSpec(context=4, pipeline=2)),
}
OBJECTIVES = {
    "full_vocab": ObjectiveSpec(kind="full_vocab"),
    "sequence_tis": ObjectiveSpec(kind="sampled", importance=ImportanceSpec(kind="sequence_tis", high=0.2)),
    "geometric": ObjectiveSpec(
        kind="full_vocab", aggregation="token", importance=ImportanceSpec(kind="geometric", low=0.1, high=0.2)
    ),
}


def packed(config: RunConfig, world: World, rollouts: list[Rollout]) -> list[MicroBatch]:
    return pack_step(
        rollouts,
        config,
        data_rank=world.data.rank,
        data_ranks=world.data.size,
        multiple_of=world.tensor.size,
        device=world.device,
        context_ranks=world.context.size,
        context_rank=world.context.rank,
    )


def one_update_each(folder: Path, parallel: ParallelSpec, max_tokens: int) -> list[dict[str, Any]]:
    """For each of OBJECTIVES an update of a fresh student, and what the teachers said of each trained token."""
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.student import Student
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(parallel, 0)
    base = tiny.run_config(folder, parallel=parallel, max_tokens=max_tokens)
    arch = read_architecture(folder / "student")
    sources = {name: (arch, folder / name) for name in base.teachers}
    found = []
    for objective in OBJECTIVES.values():
        config = dataclasses.replace(base, objective=objective)
        bank = TeacherBank(config, sources, world)
        student = Student(config, arch, world, folder / "student")
        batches = packed(config, world, tiny.rollouts(DOMAINS, seed=SEED))
        scores = bank.score(batches)
        said = {}
        for batch, score in zip(batches, scores, strict=True):
            value = score.hidden if score.logprobs is None else score.logprobs
            if value is not None:
                keys = zip(*(column.tolist() for column in row_keys(batch)), strict=True)
                said.update(zip([(batch.teacher, *key) for key in keys], value.numpy(), strict=True))
        report = student.update(batches, scores, bank.heads(), step=0)
        weights = {name: tensor.clone() for name, tensor in student.hf_weights()}
        found.append(
            {
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "metrics": dict(report.metrics),
                "weights": weights if world.is_main else None,
                "said": said if world.tensor.rank == 0 else {},
            }
        )
    stop_world()
    return found


def row_keys(batch: MicroBatch) -> tuple[torch.Tensor, ...]:
    """What tells the rows of a step apart, in any layout: the token, those before it (its place), and the rollout."""
    return batch.position_ids[batch.rows], batch.targets, batch.rollout_logprobs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "a", "b", "c")):
        tiny.write_model(folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def reference(models: Path) -> list[dict[str, Any]]:
    return run_ranks(one_update_each, 1, models, ParallelSpec(), 4096, init=False)[0]


def test_the_sequences_are_uneven_and_some_are_short() -> None:
    lengths = [len(rollout.token_ids) for rollout in tiny.rollouts(DOMAINS, seed=SEED)]
    assert sum(length % 4 != 0 for length in lengths) > len(lengths) / 2
    assert min(lengths) < 4  # fewer than the chunks of two context ranks
    assert sum(length < 8 for length in lengths) >= 3  # and of four


def test_what_transformer_engine_is_told() -> None:
    """Padding is part of its sequence, boundaries are of all context ranks, and both pairs are the same tensors."""
    from megatron_mopd.student.packed import packed_sequences

    rollouts = tiny.rollouts(["a"] * 3, seed=SEED)  # of 12, 3 and 3 tokens
    common = {"domain_names": ("a",), "aggregation": "token", "multiple_of": 1, "device": torch.device("cpu")}
    batch = pack(rollouts, None, context_ranks=2, context_rank=1, **common)  # type: ignore[arg-type]
    told = packed_sequences(batch, torch.bfloat16, thd=True)
    assert told.cu_seqlens_q.tolist() == [0, 12, 16, 20]
    assert told.cu_seqlens_q is told.cu_seqlens_q_padded and told.cu_seqlens_kv is told.cu_seqlens_kv_padded
    assert (told.qkv_format, told.max_seqlen_q, told.max_seqlen_kv, len(batch.token_ids)) == ("thd", 12, 12, 10)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_update_is_that_of_one_rank(name: str, models: Path, reference: list[dict[str, Any]]) -> None:
    """Loss, gradient norm, metrics, weights, and the teachers' scores; with recomputation, in several micro-batches."""
    world, parallel = LAYOUTS[name]
    parallel = dataclasses.replace(parallel, recompute=name != "cp2")
    results = run_ranks(one_update_each, world, models, parallel, 80, init=False)
    for index, expected in enumerate(reference):
        assert_same(results[0][index], expected)
        assert all(result[index]["loss"] == results[0][index]["loss"] for result in results)
        # Every row on one context rank of one data rank, and nowhere else.
        assert sum(len(result[index]["said"]) for result in results) == len(expected["said"]) > 50
        said = {key: value for result in results for key, value in result[index]["said"].items()}
        assert said.keys() == expected["said"].keys()
        for key, value in expected["said"].items():
            np.testing.assert_allclose(said[key], value, rtol=0, atol=1e-5)


def own_teacher(folder: Path, parallel: ParallelSpec) -> dict[str, float]:
    """The metrics of a step whose teachers are the student."""
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.student import Student
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(parallel, 0)
    config = tiny.run_config(folder, parallel=parallel, kind="sampled")
    arch = read_architecture(folder / "student")
    bank = TeacherBank(config, dict.fromkeys(config.teachers, (arch, folder / "student")), world)
    student = Student(config, arch, world, folder / "student")
    batches = packed(config, world, tiny.rollouts(DOMAINS, seed=SEED))
    metrics = student.measure(batches, bank.score(batches), bank.heads())
    stop_world()
    return dict(metrics)


def test_a_teacher_that_is_the_student_says_the_same_bit_for_bit(models: Path) -> None:
    for metrics in run_ranks(own_teacher, 2, models, ParallelSpec(context=2), init=False):
        assert {metrics[f"reverse_kl/{name}"] for name in "abc"} == {0.0}


def logits_by_row(parallel: ParallelSpec, folder: Path, rollouts: list[Rollout]) -> dict[tuple[int, int], torch.Tensor]:
    """(rollout, place of the predicting token) -> [V], of the rows on this rank."""
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.model import build_model, output_weight
    from megatron_mopd.student.step import hidden_rows, run_schedule
    from megatron_mopd.student.weights import load_hf

    world = start_world(parallel, 0)
    batch = pack(
        rollouts,
        None,
        domain_names=("a",),
        aggregation="token",
        multiple_of=world.tensor.size,
        device=world.device,
        context_ranks=world.context.size,
        context_rank=world.context.rank,
    )
    arch = read_architecture(folder)
    model = build_model(arch, parallel, world, torch.float32, training=False)
    load_hf(model, arch, folder, world)

    def logits(micro_batch: MicroBatch, hidden: torch.Tensor) -> torch.Tensor:
        local = hidden_rows(hidden, micro_batch, world) @ output_weight(model).T
        parts = [torch.empty_like(local) for _ in range(world.tensor.size)]
        dist.all_gather(parts, local.contiguous(), group=world.tensor.group)
        return torch.cat(parts, dim=-1)[:, : arch.vocab_size]

    with torch.no_grad():
        (found,) = run_schedule(model, [batch], logits, backward=False)
    stop_world()
    keys = zip(batch.sequence_index.tolist(), batch.position_ids[batch.rows].tolist(), strict=True)
    return dict(zip(keys, found, strict=True))


@pytest.mark.parametrize("config", [tiny.MOE, {**tiny.DENSE, "tie_word_embeddings": True}], ids=["moe", "dense-tied"])
def test_logits_equal_those_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny.write_model(tmp_path, config)
    rollouts = tiny.rollouts(["a"] * 7, seed=5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    expected = {}
    with torch.no_grad():
        for index, rollout in enumerate(rollouts):
            out = model(torch.from_numpy(rollout.token_ids)[None]).logits[0]
            for place in np.flatnonzero(rollout.loss_mask) - 1:
                expected[index, int(place)] = out[place]
    for world, parallel in ((2, ParallelSpec(context=2)), (4, ParallelSpec(context=2, tensor=2))):
        results = run_ranks(logits_by_row, world, parallel, tmp_path, rollouts, init=False)
        found = {key: value for result in results for key, value in result.items()}
        assert found.keys() == expected.keys()
        assert sum(map(len, results)) == parallel.tensor * len(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4)
            assert value.abs().max() > 0.5


def train_and_save(run_dir: Path, context: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    trainee = Trainee((context, 1, 1, 1), context=context)
    for step in range(2):
        trainee.update(step)
    trainee.save(run_dir, 2)
    everything, whole = trainee.everything(), trainee.whole_weights()
    stop_world()
    return everything, whole


def load_and_save(ranks: int, context: int, source: Path, target: Path) -> tuple[dict[str, torch.Tensor], ...]:
    trainee = Trainee((ranks, 1, 1, 1), seed=7, context=context)
    trainee.load(source / "checkpoints" / "latest")
    trainee.save(target, 2)
    everything, whole = trainee.everything(), trainee.whole_weights()
    stop_world()
    return everything, whole


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 2), (4, 4)), ((2, 2), (2, 1))])
def test_a_checkpoint_loads_with_other_context_ranks(
    before: tuple[int, int], after: tuple[int, int], tmp_path: Path
) -> None:
    """(ranks, context): bit for bit, and back again, with every number of the optimizer."""
    originals = run_ranks(train_and_save, before[0], tmp_path / "first", before[1], init=False)
    passed_on = run_ranks(load_and_save, after[0], *after, tmp_path / "first", tmp_path / "second", init=False)
    back = run_ranks(load_and_save, before[0], *before, tmp_path / "second", tmp_path / "third", init=False)
    for _, whole in passed_on:
        assert_identical(whole, originals[0][1])
    for (everything, whole), (expected, expected_whole) in zip(back, originals, strict=True):
        assert_identical(everything, expected)
        assert_identical(whole, expected_whole)


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """Context ranks are replicas: two of them write as many bytes as one rank."""
    sizes = []
    for context in (1, 2):
        folder = tmp_path / str(context)
        run_ranks(train_and_save, context, folder, context, init=False)
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*.distcp")))
    assert sizes[0] < sizes[1] < 1.05 * sizes[0]  # the random states of one rank more


def train_on(run_dir: Path, resumed: bool) -> dict[str, torch.Tensor]:
    """One more update after the checkpoint of two, or after those two themselves."""
    trainee = Trainee((2, 1, 1, 1), MOE, torch.bfloat16, seed=7 if resumed else 0, context=2)
    if resumed:
        trainee.load(run_dir / "checkpoints" / "latest")
    else:
        for step in range(2):
            trainee.update(step)
        trainee.save(run_dir, 2)
    drawn = draws()
    trainee.update(2)
    stop_world()
    return trainee.everything() | drawn


def test_resuming_is_bit_identical(tmp_path: Path) -> None:
    uninterrupted = run_ranks(train_on, 2, tmp_path, False, init=False)
    resumed = run_ranks(train_on, 2, tmp_path, True, init=False)
    for found, expected in zip(resumed, uninterrupted, strict=True):
        assert_identical(found, expected)

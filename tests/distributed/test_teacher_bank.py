"""The bank: who scores what, what is stored, and what a student that is its own teacher learns (nothing)."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mopd.config import ParallelSpec, RunConfig, TeacherMemorySpec
from megatron_mopd.packing import pack, plan_microbatches
from megatron_mopd.parallel import cpu
from megatron_mopd.types import MicroBatch, Rollout, TeacherScores
from tests import tiny
from tests.distributed.full_width import status_bytes
from tests.distributed.ranks import run_ranks

cpu.install()

from megatron_mopd.teachers.copies import STAGING_BYTES  # noqa: E402


def pack_all(config: RunConfig, rollouts: Sequence[Rollout], order: Sequence[str], world) -> list[tuple]:  # type: ignore[no-untyped-def]
    """(plan, this rank's micro-batch) for every micro-batch of the step."""
    plans = plan_microbatches(
        [len(r.token_ids) for r in rollouts],
        [config.domains[r.domain].teacher for r in rollouts],
        order=order,
        ranks=world.data.size,
        max_tokens=config.optim.max_tokens_per_microbatch,
    )
    return [
        (
            plan,
            pack(
                [rollouts[i] for i in plan.members[world.data.rank]],
                plan.teacher,
                domain_names=config.domain_names,
                aggregation="sequence",
                multiple_of=world.tensor.size,
                device=world.device,
            ),
        )
        for plan in plans
    ]


def sources_of(config: RunConfig, folder: Path) -> dict:
    from megatron_mopd.student.architecture import read_architecture

    return {name: (read_architecture(folder / name), folder / name) for name in config.teachers}


def scores_by_rollout(config: RunConfig, folder: Path, rollouts: Sequence[Rollout]) -> dict:
    """prompt id -> the log-probs that the bank gave its tokens, from this rank; and the bank's memory."""
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(config.parallel, 0)
    bank = TeacherBank(config, sources_of(config, folder), world)
    packed = pack_all(config, rollouts, bank.names, world)
    scores = bank.score([batch for _, batch in packed])
    result: dict[str, list[float]] = {}
    empty = 0
    for (plan, _), score in zip(packed, scores, strict=True):
        members = plan.members[world.data.rank]
        empty += not members
        if score.logprobs is None:
            continue
        values = score.logprobs.split([int(rollouts[i].loss_mask.sum()) for i in members])
        result |= {rollouts[i].prompt.id: v.tolist() for i, v in zip(members, values, strict=True)}
    slots = list(bank._slots.values())
    frozen = all(not p.requires_grad and p.grad is None for slot in slots for p in slot.model.parameters())
    again = [bank.score([batch for _, batch in packed]) for _ in range(2)]
    same = all(equal(one, other) for later in again for one, other in zip(scores, later, strict=True))
    stop_world()
    return {"scores": result, "bytes": bank.host_bytes, "empty": empty, "frozen": frozen, "slots": len(slots),
            "same": same, "metrics": bank.take_metrics()}  # fmt: skip


def equal(one: TeacherScores, other: TeacherScores) -> bool:
    if one.logprobs is None or other.logprobs is None:
        return one.logprobs is other.logprobs
    return torch.equal(one.logprobs, other.logprobs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("student", "a", "b", "c")):
        tiny.write_model(folder / name, seed=seed)
    # a and b share their embeddings, and nothing else.
    embedding = load_file(folder / "a" / "model.safetensors")["model.embed_tokens.weight"]
    b = load_file(folder / "b" / "model.safetensors")
    save_file({**b, "model.embed_tokens.weight": embedding}, folder / "b" / "model.safetensors", {"format": "pt"})
    return folder


def reference_scores(models: Path, rollouts: Sequence[Rollout], of: str | None = None) -> dict[str, list[float]]:
    """Each rollout's own teacher, by transformers."""
    from transformers import AutoModelForCausalLM

    loaded = {name: AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in "abc"}
    result = {}
    for rollout in rollouts:
        with torch.no_grad():
            logits = loaded[rollout.domain](torch.from_numpy(rollout.token_ids)[None]).logits[0]
        logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(rollout.token_ids)[1:, None])[:, 0]
        result[rollout.prompt.id] = logprobs[torch.from_numpy(rollout.loss_mask[1:])].tolist()
    return result


@pytest.fixture(scope="module")
def shuffled() -> list[Rollout]:
    """Unevenly many of each domain, in random order, and a third of them dropped on the way."""
    rollouts = tiny.rollouts(["a"] * 20 + ["b"] * 9 + ["c"])
    random.Random(3).shuffle(rollouts)
    return [r for index, r in enumerate(rollouts) if index % 3 or r.domain == "c"]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, ParallelSpec()),
        (4, ParallelSpec(tensor=2, expert=2)),  # DP 2: the only rollout of `c` is on one of the two
        (4, ParallelSpec(pipeline=2, expert=2)),
    ],
    ids=["111", "212-dp2", "122"],
)
def test_each_rollout_is_scored_by_its_own_teacher(
    world: int, parallel: ParallelSpec, models: Path, shuffled: list[Rollout]
) -> None:
    config = tiny.run_config(models, kind="sampled", parallel=parallel, max_tokens=64)
    results = run_ranks(scores_by_rollout, world, config, models, shuffled, init=False)
    expected = reference_scores(models, shuffled)
    scores = {prompt: values for result in results for prompt, values in result["scores"].items()}
    assert scores.keys() == expected.keys()
    for prompt, values in expected.items():
        assert scores[prompt] == pytest.approx(values, abs=1e-4), prompt
    assert all(result["frozen"] for result in results)
    if world > 1:
        assert any(result["empty"] for result in results)


def test_identical_shards_are_stored_once(models: Path) -> None:
    config = tiny.run_config(models, kind="sampled")
    result = run_ranks(scores_by_rollout, 1, config, models, tiny.rollouts(["a"]), init=False)[0]
    tensors = {name: load_file(models / name / "model.safetensors") for name in "abc"}
    total = sum(t.numel() * 4 for name in "abc" for t in tensors[name].values())
    shared = tensors["a"]["model.embed_tokens.weight"].numel() * 4
    assert result["bytes"] == total - shared
    assert result["slots"] == 1


@pytest.mark.parametrize(
    ("world", "parallel", "memory"),
    [
        (1, ParallelSpec(), {"host_gb": 0.0, "buffers": 1}),
        (1, ParallelSpec(), {"host_gb": 0.0, "buffers": 2}),
        (2, ParallelSpec(tensor=2, expert=2), {"host_gb": 100e-6, "buffers": 2}),
    ],
    ids=["disk", "disk-ahead", "212-both"],
)
def test_from_disk_the_scores_are_the_same_to_the_last_bit(
    world: int, parallel: ParallelSpec, memory: dict, models: Path, shuffled: list[Rollout], tmp_path: Path
) -> None:
    in_memory = tiny.run_config(models, kind="sampled", parallel=parallel, max_tokens=64)
    spec = TeacherMemorySpec(folder=str(tmp_path), **memory)
    from_disk = dataclasses.replace(in_memory, teacher_memory=spec)
    expected = run_ranks(scores_by_rollout, world, in_memory, models, shuffled, init=False)
    found = run_ranks(scores_by_rollout, world, from_disk, models, shuffled, init=False)
    total = sum(t.numel() * 4 for name in "abc" for t in load_file(models / name / "model.safetensors").values())
    for one, other in zip(expected, found, strict=True):
        assert one["scores"] == other["scores"]
        assert one["same"] and other["same"]
        assert one["metrics"] == {}
        # Three turns of three teachers; with two buffers the first of a fourth turn is on its way, and not counted.
        metrics = other["metrics"]
        assert metrics["teacher_swap/count"] == 9
        if world == 1:
            assert (other["bytes"], metrics["teacher_swap/bytes"]) == (0, 3 * total)
        else:
            # All experts are cut in two, norms and the router not at all; some of the first teacher is in memory.
            assert 0 < other["bytes"] <= 100_000
            assert 0.5 * 3 * total - 3 * 100_000 < metrics["teacher_swap/bytes"] < 0.6 * 3 * total
        assert metrics["teacher_swap/waited_seconds"] >= 0
        assert metrics["teacher_swap/seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def resident_bytes(config: RunConfig, folder: Path, rollouts: Sequence[Rollout]) -> tuple[int, int]:
    """Peak of resident memory since before the bank was made, and what it is in the end; mapped files count."""
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(config.parallel, 0)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_bytes("VmRSS")
    bank = TeacherBank(config, sources_of(config, folder), world)
    packed = pack_all(config, rollouts, bank.names, world)
    for _ in range(2):
        bank.score([batch for _, batch in packed])
    stop_world()
    return status_bytes("VmHWM") - before, status_bytes("VmRSS") - before


def test_from_disk_the_resident_memory_does_not_grow_with_the_teachers(tmp_path: Path) -> None:
    names = tuple("abcdefghi")
    wide = {**tiny.MOE, "vocab_size": 20_011, "hidden_size": 256, "num_hidden_layers": 2}
    for seed, name in enumerate(("student", *names)):
        tiny.write_model(tmp_path / name, wide, seed=seed)
    one = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert one > 40 << 20
    in_memory = tiny.run_config(tmp_path, kind="sampled", teachers=names)
    memory = TeacherMemorySpec(host_gb=0.0, folder=str(tmp_path))
    rollouts = tiny.rollouts(names)
    host, _ = run_ranks(resident_bytes, 1, in_memory, tmp_path, rollouts, init=False)[0]
    from_disk = dataclasses.replace(in_memory, teacher_memory=memory)
    peak, after = run_ranks(resident_bytes, 1, from_disk, tmp_path, rollouts, init=False)[0]
    assert host > len(names) * one
    # The model, the file that it is loaded from, two staging buffers, and what scoring and the allocator take, which
    # differs by tens of megabytes from run to run; nine teachers in memory are 390 MB.
    assert after <= peak < 3 * one + 2 * STAGING_BYTES + (100 << 20)
    assert peak < host - 2 * one


def test_a_teacher_may_be_deeper_and_wider(models: Path, tmp_path: Path) -> None:
    for name in "ac":
        (tmp_path / name).symlink_to(models / name)
    bigger = {**tiny.MOE, "hidden_size": 64, "num_hidden_layers": 6, "num_experts": 4}
    tiny.write_model(tmp_path / "b", bigger, seed=9)
    rollouts = tiny.rollouts(["b", "a", "c", "b"])
    config = tiny.run_config(tmp_path, kind="sampled", parallel=ParallelSpec(tensor=2, expert=2))
    results = run_ranks(scores_by_rollout, 2, config, tmp_path, rollouts, init=False)
    expected = reference_scores(tmp_path, rollouts)
    assert results[0]["slots"] == 2
    for prompt, values in expected.items():
        assert results[0]["scores"][prompt] == pytest.approx(values, abs=1e-4), prompt


def self_distillation(config: RunConfig, folder: Path) -> dict:
    """One update of a student by teachers with its own weights."""
    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.student import Student
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(config.parallel, 0)
    source = folder / "student"
    arch = read_architecture(source)
    bank = TeacherBank(config, dict.fromkeys(config.teachers, (arch, source)), world)
    student = Student(config, arch, world, source)
    identical = [bank.equals(name, student.model) for name in bank.names]
    rollouts = tiny.rollouts(["a", "b", "c", "a", "a"])
    batches: list[MicroBatch] = [batch for _, batch in pack_all(config, rollouts, bank.names, world)]
    report = student.update(batches, bank.score(batches), bank.heads(), step=0)
    other = bank.equals("a", student.model)
    stop_world()
    return {"loss": report.loss, "grad_norm": report.grad_norm, "metrics": dict(report.metrics),
            "identical": identical, "after": other}  # fmt: skip


@pytest.mark.parametrize(
    ("world", "parallel", "kind"),
    [
        *(
            (1, ParallelSpec(), kind)
            for kind in ("full_vocab", "sampled", "teacher_topk", "forward_kl", "mixed", "jsd")
        ),
        *((4, ParallelSpec(tensor=2, pipeline=2), kind) for kind in ("full_vocab", "sampled", "teacher_topk")),
    ],
)
def test_a_student_that_is_its_own_teacher_learns_nothing(
    world: int, parallel: ParallelSpec, kind: str, models: Path
) -> None:
    config = tiny.run_config(models, kind=kind, parallel=parallel, max_tokens=40)
    result = run_ranks(self_distillation, world, config, models, init=False)[0]
    assert result["identical"] == [True, True, True]
    if kind == "sampled":
        assert result["metrics"]["advantage"] == 0.0
        assert result["metrics"]["reverse_kl"] == 0.0
        assert result["loss"] == 0.0
        assert result["grad_norm"] == 0.0
    else:
        assert abs(result["loss"]) < 1e-6
        assert result["grad_norm"] < 1e-6

"""Routing replay in updates: the same in every layout, with and without recomputation, and for the student alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mopd.config import ParallelSpec, RolloutSpec, RunConfig, SglangSpec
from megatron_mopd.packing import pack_step
from megatron_mopd.parallel import cpu
from megatron_mopd.types import Rollout
from tests import tiny
from tests.distributed.ranks import run_ranks

cpu.install()

DOMAINS = ["a"] * 9 + ["b"] * 5 + ["c"] * 2
LAYERS, EXPERTS, K = 4, 8, 2
LAYOUTS = {"111": 1, "212": 2, "122": 4}
"""TP, PP, EP -> world."""
WITH_CONTEXT = LAYOUTS | {"1112": 2, "2124": 8}
"""The same and context."""
SMALL = 24
"""Tokens of a micro-batch: four and more of them are in flight."""


def routed(rollouts: Sequence[Rollout], seed: int = 3) -> list[Rollout]:
    """With experts that no router chose; none for the last token, and in every third rollout for one more."""
    rng = np.random.default_rng(seed)
    result = []
    for index, rollout in enumerate(rollouts):
        length = len(rollout.token_ids)
        experts = rng.random((length, LAYERS, EXPERTS)).argsort(-1)[..., :K].astype(np.int16)
        experts[-1] = -1
        if index % 3 == 0:
            experts[length // 2] = -1
        result.append(replace(rollout, routed_experts=experts))
    return result


def run_config(folder: Path, mode: str, layout: str = "111", *, recompute: bool = False, max_tokens: int = 4096) -> Any:
    tensor, pipeline, expert, context = map(int, layout.ljust(4, "1"))
    parallel = ParallelSpec(tensor=tensor, pipeline=pipeline, expert=expert, context=context, recompute=recompute)
    # The exact KL, with importance weights: p_train is that of the replayed pass, too.
    config = tiny.run_config(folder, kind="sequence_tis", parallel=parallel, max_tokens=max_tokens)
    if mode == "R3":  # never asked: the rollouts are there already
        servers = SglangSpec(urls=("http://127.0.0.1:1",))
        return replace(config, rollout=RolloutSpec(engine="sglang", sglang=servers, routing_replay="R3"))
    return replace(config, rollout=RolloutSpec(routing_replay=mode))  # type: ignore[arg-type]


def update(config: RunConfig, folder: Path, parts: Sequence[Sequence[Rollout]]) -> dict[str, Any]:
    """One update a part, R2 recorded before the first; and whether teachers said the same before and after."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    from megatron_mopd.parallel.runtime import start_world, stop_world
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.student import Student
    from megatron_mopd.teachers.bank import TeacherBank

    world = start_world(config.parallel, config.seed)
    arch = read_architecture(folder / "student")
    bank = TeacherBank(config, {n: (read_architecture(folder / n), folder / n) for n in config.teachers}, world)
    student = Student(config, arch, world, folder / "student")
    packed = [
        pack_step(
            part,
            config,
            data_rank=world.data.rank,
            data_ranks=world.data.size,
            multiple_of=world.tensor.size,
            device=world.device,
            context_ranks=world.context.size,
            context_rank=world.context.rank,
        )
        for part in parts
    ]
    free = [bank.score([replace(batch, routed_experts=None) for batch in batches]) for batches in packed]
    if config.rollout.routing_replay == "R2":
        packed = [student.record_routing(batches) for batches in packed]
    reports = [
        student.update(batches, scores, bank.heads(), step=0) for batches, scores in zip(packed, free, strict=True)
    ]
    again = [bank.score(batches) for batches in packed]
    same = [
        (a.hidden is None and b.hidden is None) or (a.hidden is not None and torch.equal(a.hidden, b.hidden))
        for before, after in zip(free, again, strict=True)
        for a, b in zip(before, after, strict=True)
    ]
    weights = {name: tensor.clone() for name, tensor in student.hf_weights()}
    stop_world()
    return {
        "reports": reports,
        "micro_batches": len(packed[0]),
        "teachers_same": all(same) and not RouterReplay.global_router_replay_instances,
        "weights": weights if world.is_main else {},
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "a", "b", "c")):
        tiny.write_model(folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    return routed(tiny.rollouts(DOMAINS))


@pytest.fixture(scope="module")
def replayed(models: Path, rollouts: list[Rollout]) -> dict[str, Any]:
    """On one rank, all of a teacher's rollouts in one micro-batch, nothing computed twice."""
    return run_ranks(update, 1, run_config(models, "R3"), models, [rollouts], init=False)[0]


@pytest.fixture(scope="module")
def free(models: Path, rollouts: list[Rollout]) -> dict[str, Any]:
    return run_ranks(update, 1, run_config(models, "off"), models, [rollouts], init=False)[0]


def assert_close(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for report, other in zip(result["reports"], expected["reports"], strict=True):
        assert report.loss == pytest.approx(other.loss, rel=1e-5)
        assert report.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        assert report.metrics == pytest.approx(dict(other.metrics), rel=1e-4, abs=1e-6)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], tensor, rtol=0, atol=1e-5, msg=name)


def assert_identical(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for report, other in zip(result["reports"], expected["reports"], strict=True):
        assert (report.loss, report.grad_norm) == (other.loss, other.grad_norm)
    assert [n for n, tensor in expected["weights"].items() if not torch.equal(result["weights"][n], tensor)] == []


@pytest.mark.parametrize("layout", WITH_CONTEXT)
def test_replay_is_the_same_in_every_layout(
    layout: str, models: Path, rollouts: list[Rollout], replayed: dict[str, Any]
) -> None:
    """With several micro-batches in flight, and layers that are computed again in the backward pass."""
    config = run_config(models, "R3", layout, recompute=True, max_tokens=SMALL)
    results = run_ranks(update, WITH_CONTEXT[layout], config, models, [rollouts], init=False)
    assert results[0]["micro_batches"] >= 4
    assert all(result["teachers_same"] for result in results)
    assert_close(results[0], replayed)


def test_replay_is_not_what_the_routers_choose(replayed: dict[str, Any], free: dict[str, Any]) -> None:
    (report,), (other,) = replayed["reports"], free["reports"]
    assert abs(report.loss - other.loss) > 1e-3  # a hundred times what layouts may differ by
    assert abs(report.grad_norm - other.grad_norm) > 0.01
    assert abs(report.metrics["rollout_kl"] - other.metrics["rollout_kl"]) > 1e-3
    assert not any("replay" in name for name in other.metrics)


def test_rows_that_are_left_to_the_router_are_counted(replayed: dict[str, Any], rollouts: list[Rollout]) -> None:
    metrics = replayed["reports"][0].metrics
    for name in ("a", "b", "c", None):
        own = [r.routed_experts for r in rollouts if name in (r.domain, None) and r.routed_experts is not None]
        missing = np.concatenate([(experts < 0).all(-1) for experts in own]).mean()
        place = "replay_missing" if name is None else f"replay_missing/{name}"
        assert metrics[place] == pytest.approx(missing, rel=1e-12) and 0 < missing < 0.5


def test_recomputation_changes_no_bit(models: Path, rollouts: list[Rollout]) -> None:
    on, off = (
        run_ranks(
            update,
            2,
            run_config(models, "R3", "121", recompute=recompute, max_tokens=SMALL),
            models,
            [rollouts],
            init=False,
        )[0]
        for recompute in (True, False)
    )
    assert_identical(on, off)
    assert on["reports"][0].metrics == off["reports"][0].metrics


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_routers_choose_anyway_changes_no_bit(layout: str, models: Path, rollouts: list[Rollout]) -> None:
    """R2 with one update: recorded and replayed with the same weights."""
    configs = [run_config(models, mode, layout, max_tokens=SMALL) for mode in ("R2", "off")]
    results = [run_ranks(update, LAYOUTS[layout], config, models, [rollouts], init=False) for config in configs]
    assert all(result["teachers_same"] for result in results[0])
    assert_identical(results[0][0], results[1][0])
    metrics = results[0][0]["reports"][0].metrics
    assert metrics["replay_missing"] == metrics["replay_differs"] == 0


def test_rows_without_experts_are_routed_freely(models: Path, rollouts: list[Rollout], free: dict[str, Any]) -> None:
    """-1 throughout, and what is no choice of k experts: one of them twice, or one that does not exist."""
    none = np.array([[-1, -1], [5, 5], [3, EXPERTS], [-1, 2]], np.int16)
    bad = [
        replace(r, routed_experts=np.resize(none[:, None].repeat(LAYERS, 1), (len(r.token_ids), LAYERS, K)))
        for r in rollouts
    ]
    result = run_ranks(update, 1, run_config(models, "R3"), models, [bad], init=False)[0]
    assert_identical(result, free)
    assert result["reports"][0].metrics["replay_missing"] == 1
    assert "replay_differs" not in result["reports"][0].metrics


def test_r2_replays_the_weights_of_before_the_first_update(models: Path, rollouts: list[Rollout]) -> None:
    """Against R3 with what transformers' routers choose with those weights; its first update is left to the routers."""
    from tests.distributed.forced_routing import ForcedModel

    first, second = rollouts[::2], rollouts[1::2]
    initial = ForcedModel(models / "student")
    known = [replace(r, routed_experts=initial.own_experts(r)) for r in second]
    unknown = [replace(r, routed_experts=np.full_like(r.routed_experts, -1)) for r in first]
    result, expected = (
        run_ranks(update, 1, run_config(models, mode, max_tokens=SMALL), models, parts, init=False)[0]
        for mode, parts in (("R2", [first, second]), ("R3", [unknown, known]))
    )
    assert_close(
        result | {"reports": [replace(report, metrics={}) for report in result["reports"]]},
        expected | {"reports": [replace(report, metrics={}) for report in expected["reports"]]},
    )
    differs = result["reports"][1].metrics["replay_differs"]
    assert differs == expected["reports"][1].metrics["replay_differs"] and differs > 0
    plain = run_ranks(update, 1, run_config(models, "off", max_tokens=SMALL), models, [first, second], init=False)[0]
    assert plain["reports"][0].loss == result["reports"][0].loss
    assert abs(plain["reports"][1].loss - result["reports"][1].loss) > 1e-5

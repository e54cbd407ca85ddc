"""The bytes that rollout servers get, from students on real ranks in several layouts: those of a single rank."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from megatron_mopd.config import ParallelSpec
from megatron_mopd.parallel.runtime import World, start_world, stop_world
from megatron_mopd.rollout.sync.buckets import Weights, iter_buckets
from megatron_mopd.rollout.sync.push import SyncReport, sync_weights
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.student.model import build_model
from megatron_mopd.student.weight_stream import HFWeights
from megatron_mopd.student.weights import load_hf
from megatron_mopd.yaml_config import ConfigError
from tests import tiny
from tests.distributed.ranks import run_ranks

BUCKET = 20_000
"""Bytes: many tensors share one, the largest ones need their own."""


class _Recorder:
    """Rank 0's side of `sync_weights` without servers: what the buckets hold, and as many passes as it is told."""

    def __init__(self, interruptions: int = 0, problem: str | None = None):
        self.passes: list[list[tuple[list[str], str]]] = []
        self._interruptions = interruptions
        self._problem = problem

    def push(self, weights: Weights, num_updates: int, servers: object) -> SyncReport:
        self.passes.append([])
        for index, bucket in enumerate(iter_buckets(weights, BUCKET)):
            if index == 2 and self._problem:
                raise ConfigError(self._problem)
            if index == 2 and len(self.passes) <= self._interruptions:
                return self._report(interrupted=("http://two",), failed={"http://one": "died"})
            digest = hashlib.sha256(bucket.data.numpy().tobytes()).hexdigest()
            self.passes[-1].append(([entry.name for entry in bucket.entries], digest))
        return self._report(synced=("http://two",))

    def _report(self, **fields: object) -> SyncReport:
        empty: dict[str, object] = {"synced": (), "failed": {}, "interrupted": (), "num_bytes": 5, "seconds": 1.0}
        return SyncReport(**(empty | fields))  # type: ignore[arg-type]


def _stream(
    layout: tuple[int, int, int], folder: Path, interruptions: int, problem: str | None
) -> tuple[list[list[tuple[list[str], str]]], SyncReport | str]:
    """(what rank 0 recorded in every pass, the report or the error that this rank got)."""
    spec = ParallelSpec(tensor=layout[0], pipeline=layout[1], expert=layout[2])
    world: World = start_world(spec, seed=1)
    arch = read_architecture(folder)
    model = build_model(arch, spec, world, torch.float32, training=False)
    load_hf(model, arch, folder, world)
    recorder = _Recorder(interruptions, problem) if world.is_main else None
    outcome: SyncReport | str
    try:
        outcome = sync_weights(HFWeights(model, arch, world), 3, world, recorder, [])  # type: ignore[arg-type]
    except ConfigError as error:
        outcome = str(error)
    stop_world()
    return (recorder.passes if recorder else []), outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder, tiny.MOE)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[list[str], str]]:
    (((buckets,), _),) = run_ranks(_stream, 1, (1, 1, 1), folder, 0, None, init=False)
    return buckets


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (2, 2, 2)], ids=lambda layout: "".join(map(str, layout)))
def test_every_layout_sends_the_bytes_of_a_single_rank(
    layout: tuple[int, int, int], folder: Path, alone: list[tuple[list[str], str]]
) -> None:
    assert len(alone) > 10
    assert sum(len(names) for names, _ in alone) == 3 + 4 * (9 + 3 * 8)
    results = run_ranks(_stream, layout[1] * layout[0], layout, folder, 0, None, init=False)
    assert results[0][0] == [alone]
    assert all(outcome == results[0][1] for _, outcome in results)


def test_an_interrupted_pass_is_repeated_from_the_start_on_all_ranks(
    folder: Path, alone: list[tuple[list[str], str]]
) -> None:
    results = run_ranks(_stream, 2, (1, 2, 1), folder, 2, None, init=False)
    assert results[0][0] == [alone[:2], alone[:2], alone]
    expected = SyncReport(
        synced=("http://two",), failed={"http://one": "died"}, interrupted=(), num_bytes=15, seconds=3.0
    )
    assert [outcome for _, outcome in results] == [expected, expected]


def test_weights_that_can_not_be_written_are_the_same_error_on_every_rank(folder: Path) -> None:
    results = run_ranks(_stream, 2, (1, 1, 2), folder, 0, "/x: cannot write: full", init=False)
    assert [outcome for _, outcome in results] == ["/x: cannot write: full"] * 2


def test_servers_that_are_interrupted_again_and_again_are_given_up(folder: Path) -> None:
    ((passes, report),) = run_ranks(_stream, 1, (1, 1, 1), folder, 9, None, init=False)
    assert len(passes) == 4
    assert isinstance(report, SyncReport)
    assert report.failed["http://two"] == "4 updates in a row were interrupted by other servers"
    assert (report.synced, report.interrupted) == ((), ())

"""The helper that every distributed test stands on: results in order, and every failure shown."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankError, run_ranks


def _sum_of_ranks(scale: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([scale * (dist.get_rank() + 1)])
    dist.all_reduce(value)
    return dist.get_rank(), value


def test_results_come_back_in_rank_order() -> None:
    results = run_ranks(_sum_of_ranks, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert [int(value) for _, value in results] == [60, 60, 60]


def test_a_result_larger_than_a_pipe_arrives() -> None:
    results = run_ranks(lambda: torch.ones(1 << 20) * int(os.environ["RANK"]), 2, init=False)
    assert [float(result.sum()) for result in results] == [0.0, float(1 << 20)]


def test_an_exception_on_one_rank_ends_the_others_and_is_shown() -> None:
    def fail_on_one() -> None:
        if dist.get_rank() == 1:
            raise ValueError("only here")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*ValueError: only here"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - start < 20


def test_a_hang_is_killed_and_its_place_shown() -> None:
    def hang_here() -> None:
        if os.environ["RANK"] == "0":
            time.sleep(60)

    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0 of 2: no answer after 1 s(.|\n)*hang_here"):
        run_ranks(hang_here, 2, init=False, timeout=1.0)
    assert time.monotonic() - start < 10


def test_a_killed_rank_is_reported() -> None:
    with pytest.raises(RankError, match="rank 0 of 1: died without an answer"):
        run_ranks(lambda: os.kill(os.getpid(), 9), 1, init=False)

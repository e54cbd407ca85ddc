"""The cut of packed sequences over context ranks, by hand, and what packing makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_mopd.packing import pack, plan_microbatches
from megatron_mopd.token_layout import TokenLayout, held_tokens, padded_length
from tests import tiny

CPU = torch.device("cpu")


def test_the_cut_by_hand() -> None:
    """Two sequences of 8 and 4 tokens on two ranks: four chunks each, the outer two to rank 0."""
    starts = np.array([0, 8, 12])
    assert held_tokens(starts, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert held_tokens(starts, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert held_tokens(starts, 1, 0).tolist() == list(range(12))


def test_every_rank_has_as_much_causal_attention() -> None:
    starts = np.array([0, 64, 80])
    place = np.concatenate([np.arange(64), np.arange(16)])
    work = [int((place[held_tokens(starts, 4, rank)] + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1


def test_a_layout_by_hand() -> None:
    layout = TokenLayout.of([5, 2], context_ranks=2, context_rank=1)
    assert layout.starts.tolist() == [0, 8, 12]
    assert layout.longest == 8
    assert layout.tokens([np.array([1, 2, 3, 4, 5]), np.array([6, 7])]).tolist() == [3, 4, 5, 0, 7, 0]
    assert layout.positions().tolist() == [2, 3, 4, 5, 1, 2]
    rows, kept = layout.rows(np.array([1, 2, 3, 8]))
    assert rows.tolist() == [0, 1]
    assert kept.tolist() == [False, True, True, False]


def test_whatever_a_token_has_is_cut_alike() -> None:
    """For example the experts that it was sent to: [T, layers, k]."""
    experts = [np.arange(7 * 6, dtype=np.int16).reshape(7, 3, 2), np.arange(2 * 6, dtype=np.int16).reshape(2, 3, 2)]
    parts = []
    for rank in range(2):
        layout = TokenLayout.of([7, 2], context_ranks=2, context_rank=rank)
        held = layout.tokens(experts, np.int16)
        assert held.dtype == np.int16 and held.shape == (6, 3, 2)
        ids = layout.tokens([experts[0][:, 0, 0], experts[1][:, 0, 0]])
        assert held[:, 0, 0].tolist() == ids.tolist()
        parts.append(held)
    assert sum(int(part.sum()) for part in parts) == sum(int(part.sum()) for part in experts)


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("multiple_of", [1, 3, 4, 16])
@pytest.mark.parametrize("lengths", [[], [1], [5, 3, 21], [64, 64]])
def test_every_rank_holds_as_many_tokens_and_some(context: int, multiple_of: int, lengths: list[int]) -> None:
    ranks = [
        TokenLayout.of(lengths, multiple_of=multiple_of, context_ranks=context, context_rank=rank)
        for rank in range(context)
    ]
    sizes = {len(layout.held) for layout in ranks}
    assert len(sizes) == 1 and (size := sizes.pop()) > 0
    assert size % multiple_of == 0
    starts = ranks[0].starts
    assert sorted(np.concatenate([layout.held for layout in ranks])) == list(range(starts[-1]))
    assert all(length % (2 * context) == 0 for length in np.diff(starts)) or context == 1
    assert [padded_length(length, context) for length in lengths] == np.diff(starts)[: len(lengths)].tolist()


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize("context", [2, 4])
def test_context_ranks_have_the_rows_of_one_batch_among_them(aggregation: str, context: int) -> None:
    rollouts = tiny.rollouts(["a"] * 3 + ["b"] * 4, seed=53)
    assert min(len(rollout.token_ids) for rollout in rollouts) < 2 * context
    common = {"domain_names": ("a", "b"), "aggregation": aggregation, "multiple_of": 2, "device": CPU}
    whole = pack(rollouts, "t", **common)  # type: ignore[arg-type]
    parts = [
        pack(rollouts, "t", context_ranks=context, context_rank=rank, **common)  # type: ignore[arg-type]
        for rank in range(context)
    ]
    assert sum(part.num_units for part in parts) == whole.num_units
    for part in parts:
        assert part.cu_seqlens.tolist() == parts[0].cu_seqlens.tolist()
        assert len(part.token_ids) * context == part.cu_seqlens[-1]

    def described(batch) -> set[tuple]:  # type: ignore[no-untyped-def]
        """Each row with the place and the token that it predicts from."""
        columns = (
            batch.sequence_index,
            batch.position_ids[batch.rows],
            batch.token_ids[batch.rows],
            batch.targets,
            batch.weights,
            batch.rollout_logprobs,
            batch.outcome_advantages,
            batch.domain_index,
        )
        return set(zip(*(column.tolist() for column in columns), strict=True))

    assert sum(len(part.rows) for part in parts) == len(whole.rows)
    assert set.union(*(described(part) for part in parts)) == described(whole)


def test_padding_counts_as_tokens_of_a_micro_batch() -> None:
    lengths = [padded_length(3, 4)] * 10
    plans = plan_microbatches(lengths, [None] * 10, [None], 1, 40)
    assert [len(plan.members[0]) for plan in plans] == [5, 5]

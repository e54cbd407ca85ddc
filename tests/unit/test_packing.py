"""The invariants that packing promises, and one batch laid out by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mopd.config import RolloutSpec, SglangSpec
from megatron_mopd.packing import pack, pack_step, plan_microbatches
from megatron_mopd.types import Prompt, Rollout
from megatron_mopd.yaml_config import ConfigError
from tests import tiny

CPU = torch.device("cpu")


def _rollout(domain: str, prompt: list[int], response: list[int], advantage: float = 0.0) -> Rollout:
    tokens = np.array(prompt + response)
    mask = np.arange(len(tokens)) >= len(prompt)
    return Rollout(
        prompt=Prompt(id=f"{domain}/0", domain=domain, token_ids=np.array(prompt), answer="", max_response_tokens=9),
        sample=0,
        token_ids=tokens,
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -tokens / 10, 0).astype(np.float32),
        policy_version=0,
        finish_reason="stop",
        outcome_advantage=advantage,
    )


def test_the_shift_by_hand() -> None:
    first = _rollout("a", [11, 12], [13, 14, 15], advantage=2.0)
    second = _rollout("b", [21], [22], advantage=-1.0)
    batch = pack([first, second], "t", domain_names=("a", "b"), aggregation="sequence", multiple_of=4, device=CPU)
    assert batch.token_ids.tolist() == [11, 12, 13, 14, 15, 21, 22, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 8]
    assert batch.max_seqlen == 5
    # Tokens 13, 14, 15 are predicted at positions 1, 2, 3; token 22 at position 5.
    assert batch.rows.tolist() == [1, 2, 3, 5]
    assert batch.targets.tolist() == [13, 14, 15, 22]
    torch.testing.assert_close(batch.weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    assert batch.num_units == 2
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor([-1.3, -1.4, -1.5, -2.2]))
    assert batch.outcome_advantages.tolist() == [2.0, 2.0, 2.0, -1.0]
    assert batch.domain_index.tolist() == [0, 0, 0, 1]


def test_routed_experts_lie_beside_their_tokens_in_host_memory() -> None:
    """Not shifted: token t goes to row t's experts, and padding to those of its router."""
    rollouts = [
        replace(_rollout("a", [1, 2], [3]), routed_experts=np.arange(12, dtype=np.int16).reshape(3, 2, 2)),
        replace(_rollout("a", [4], [5]), routed_experts=np.array([[[7, 6], [5, 4]], [[-1, -1]] * 2], np.int16)),
    ]
    layout: Any = {"domain_names": ("a",), "aggregation": "token", "multiple_of": 4, "device": CPU}
    batch = pack(rollouts, None, **layout, with_experts=True)
    assert batch.routed_experts is not None
    assert batch.routed_experts.dtype == torch.int16
    left = [[-1, -1], [-1, -1]]
    assert batch.routed_experts.tolist() == [
        *([[k, k + 1], [k + 2, k + 3]] for k in (0, 4, 8)), [[7, 6], [5, 4]], left, left, left, left
    ]  # fmt: skip
    assert pack(rollouts, None, **layout).routed_experts is None
    assert pack([], None, **layout, with_experts=True).routed_experts is None


def test_r3_without_routed_experts_is_one_line(tmp_path: Path) -> None:
    rollouts = tiny.rollouts(["a", "b", "c"])
    rollouts[0] = replace(rollouts[0], routed_experts=np.zeros((len(rollouts[0].token_ids), 4, 2), np.int16))
    servers = RolloutSpec(engine="sglang", sglang=SglangSpec(urls=("http://h:1",)), routing_replay="R3")
    config = replace(tiny.run_config(tmp_path), rollout=servers)
    with pytest.raises(ConfigError, match=r"^rollout\.routing_replay: R3, but 2 of 3 rollouts came .* \(b/1 first\)"):
        pack_step(rollouts, config, data_rank=0, data_ranks=2, multiple_of=1, device=CPU)


def test_token_aggregation_counts_tokens() -> None:
    rollouts = [_rollout("a", [1, 2], [3, 4, 5]), _rollout("a", [1], [2])]
    batch = pack(rollouts, None, domain_names=("a",), aggregation="token", multiple_of=1, device=CPU)
    assert batch.num_units == 4
    assert batch.weights.tolist() == [1.0] * 4


def test_masked_tool_tokens_inside_a_response_are_not_trained_on() -> None:
    rollout = _rollout("a", [1, 2], [3, 4, 5])
    mask = np.array([False, False, True, False, True])
    rollout = Rollout(
        prompt=rollout.prompt,
        sample=0,
        token_ids=rollout.token_ids,
        loss_mask=mask,
        rollout_logprobs=rollout.rollout_logprobs,
        policy_version=0,
        finish_reason="stop",
    )
    batch = pack([rollout], None, domain_names=("a",), aggregation="sequence", multiple_of=1, device=CPU)
    assert batch.targets.tolist() == [3, 5]
    assert batch.rows.tolist() == [1, 3]
    assert batch.weights.tolist() == [0.5, 0.5]


def test_an_empty_micro_batch_has_tokens_to_send_and_no_rows() -> None:
    batch = pack([], "t", domain_names=("a",), aggregation="sequence", multiple_of=4, device=CPU)
    assert batch.token_ids.tolist() == [0, 0, 0, 0]
    assert batch.num_units == 0
    assert len(batch.rows) == len(batch.targets) == len(batch.weights) == 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [7, 40, 100_000])
def test_plan_invariants(ranks: int, max_tokens: int) -> None:
    rng = random.Random(ranks * max_tokens)
    lengths = [rng.randint(2, 30) for _ in range(101)]
    names = ["x", "y", "z", "unused"]
    teachers = [rng.choices(names, [100, 10, 1, 0])[0] for _ in lengths]
    plans = plan_microbatches(lengths, teachers, names, ranks, max_tokens)
    seen = sorted(index for plan in plans for members in plan.members for index in members)
    assert seen == list(range(len(lengths)))
    assert all(len(plan.members) == ranks for plan in plans)
    assert all(teachers[index] == plan.teacher for plan in plans for members in plan.members for index in members)
    order = [plan.teacher for plan in plans]
    assert order == sorted(order, key=names.index)
    for plan in plans:
        for members in plan.members:
            assert sum(lengths[index] for index in members) <= max_tokens or len(members) == 1
    if max_tokens > sum(lengths):  # one micro-batch per teacher, and ranks within one rollout of each other
        loads = [sum(lengths[i] for i in members) for members in plans[0].members]
        assert max(loads) - min(loads) <= max(lengths)


def test_a_rollout_with_uneven_arrays_is_refused() -> None:
    good = _rollout("a", [1], [2, 3])
    with pytest.raises(ValueError, match=r"a/0: token_ids, loss_mask, rollout_logprobs have lengths \(3, 2, 3\)"):
        Rollout(
            prompt=good.prompt,
            sample=0,
            token_ids=good.token_ids,
            loss_mask=good.loss_mask[1:],
            rollout_logprobs=good.rollout_logprobs,
            policy_version=0,
            finish_reason="stop",
        )


def test_plan_is_the_same_for_the_same_lengths() -> None:
    rollouts = tiny.rollouts(["a", "b"] * 10)
    lengths = [len(r.token_ids) for r in rollouts]
    teachers = [r.domain for r in rollouts]
    first = plan_microbatches(lengths, teachers, ["a", "b"], 2, 50)
    assert first == plan_microbatches(lengths, teachers, ["a", "b"], 2, 50)

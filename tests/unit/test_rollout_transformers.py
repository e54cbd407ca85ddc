"""The decoder against `transformers`: same weights, same tokens, same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mopd.rollout import decoder
from megatron_mopd.rollout.engine import Sampling
from tests.unit.rollout_reference import Reference, build, make_prompts


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    def folder(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    return {
        "moe": build(folder("moe"), moe=True, tied=False),
        "moe_tied": build(folder("moe_tied"), moe=True, tied=True, renormalised=False),
        # 18 floats are not a multiple of 16 bytes, which the grouped matmul asks for.
        "moe_odd": build(folder("moe_odd"), moe=True, tied=False, width=18),
        "dense": build(folder("dense"), moe=False, tied=False),
        "dense_tied": build(folder("dense_tied"), moe=False, tied=True),
    }


@pytest.mark.parametrize("name", ["moe", "moe_tied", "moe_odd", "dense", "dense_tied"])
@pytest.mark.parametrize(("temperature", "count"), [(1.0, 50), (0.7, 3)])  # 50 rows: grouped experts, 3: all experts
def test_logprobs_equal_transformers(
    references: dict[str, Reference], name: str, temperature: float, count: int
) -> None:
    reference = references[name]
    rollouts = reference.engine().generate(
        make_prompts(count), samples=1, sampling=Sampling(temperature=temperature), seed=3
    )
    for rollout in rollouts:
        table = reference.logprobs(rollout.token_ids, temperature)
        expected = table.gather(1, torch.from_numpy(rollout.token_ids)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(rollout.rollout_logprobs, expected * rollout.loss_mask, atol=2e-5)


@pytest.mark.parametrize("name", ["moe", "moe_tied", "moe_odd", "dense", "dense_tied"])
def test_all_logits_equal_transformers(references: dict[str, Reference], name: str) -> None:
    reference = references[name]
    engine = decoder.Decoder(reference.arch, dtype=torch.float32, device=torch.device("cpu"))
    engine.weights.load(reference.weights.items())
    prompts = [prompt.token_ids for prompt in make_prompts(12)]
    with torch.inference_mode():
        logits, cache = engine.prefill(prompts, [1] * 12, capacity=4)
        for token in (3, 14, 15):
            for prompt, row in zip(prompts, logits, strict=True):
                expected = reference.model(torch.from_numpy(prompt)[None]).logits[0, -1]
                torch.testing.assert_close(row, expected, rtol=0, atol=2e-5)
            logits = engine.decode(torch.full((12,), token), cache)
            prompts = [np.append(prompt, token) for prompt in prompts]


@pytest.mark.parametrize("name", ["moe", "moe_tied", "dense", "dense_tied"])
def test_greedy_equals_transformers_generate(references: dict[str, Reference], name: str) -> None:
    reference = references[name]
    prompts = make_prompts(6)
    for prompt, rollout in zip(
        prompts,
        reference.engine().generate(prompts, samples=1, sampling=Sampling(temperature=0.0), seed=0),
        strict=True,
    ):
        expected = reference.model.generate(
            torch.from_numpy(prompt.token_ids)[None],
            attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=prompt.max_response_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert rollout.token_ids.tolist() == expected[0].tolist()
        best = reference.logprobs(rollout.token_ids).max(dim=1).values.numpy() * rollout.loss_mask
        np.testing.assert_allclose(rollout.rollout_logprobs, best, atol=2e-5)


@pytest.mark.parametrize("name", ["moe", "moe_odd", "dense_tied"])
def test_bfloat16(references: dict[str, Reference], name: str) -> None:
    reference = references[name]
    rollouts = reference.engine(dtype=torch.bfloat16).generate(
        make_prompts(40), samples=1, sampling=Sampling(temperature=1.0), seed=0
    )
    gaps = []
    for rollout in rollouts:
        exact = reference.logprobs(rollout.token_ids).gather(1, torch.from_numpy(rollout.token_ids)[:, None])
        gaps.append((exact[:, 0].numpy() - rollout.rollout_logprobs)[rollout.loss_mask])
    assert 1e-5 < np.median(np.abs(np.concatenate(gaps))) < 0.1

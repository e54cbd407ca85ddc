"""What the in-process engine promises about batches, seeds, limits and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mopd.rollout import decoder, in_process
from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.types import Prompt, Rollout
from tests.unit.rollout_reference import VOCABULARY, Reference, build, make_prompts

MODEL = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return build(tmp_path_factory.mktemp("moe"), moe=True, tied=False)


def assert_same(actual: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one.prompt.id, one.sample, one.finish_reason) == (
            other.prompt.id,
            other.sample,
            other.finish_reason,
        )
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=2e-5)


def test_a_rollout_does_not_depend_on_its_batch(moe: Reference) -> None:
    prompts = make_prompts(40)
    options: dict[str, Any] = {"samples": 3, "sampling": MODEL, "seed": 11}
    engine = moe.engine(stop_ids=range(6))
    together = engine.generate(prompts, **options)
    assert [(r.prompt.id, r.sample) for r in together] == [(p.id, s) for p in prompts for s in range(3)]
    halves = engine.generate(prompts[:20], **options) + engine.generate(prompts[20:], **options)
    assert_same(halves, together)
    backwards = engine.generate(prompts[::-1], **options)
    assert_same(sorted(backwards, key=lambda r: (int(r.prompt.id[2:]), r.sample)), together)
    assert_same([r for prompt in prompts for r in engine.generate([prompt], **options)], together)
    assert_same(moe.engine(stop_ids=range(6), batch_size=7).generate(prompts, **options), together)
    # Same call, same numbers, bit for bit: what a resumed run relies on.
    again = engine.generate(prompts, **options)
    assert all((a.rollout_logprobs == b.rollout_logprobs).all() for a, b in zip(again, together, strict=True))


def test_samples_and_seeds_differ(moe: Reference) -> None:
    prompts = make_prompts(8, limit=1)[:1] * 1
    prompts = [Prompt(id="d/0", domain="d", token_ids=prompts[0].token_ids, answer="", max_response_tokens=12)]
    first = moe.engine().generate(prompts, samples=6, sampling=MODEL, seed=1)
    second = moe.engine().generate(prompts, samples=6, sampling=MODEL, seed=2)
    assert len({tuple(rollout.response_ids) for rollout in first + second}) == 12


def test_cache_growth_and_prefill_chunks_change_nothing(moe: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = make_prompts(20, limit=20)
    expected = moe.engine().generate(prompts, samples=2, sampling=MODEL, seed=0)
    monkeypatch.setattr(in_process, "_CACHE_CHUNK", 1)
    monkeypatch.setattr(decoder, "_PREFILL_TOKENS", 10)
    assert_same(moe.engine().generate(prompts, samples=2, sampling=MODEL, seed=0), expected)


def test_frequencies_of_the_first_token_are_the_softmax(moe: Reference) -> None:
    ids = np.array([9, 4, 33], dtype=np.int64)
    prompt = Prompt(id="d/0", domain="d", token_ids=ids, answer="", max_response_tokens=1)
    rollouts = moe.engine(batch_size=4000).generate([prompt], samples=4000, sampling=MODEL, seed=17)
    counts = np.bincount([int(r.response_ids[0]) for r in rollouts], minlength=VOCABULARY)
    expected = 4000 * moe.logprobs(np.append(ids, 0))[-1].double().exp().numpy()
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    freedom = len(wanted) - 1
    assert freedom >= 15
    # Chi-square has mean `freedom` and variance 2 * freedom.
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 3.5 * np.sqrt(2 * freedom)


def test_top_k_and_top_p_limit_the_choice(moe: Reference) -> None:
    prompts = make_prompts(30)
    for sampling, ranks in (
        (Sampling(temperature=1.0, top_k=2), 2),
        (Sampling(temperature=1.0, top_p=1e-6), 1),
    ):
        seen = set()
        for rollout in moe.engine().generate(prompts, samples=2, sampling=sampling, seed=0):
            order = moe.logprobs(rollout.token_ids).argsort(dim=1, descending=True)
            place = (order == torch.from_numpy(rollout.token_ids)[:, None]).int().argmax(dim=1)
            seen |= set(place[torch.from_numpy(rollout.loss_mask)].tolist())
        assert seen == set(range(ranks))


def test_stop_tokens_end_the_response_they_belong_to(moe: Reference) -> None:
    prompts, stops = make_prompts(60, limit=12), {2, 3, 5, 7, 11, 13}
    free = moe.engine().generate(prompts, samples=1, sampling=MODEL, seed=4)
    stopped = moe.engine(stop_ids=tuple(stops)).generate(prompts, samples=1, sampling=MODEL, seed=4)
    for whole, cut in zip(free, stopped, strict=True):
        assert whole.finish_reason == "length" and len(whole.response_ids) == whole.prompt.max_response_tokens
        hits = [index for index, token in enumerate(whole.response_ids) if token in stops]
        expected = whole.response_ids[: hits[0] + 1] if hits else whole.response_ids
        assert cut.finish_reason == ("stop" if hits else "length")
        np.testing.assert_array_equal(cut.response_ids, expected)
        assert cut.loss_mask.tolist() == [False] * len(cut.prompt.token_ids) + [True] * len(expected)
    assert {rollout.finish_reason for rollout in stopped} == {"stop", "length"}


def test_new_weights_replace_the_old_ones_in_place(moe: Reference) -> None:
    other = {name: tensor.flip(0) for name, tensor in moe.weights.items()}
    engine, prompts = moe.engine(), make_prompts(10)
    before = engine.generate(prompts, samples=1, sampling=MODEL, seed=0)
    storage = [layer.gate_up.data_ptr() for layer in engine.decoder.weights.layers]
    engine.load_weights(other.items(), version=6)
    after = engine.generate(prompts, samples=1, sampling=MODEL, seed=0)
    assert storage == [layer.gate_up.data_ptr() for layer in engine.decoder.weights.layers]
    assert {r.policy_version for r in before} == {5} and {r.policy_version for r in after} == {6}
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(after, before, strict=True))
    engine.load_weights(moe.weights.items(), version=7)
    assert_same(engine.generate(prompts, samples=1, sampling=MODEL, seed=0), before)


def test_weights_that_do_not_fit_are_named(moe: Reference) -> None:
    engine = moe.engine()
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    without = {key: tensor for key, tensor in moe.weights.items() if key != name}
    with pytest.raises(ValueError, match=f"1 weights are missing: {name}"):
        engine.load_weights(without.items(), version=1)
    with pytest.raises(ValueError, match="no weights"):
        engine.generate(make_prompts(1), samples=1, sampling=MODEL, seed=0)
    with pytest.raises(ValueError, match=r"'model\.extra' is not part of this model"):
        engine.load_weights([*moe.weights.items(), ("model.extra", torch.zeros(1))], version=1)
    with pytest.raises(ValueError, match=f"'{name}' has shape \\(16, 32\\), expected \\(32, 16\\)"):
        engine.load_weights((without | {name: moe.weights[name].T}).items(), version=1)
    with pytest.raises(ValueError, match=f"'{name}' came twice"):
        engine.load_weights([*moe.weights.items(), (name, moe.weights[name])], version=1)


def test_prompts_that_cannot_be_continued_are_named(moe: Reference) -> None:
    def refuse(length: int, limit: int, message: str, token: int = 1) -> None:
        ids = np.full(length, token, dtype=np.int64)
        prompt = Prompt(id="d/77", domain="d", token_ids=ids, answer="", max_response_tokens=limit)
        with pytest.raises(ValueError, match=f"d/77: .*{message}"):
            moe.engine().generate([*make_prompts(2), prompt], samples=1, sampling=MODEL, seed=0)

    refuse(length=57, limit=8, message="57 tokens .* 8 do not fit the model's 64 positions")
    refuse(length=0, limit=8, message="no tokens")
    refuse(length=3, limit=0, message="max_response_tokens")
    refuse(length=3, limit=2, message="vocabulary of 61", token=VOCABULARY)
    longest = Prompt(id="d/1", domain="d", token_ids=np.arange(56), answer="", max_response_tokens=8)
    (rollout,) = moe.engine().generate([longest], samples=1, sampling=MODEL, seed=0)
    assert len(rollout.token_ids) == 64


def test_callers_mistakes(moe: Reference) -> None:
    assert moe.engine().generate([], samples=2, sampling=MODEL, seed=0) == []
    with pytest.raises(ValueError, match="samples"):
        moe.engine().generate(make_prompts(1), samples=0, sampling=MODEL, seed=0)
    with pytest.raises(ValueError, match="stop_ids: 61"):
        moe.engine(stop_ids=(61,))
    with pytest.raises(ValueError, match="batch_size"):
        moe.engine(batch_size=0)

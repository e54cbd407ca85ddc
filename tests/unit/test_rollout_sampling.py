"""Counter-based random numbers, truncation and the inverse CDF against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_mopd.rollout.engine import Sampling
from megatron_mopd.rollout.sampling import draw, pick, random_bits, stream_key, truncate, uniforms

HALVES = torch.tensor([[0.125, 0.5, 0.125, 0.25]])


def test_random_bits_are_splitmix64() -> None:
    """The published outputs of SplitMix64 for the seed 1234567."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    key = torch.tensor([1234567])
    assert [int(random_bits(key, position)) % 2**64 for position in range(4)] == expected


def test_stream_key_depends_on_each_part_and_on_nothing_else() -> None:
    keys = [
        stream_key(1, "a/1", 2),
        stream_key(2, "a/1", 2),
        stream_key(1, "a/2", 2),
        stream_key(1, "a/1", 3),
    ]
    assert len(set(keys)) == 4
    # Pinned, or a resumed run would go on differently: printf '1\0002\000a/1' | b2sum -l 64
    assert keys[0] == int.from_bytes(bytes.fromhex("460cf0edf24714b2"), "little", signed=True)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_uniforms_are_uniform_and_independent_of_the_batch() -> None:
    keys = torch.tensor([stream_key(0, f"math/{index}", 0) for index in range(20_000)])
    first, second = uniforms(keys, 0), uniforms(keys, 1)
    assert first.dtype == torch.float64 and float(first.min()) >= 0 and float(first.max()) < 1
    # Mean 1/2, variance 1/12, no correlation between positions: within four standard errors.
    assert abs(float(first.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 20_000)
    assert abs(float(first.var()) - 1 / 12) < 4 * math.sqrt(1 / 180 / 20_000)
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 4 / math.sqrt(20_000)
    torch.testing.assert_close(uniforms(keys[7:9], 1), second[7:9], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [0.125, 0.5, 0.125, 0.25]),
        (1, 1.0, [0, 0.5, 0, 0]),
        (2, 1.0, [0, 0.5, 0, 0.25]),
        (3, 1.0, [0.125, 0.5, 0, 0.25]),  # a tie: the lower id stays
        (9, 1.0, [0.125, 0.5, 0.125, 0.25]),
        (0, 0.75, [0, 0.5, 0, 0.25]),  # reached exactly
        (0, 0.76, [0.125, 0.5, 0, 0.25]),
        (0, 0.01, [0, 0.5, 0, 0]),  # the most probable token always stays
        (2, 0.60, [0, 0.5, 0, 0]),  # 0.5 is two thirds of the top-2 mass
        (2, 0.70, [0, 0.5, 0, 0.25]),
    ],
)
def test_truncate_by_hand(top_k: int, top_p: float, expected: list[float]) -> None:
    assert truncate(HALVES, top_k=top_k, top_p=top_p).tolist() == [expected]


def test_pick_by_hand() -> None:
    probabilities = torch.tensor([[0.25, 0.5, 0.0, 0.25]]).expand(6, 4)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-52], dtype=torch.float64)
    assert pick(probabilities, uniform).tolist() == [0, 0, 1, 1, 3, 3]


def test_pick_never_takes_a_token_of_probability_zero() -> None:
    edge = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    # Not normalised, as after truncation; with some totals the product with the largest uniform is rounded.
    for mass in (1.0, 0.3, 1 / 3, 1 + 2.0**-52, 1e-30):
        row = torch.tensor([0.0, mass, 0.0], dtype=torch.float64)
        assert pick(row.expand(2, 3), edge).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("sampling", "token", "logprob"),
    [
        (Sampling(temperature=1.0), 2, math.log(2 / 7)),
        (Sampling(temperature=2.0), 2, 0.5 * math.log(2) - math.log(3 + math.sqrt(2))),
        (Sampling(temperature=1.0, top_k=1), 1, math.log(4 / 7)),
        (Sampling(temperature=0.0), 1, math.log(4 / 7)),
    ],
)
def test_draw_reports_the_scaled_softmax_before_truncation(sampling: Sampling, token: int, logprob: float) -> None:
    logits = torch.tensor([[0.0, math.log(4.0), math.log(2.0)]])
    drawn, reported = draw(logits, torch.tensor([0.999], dtype=torch.float64), sampling)
    assert int(drawn) == token
    assert float(reported) == pytest.approx(logprob)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
    ],
)
def test_sampling_out_of_range(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Sampling(**values)  # type: ignore[arg-type]

"""Values and gradients of all operations from hidden states on 1 to 8 gloo ranks against float64 autograd on one."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from kernels.dispatch import Implementation
from kernels.reference import TopkForm
from tests.kernels.problems import Found, Problem, expected, joined, relative_error, solve
from tests.kernels.ranks import Ranks

OPERATIONS = ("divergence", "logprob", "topk")
SIZES = (1, 2, 4, 8)
IMPLS = ("auto", "torch", "cpp")
"""auto keeps the exponentials of such small problems, torch and cpp make the logits again."""


def compare(ranks: Ranks, size: int, problem: Problem, operation: str, values: float, gradients: float) -> Found:
    got = joined(ranks.run(size, solve, problem, operation), problem)
    want = expected(problem, operation)
    assert relative_error(got.value, want.value) < values
    assert relative_error(got.entropy, want.entropy) < values
    assert relative_error(got.hidden_grad, want.hidden_grad) < gradients
    assert relative_error(got.weight_grad, want.weight_grad) < gradients
    return got


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("vocab", [32, 151, 1000])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", SIZES)
def test_float32(ranks: Ranks, size: int, impl: Implementation, vocab: int, operation: str) -> None:
    got = compare(ranks, size, Problem(vocab=vocab, seed=vocab, impl=impl), operation, 2e-6, 1e-5)
    assert got.collectives == (0 if size == 1 else 1, 0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_float64(ranks: Ranks, size: int, operation: str) -> None:
    compare(ranks, size, Problem(dtype=torch.float64), operation, 1e-13, 1e-13)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", SIZES)
def test_bfloat16(ranks: Ranks, size: int, impl: Implementation, operation: str) -> None:
    """fp32 logits from bf16 operands: what is left is the rounding of the gradients themselves."""
    compare(ranks, size, Problem(dtype=torch.bfloat16, impl=impl), operation, 2e-6, 3e-3)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("size", "rows"), [(2, 96), (4, 48), (4, 64), (4, 151), (8, 25), (8, 19)])
@pytest.mark.parametrize("impl", IMPLS)
def test_padding_and_empty_shards(ranks: Ranks, impl: Implementation, size: int, rows: int, operation: str) -> None:
    """Of 151 tokens, ranks hold e.g. 48 48 48 7, or 64 64 23 0, or all on the first."""
    got = compare(ranks, size, Problem(rows_per_rank=rows, impl=impl), operation, 2e-6, 1e-5)
    assert got.collectives == (1, 0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 9, 10])
@pytest.mark.parametrize("size", SIZES)
def test_chunks(ranks: Ranks, size: int, tokens: int, operation: str) -> None:
    problem = Problem(vocab=32, tokens=tokens, chunk_tokens=3)
    got = compare(ranks, size, problem, operation, 2e-6, 1e-5)
    assert got.collectives == (0 if size == 1 else 1, 0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("offsets", [(40.0, -40.0), (-40.0, 40.0), (40.0, 40.0)])
@pytest.mark.parametrize("size", SIZES)
def test_logit_offsets(ranks: Ranks, size: int, offsets: tuple[float, float], operation: str) -> None:
    compare(ranks, size, Problem(offsets=offsets), operation, 2e-6, 1e-5)


@pytest.mark.parametrize(
    ("noise", "low", "high", "allowed"),
    [(1e-3, 1e-7, 2e-6, 1e-3), (1e-2, 1e-5, 2e-4, 1e-4), (0.1, 1e-3, 2e-2, 1e-5), (0.5, 1e-2, 1.0, 3e-6)],
)
@pytest.mark.parametrize("vocab", [151, 1000])
@pytest.mark.parametrize("size", SIZES)
def test_small_divergence(
    ranks: Ranks, size: int, vocab: int, noise: float, low: float, high: float, allowed: float
) -> None:
    """Every row's KL, relative. fp32 log_softmax is off by 0.8 in the first case, 1e-2 in the second."""
    problem = Problem(vocab=vocab, offsets=(0.0, 3.0), noise=noise, tokens=16)
    got = joined(ranks.run(size, solve, problem, "divergence"), problem)
    want = expected(problem, "divergence")
    assert low < want.value.min() and want.value.max() < high
    assert ((got.value.double() - want.value) / want.value).abs().max() < allowed
    assert relative_error(got.hidden_grad, want.hidden_grad) < allowed
    assert relative_error(got.weight_grad, want.weight_grad) < allowed


@pytest.mark.parametrize("operation", ["logprob", "topk"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 4])
def test_temperature(ranks: Ranks, size: int, impl: Implementation, temperature: float, operation: str) -> None:
    for chunk_tokens in (None, 3):
        problem = Problem(temperature=temperature, chunk_tokens=chunk_tokens, impl=impl)
        compare(ranks, size, problem, operation, 2e-6, 1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("size", "impl"), [(1, "auto"), (1, "torch"), (8, "cpp")])
def test_a_real_vocabulary(ranks: Ranks, size: int, impl: Implementation, operation: str) -> None:
    """Eight rows: for four and fewer MKL adds up 151,936 products one by one, to 2e-5."""
    compare(ranks, size, Problem(vocab=151936, tokens=8, impl=impl), operation, 5e-6, 1e-5)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("form", ["raw", "tail", "renormalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_topk_forms(
    ranks: Ranks,
    size: int,
    impl: Implementation,
    dtype: torch.dtype,
    form: TopkForm,
    kind: Literal["reverse_kl", "forward_kl"],
) -> None:
    problem = Problem(impl=impl, dtype=dtype, form=form, kind=kind, temperature=1.3, k=9, chunk_tokens=4)
    compare(ranks, size, problem, "topk", 3e-6, 1e-5 if dtype == torch.float32 else 3e-3)

"""bf16 products with fp32 results on the CPU, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import linear_divergence, products_cpp
from kernels.output_layer import WORTH_PACKING

needs_products = pytest.mark.skipif(not products_cpp.available(), reason=str(products_cpp.reason()))

SIZES = [(1, 1, 1), (1, 2, 3), (3, 1, 2), (7, 101, 33), (64, 64, 64), (66, 95, 65), (300, 1111, 130), (513, 70, 2051)]
"""Tokens, rows, hidden size: single elements, odd ones, whole and broken tiles, more terms than one call takes."""


def matrix(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def check(got: Tensor, want: Tensor, terms: int) -> None:
    """fp32 sums of `terms` exact products of order one."""
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-7 * max(terms, 8))


@needs_products
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("tokens", "rows", "width"), SIZES)
def test_products_are_those_of_float64(tokens: int, rows: int, width: int, threads: int) -> None:
    before = torch.get_num_threads()
    x, w, d = matrix(tokens, width, seed=1), matrix(rows, width, seed=2), matrix(tokens, rows, seed=3)
    torch.set_num_threads(threads)
    try:
        check(products_cpp.nt(x, w), x.double() @ w.double().t(), width)
        check(products_cpp.nn(d, w), d.double() @ w.double(), rows)
        check(products_cpp.tn(d, x), d.double().t() @ x.double(), tokens)
    finally:
        torch.set_num_threads(before)


@needs_products
def test_strided_operands_and_results_that_are_added_to() -> None:
    wide, w = matrix(40, 200, seed=1), matrix(90, 64, seed=2)
    x = wide[:, 3:67]  # rows 200 apart, not aligned
    check(products_cpp.nt(x, w), x.double() @ w.double().t(), 64)
    check(products_cpp.nt(x, w[:, torch.arange(63, -1, -1)]), x.double() @ w.flip(1).double().t(), 64)
    check(products_cpp.nt(x.t(), w[:, :40]), x.t().double() @ w[:, :40].double().t(), 40)
    d = matrix(40, 120, seed=3)[:, 17:107]
    into = torch.ones(40, 128)
    assert products_cpp.nn(d, w, into[:, 5:69]).data_ptr() == into[:, 5:69].data_ptr()
    check(into[:, 5:69], 1 + d.double() @ w.double(), 90)
    assert bool((into[:, :5] == 1).all() and (into[:, 69:] == 1).all())  # nothing beside it is written
    into = torch.ones(90, 64)
    for _ in range(2):
        products_cpp.tn(d, x, into)
    check(into, 1 + 2 * (d.double().t() @ x.double()), 40)


@needs_products
def test_empty_products() -> None:
    nothing = torch.empty(0, 8, dtype=torch.bfloat16)
    some = matrix(3, 8, seed=1)
    assert products_cpp.nt(nothing, some).shape == (0, 3)
    assert torch.equal(products_cpp.tn(nothing, nothing), torch.zeros(8, 8))


@needs_products
def test_bad_operands_are_named() -> None:
    x, w = matrix(3, 8, seed=1), matrix(5, 8, seed=2)
    with pytest.raises(ValueError, match=r"a is \(3, 8\) torch\.float32 on cpu"):
        products_cpp.nt(x.float(), w)
    with pytest.raises(ValueError, match=r"a \(3, 8\) and b \(5, 8\) do not fit product_nn"):
        products_cpp.nn(x, w)
    with pytest.raises(ValueError, match=r"into is \(3, 5\) torch\.bfloat16: expected \[3, 8\]"):
        products_cpp.nn(matrix(3, 5, seed=1), w, torch.zeros(3, 5, dtype=torch.bfloat16))


@needs_products
@pytest.mark.parametrize("gradient", ["in_forward", "recompute"])
@pytest.mark.parametrize("noise", [2e-3, 0.02, 0.3])
def test_gradients_from_bf16_through_these_products(gradient: str, noise: float) -> None:
    """<= 0.3 % at KL of about 1e-3 and up; with several chunks and slabs, weights of zero and a main_grad."""
    tokens, rows, width = 96, 8200, 128
    assert rows * width >= WORTH_PACKING
    draw = torch.Generator().manual_seed(0)
    head = 0.3 * torch.randn(rows, width, generator=draw)
    x = torch.randn(tokens, width, generator=draw)
    teacher_head = (head + noise * torch.randn(rows, width, generator=draw)).bfloat16()
    teacher_x = (x + noise * torch.randn(tokens, width, generator=draw)).bfloat16()
    hidden, weight = (t.bfloat16().requires_grad_() for t in (x, head))
    weights = torch.rand(tokens, generator=draw) + 0.5
    weights[20:30] = 0
    main_grad = torch.full((rows, width), 2.0)
    found = linear_divergence(
        hidden,
        weight,
        teacher_x,
        teacher_head,
        weights=weights,
        chunk_tokens=40,
        gradient=gradient,
        main_grad=main_grad,
    )
    (3.0 * found.divergence.sum()).backward()
    want_x, want_w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    log_p = (want_x @ want_w.t()).log_softmax(-1)
    log_q = (teacher_x.double() @ teacher_head.double().t()).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    (3.0 * (kl * weights).sum()).backward()
    torch.testing.assert_close(found.divergence.double(), kl * weights, rtol=1e-4, atol=1e-9)
    assert hidden.grad is not None and want_x.grad is not None and want_w.grad is not None
    assert (hidden.grad.double() - want_x.grad).norm() <= 3e-3 * want_x.grad.norm()
    assert (main_grad.double() - 2.0 - want_w.grad).norm() <= 3e-3 * want_w.grad.norm()
    assert weight.grad is None

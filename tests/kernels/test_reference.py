"""The specification against numbers worked out by hand."""

from __future__ import annotations

import math

import torch

from kernels import reference

P = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log() + 3.0  # logits are free up to a constant
Q = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log() - 1.0


def test_reverse_kl() -> None:
    # 1/2 ln(2) + 1/4 ln(1) + 1/4 ln(1/2)
    assert math.isclose(reference.reverse_kl(P, Q).item(), 0.25 * math.log(2), rel_tol=1e-12)


def test_gradient_of_reverse_kl() -> None:
    logits = P.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference.reverse_kl(logits, Q).sum(), logits)
    # p_j (log p_j - log q_j - KL), in units of ln 2
    want = torch.tensor([[0.5 * (1 - 0.25), 0.25 * (0 - 0.25), 0.25 * (-1 - 0.25)]]) * math.log(2)
    torch.testing.assert_close(gradient, want.double())


def test_entropy() -> None:
    assert math.isclose(reference.entropy(P).item(), 1.5 * math.log(2), rel_tol=1e-12)
    assert math.isclose(reference.entropy(P, temperature=1e9).item(), math.log(3), rel_tol=1e-9)


def test_token_logprob() -> None:
    ids = torch.tensor([1])
    assert math.isclose(reference.token_logprob(P, ids).item(), math.log(0.25), rel_tol=1e-12)
    # at temperature 1/2 the probabilities are squared: (4, 1, 1) / 6
    assert math.isclose(reference.token_logprob(P, ids, 0.5).item(), math.log(1 / 6), rel_tol=1e-12)

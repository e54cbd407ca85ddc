"""The specification against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import Objective, reference

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


def value(kind: str, alpha: float = 0.5, beta: float = 0.5, temperature: float = 1.0) -> float:
    objective = Objective(kind, alpha, beta, temperature)  # type: ignore[arg-type]
    return reference.divergence(P, Q, objective).item()


def test_other_divergences() -> None:
    # p = 2/4 1/4 1/4, q = 1/4 1/4 2/4
    assert math.isclose(value("forward_kl"), 0.25 * math.log(2), rel_tol=1e-12)
    # Another pair, as the two KLs of the first are equal.
    z, t = (torch.tensor([each], dtype=torch.float64).log() for each in ([0.5, 0.3, 0.2], [0.25, 0.2, 0.55]))
    forward = 0.25 * math.log(0.5) + 0.2 * math.log(2 / 3) + 0.55 * math.log(0.55 / 0.2)
    backward = 0.5 * math.log(2) + 0.3 * math.log(1.5) + 0.2 * math.log(0.2 / 0.55)
    found = reference.divergence(z, t, Objective("mixed", alpha=0.3)).item()
    assert math.isclose(found, 0.3 * forward + 0.7 * backward, rel_tol=1e-12)
    # m = 1/4 q + 3/4 p = 7/16 4/16 5/16
    of_student = 0.5 * math.log(8 / 7) + 0.25 * math.log(4 / 5)
    of_teacher = 0.25 * math.log(4 / 7) + 0.5 * math.log(8 / 5)
    assert math.isclose(value("jsd", beta=0.25), 0.75 * of_student + 0.25 * of_teacher, rel_tol=1e-12)
    # at temperature 1/2: p = 4 1 1, q = 1 1 4 sixths
    assert math.isclose(value("reverse_kl", temperature=0.5), 0.5 * math.log(4), rel_tol=1e-12)


def test_excluded_tokens() -> None:
    """-inf on both sides is not there, on one it is 1e4 below the maximum; gradients are finite."""
    z = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[math.log(3.0), 0.0, -torch.inf, math.log(4.0)]], dtype=torch.float64)
    backward = reference.reverse_kl(z, t)  # p = 1/2 1/2, q = 3/8 1/8 4/8
    assert math.isclose(backward.item(), 0.5 * math.log(4 / 3) + 0.5 * math.log(4), rel_tol=1e-12)
    forward = reference.divergence(z, t, Objective("forward_kl"))
    finite = 3 / 8 * math.log(3 / 4) + 1 / 8 * math.log(1 / 4) + 4 / 8 * (math.log(1 / 2) + math.log(2) + 1e4)
    assert math.isclose(forward.item(), finite, rel_tol=1e-12)
    (gradient,) = torch.autograd.grad(forward, z)
    assert gradient[0].tolist() == pytest.approx([1 / 8, 3 / 8, 0.0, -1 / 2], abs=1e-12)  # p - q


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_topk(kind: str) -> None:
    """Support of tokens 0 and 2 of P and Q, and an unused place: p = 1/2 1/4, q = 1/4 1/2 with 1/4 left of both."""
    log_p, log_q = (torch.cat((each[:, ::2], each[:, 1:2]), 1).log_softmax(-1) for each in (P, Q))
    used = torch.tensor([[True, True, False]])
    plain = 0.25 * math.log(2)
    for form, want in (("raw", plain), ("tail", plain), ("renormalised", plain / 0.75)):
        assert math.isclose(reference.topk_divergence(log_p, log_q, kind, form, used).item(), want, rel_tol=1e-12)
    # Of token 0 alone: MOPD Eq. 5 adds q - p or p - q, outside are 1/2 of p and 3/4 of q.
    if kind == "reverse_kl":
        raw, tail = 0.5 * math.log(2) - 0.25, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    else:
        raw, tail = -0.25 * math.log(2) + 0.25, -0.25 * math.log(2) + 0.75 * math.log(3 / 2)
    only = torch.tensor([[True, False, False]])
    for form, want in (("raw", raw), ("tail", tail), ("renormalised", 0.0)):
        found = reference.topk_divergence(log_p, log_q, kind, form, only).item()
        assert math.isclose(found, want, rel_tol=1e-12, abs_tol=1e-15)


def test_statistics() -> None:
    found = reference.statistics(P, Q, torch.tensor([2]), 0.5)[:, 0].tolist()
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 6)
    want = [0.5 * math.log(4), entropy, entropy, math.log(1 / 6), math.log(2 / 3), 0.0]
    assert found == pytest.approx(want, rel=1e-12)
    assert reference.statistics(P, P, None, 1.0)[5].item() == 1.0

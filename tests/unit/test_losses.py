"""Each objective against numbers worked out by hand, gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import support, topk_divergence
from megatron_mopd import losses

WEIGHTS = torch.tensor([0.5, 0.5, 1.0])


def test_sampled_by_hand() -> None:
    student = torch.tensor([-1.0, -2.0, -9.0], requires_grad=True)
    teacher = torch.tensor([-1.5, -1.0, -1.0])
    loss = losses.sampled(student, teacher, torch.zeros(3), WEIGHTS, advantage_clip=5.0, outcome_weight=0.0)
    # A = teacher - student = -0.5, 1, 8 -> clipped to 5; loss = -A log p = -0.5, 2, 45.
    assert loss.total.item() == pytest.approx(0.5 * -0.5 + 0.5 * 2.0 + 45.0)
    loss.total.backward()
    # The advantage is a constant: d/dlogp = -weight * A.
    torch.testing.assert_close(student.grad, torch.tensor([0.25, -0.5, -5.0]))
    assert loss.rows["clip_share"].tolist() == [0.0, 0.0, 1.0]
    torch.testing.assert_close(loss.rows["reverse_kl"], torch.tensor([0.5, -1.0, -8.0]))


def test_sampled_adds_the_outcome_outside_the_clip() -> None:
    student = torch.tensor([-9.0], requires_grad=True)
    loss = losses.sampled(
        student, torch.tensor([-1.0]), torch.tensor([-2.0]), torch.ones(1), advantage_clip=5.0, outcome_weight=0.5
    )
    loss.total.backward()
    assert student.grad.item() == pytest.approx(-(5.0 + 0.5 * -2.0))
    assert loss.rows["advantage"].item() == pytest.approx(4.0)


def test_sampled_with_the_student_as_teacher_is_exactly_zero() -> None:
    student = torch.tensor([-1.0, -2.0, -9.0], requires_grad=True)
    loss = losses.sampled(
        student, student.detach().clone(), torch.zeros(3), WEIGHTS, advantage_clip=5.0, outcome_weight=0.0
    )
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert student.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -1.28 * 2, 0.0),  # above 1 + 0.28 with a good token: clipped, no gradient
        (1.5, -2.0, 3.0, 3.0),  # with a bad one: not clipped
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 0.8 * 2, 0.0),  # below 1 - 0.2 with a bad token: clipped
        (1.25, 2.0, -2.5, -2.5),  # between 1.2 and 1.28: clip-higher lets it grow
    ],
)
def test_grpo_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    student = torch.tensor([-1.0], requires_grad=True)
    rollout = torch.tensor([-1.0 - math.log(ratio)])
    result = losses.grpo(student, rollout, torch.tensor([advantage]), torch.ones(1), clip_low=0.2, clip_high=0.28)
    assert result.total.item() == pytest.approx(loss, rel=1e-6)
    result.total.backward()
    assert student.grad.item() == pytest.approx(gradient, rel=1e-6)
    assert result.rows["clip_share"].item() == float(gradient == 0.0)


def test_cross_entropy_by_hand() -> None:
    student = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss = losses.cross_entropy(student, WEIGHTS)
    assert loss.total.item() == pytest.approx(0.5 + 1.0 + 3.0)
    loss.total.backward()
    torch.testing.assert_close(student.grad, -WEIGHTS)


def test_full_vocab_weights_the_divergence() -> None:
    divergence = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    loss = losses.full_vocab(divergence, WEIGHTS)
    assert loss.total.item() == pytest.approx(0.05 + 0.1 + 0.3)
    loss.total.backward()
    torch.testing.assert_close(divergence.grad, WEIGHTS)


def test_full_vocab_reports_the_reverse_kl_whatever_is_minimised() -> None:
    divergence = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    loss = losses.full_vocab(divergence, WEIGHTS, reverse_kl=torch.tensor([1.0, 2.0, 3.0]))
    assert loss.total.item() == pytest.approx(0.05 + 0.1 + 0.3)
    assert loss.rows["reverse_kl"].tolist() == [1.0, 2.0, 3.0]
    torch.testing.assert_close(loss.rows["token_loss"], torch.tensor([0.1, 0.2, 0.3]))


def test_teacher_topk_by_hand() -> None:
    """MOPD Eq. 5 with three tokens, of which the teacher's two most likely count."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])).requires_grad_()
    top = support(None, torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3]])), 2)
    assert top.ids.tolist() == [[0, 1], [1, 2]]
    stats = topk_divergence(logits, top.ids, top.logprobs, return_stats=True)
    loss = losses.teacher_topk(
        stats.divergence,
        torch.tensor([0.5, 1.0]),
        reverse_kl=stats.reverse_kl,
        student_mass=stats.student_mass,
        teacher_mass=stats.teacher_mass,
    )
    # Token 0: 0.5 log(0.5 / 0.6) - 0.5 + 0.6; token 1 agrees; the second row agrees altogether.
    expected_loss = 0.5 * math.log(0.5 / 0.6) + 0.1
    assert loss.rows["token_loss"].tolist() == pytest.approx([expected_loss, 0.0], abs=1e-7)
    assert loss.total.item() == pytest.approx(0.5 * expected_loss, rel=1e-5)
    # One token is left: with it as the third, the reverse KL is that of the whole vocabulary.
    whole = 0.5 * math.log(0.5 / 0.6) + 0.2 * math.log(0.2 / 0.1)
    assert loss.rows["reverse_kl"].tolist() == pytest.approx([whole, 0.0], abs=1e-6)
    assert loss.rows["student_mass"].tolist() == pytest.approx([0.8, 0.9])
    assert loss.rows["teacher_mass"].tolist() == pytest.approx([0.9, 0.9])
    loss.total.backward()
    # d/dlog p of p log(p/q) - p is h = p log(p/q); through the softmax, h_j - p_j sum h.
    h = 0.5 * 0.5 * math.log(0.5 / 0.6)
    assert logits.grad is not None
    expected = torch.tensor([[h - 0.5 * h, -0.3 * h, -0.2 * h], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)


def test_sampled_gradient_is_an_unbiased_estimate_of_the_full_one() -> None:
    """E_{y~p}[-A grad log p(y)] over all y equals the gradient of KL(p || q): MOPD Eq. 1 to Eq. 4."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    student = logits.log_softmax(0)
    exact = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)[0]
    expected = losses.sampled(
        student,
        teacher,
        torch.zeros(7, dtype=torch.float64),
        student.detach().exp(),
        advantage_clip=1e9,
        outcome_weight=0.0,
    )
    sampled = torch.autograd.grad(expected.total, logits)[0]
    torch.testing.assert_close(sampled, exact)

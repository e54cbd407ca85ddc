"""Sums of parts of the vocabulary, merged: by hand, against float64 of the whole, with parts that exclude all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import Objective, reference, rows_cpp, rows_torch
from kernels.partials import Joined, combine, combine_tokens

LN2 = math.log(2.0)
Sums = Callable[..., Tensor]


def numbers(rows: list[list[float]]) -> Tensor:
    """Of one row of logits: parts of sums -> [parts, k, 1]."""
    return torch.tensor(rows, dtype=torch.float64)[:, :, None]


def test_two_parts_by_hand() -> None:
    """Student log 2, 0 | log 4; teacher 0, log 2 | log 2: e^z = 2, 1, 4, e^t = 1, 2, 2, each about its part's maximum.

    m, Z, n, F, D, A, E, B of the parts: x = 0, -l and y = -l, 0 with l = log 2; then x = y = 0.
    """
    first = [LN2, 1.5, LN2, 0.0, 0.5 * LN2, -0.5 * LN2, 0.5 * LN2, -0.5 * LN2]
    second = [2 * LN2, 1.0, LN2, 0.0, 0.0, 0.0, 0.0, 0.0]
    found = combine(numbers([first, second]))[:, 0]
    # About log 4 and log 2: x = -l, -2 l, 0 and y = -l, 0, 0.
    m, n, z, w = 2 * LN2, LN2, 0.5 + 0.25 + 1.0, 0.5 + 1.0 + 1.0
    d = 0.5 * 0.0 + 0.25 * (-2 * LN2) + 0.0
    a = 0.5 * -LN2 + 0.25 * (-2 * LN2)
    e = 0.5 * 0.0 + 1.0 * (2 * LN2)
    want = torch.tensor([m, z, n, w - z, d, a, e, -0.5 * LN2], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=1e-15, atol=1e-15)
    # p = 2/7, 1/7, 4/7 and q = 1/5, 2/5, 2/5
    p, q = torch.tensor([2.0, 1.0, 4.0]).double() / 7, torch.tensor([1.0, 2.0, 2.0]).double() / 5
    joined = Joined(found[:, None])
    assert float(joined.reverse_kl()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-14)
    assert float(joined.forward_kl()) == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-14)
    assert float(joined.student_entropy()) == pytest.approx(float(-(p * p.log()).sum()), rel=1e-14)
    assert float(joined.teacher_entropy()) == pytest.approx(float(-(q * q.log()).sum()), rel=1e-14)
    assert joined.lse()[:, 0].tolist() == pytest.approx([math.log(7.0), math.log(5.0)], rel=1e-14)
    mixed = 0.3 * joined.forward_kl() + 0.7 * joined.reverse_kl()
    assert float(joined.value(Objective("mixed", alpha=0.3))) == pytest.approx(float(mixed), rel=1e-14)


def test_statistics_come_from_the_part_that_has_them() -> None:
    """z and t of the token are sums with zeros; ids are those of the first of the largest maxima."""
    found = [(1.0, 3.0, 0.0, 0.0, 5, 6), (2.0, 3.0, 7.0, -8.0, 15, 16), (2.0, 1.0, 0.0, 0.0, 25, 26)]
    parts = [[m, 1.0, n, *[0.0] * 5, z, t, i, j] for m, n, z, t, i, j in found]
    assert combine(numbers(parts))[-4:, 0].tolist() == [7.0, -8.0, 15.0, 6.0]


def test_tokens_by_hand() -> None:
    """e^z = 3 | 1, 1 | nothing; the second part's token is the sampled one, and the first has the top."""
    third = math.log(3.0)
    parts = [[third, 1.0, 0.0, 0.0, 4.0], [0.0, 2.0, 0.0, 0.25, 8.0], [-1e30, 0.0, 0.0, 0.0, 9.0]]
    found = combine_tokens(numbers(parts), True)[:, 0].tolist()
    assert found == pytest.approx([third, 1.0 + 2.0 / 3.0, -2.0 / 3.0 * third, 0.25, 4.0], rel=1e-15)
    equal = numbers([[1.0, 1.0, 0.0, 0.0, 4.0], [1.0, 1.0, 0.0, 0.0, 8.0]])
    assert combine_tokens(equal, True)[-1].item() == 4.0  # the lowest id


def test_one_part_is_itself() -> None:
    parts = torch.rand(1, 8, 5)
    assert torch.equal(combine(parts), parts[0].double())
    assert torch.equal(combine_tokens(parts[:, :5], True), parts[0, :5].double())


def sums(function: Sums, student: Tensor, teacher: Tensor, shards: int) -> Tensor:
    pairs = zip(student.tensor_split(shards, 1), teacher.tensor_split(shards, 1), strict=True)
    return torch.stack([function(z, t, both=True) for z, t in pairs])


def excluded(side: str) -> tuple[Tensor, Tensor]:
    """Two rows of 96 logits in eight shards; all shards but the third are excluded by the student, the teacher, both,
    or the last four by one and the first two by the other."""
    draw = torch.Generator().manual_seed(3)
    student, teacher = (2.0 * torch.randn(2, 96, generator=draw, dtype=torch.float64) + 30.0 for _ in range(2))
    outside = torch.ones(96, dtype=torch.bool)
    outside[24:36] = False
    if side == "apart":
        student[:, 48:], teacher[:, :24] = -torch.inf, -torch.inf
    for name, logits in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            logits[:, outside] = -torch.inf
    return student, teacher


@pytest.mark.parametrize("side", ["student", "teacher", "both", "apart"])
@pytest.mark.parametrize(("function", "dtype"), [(rows_torch.divergence_sums, torch.float64),
                                                 (rows_torch.divergence_sums, torch.float32),
                                                 (rows_cpp.divergence_sums, torch.float32)])  # fmt: skip
def test_shards_that_exclude_all_their_tokens(function: Sums, dtype: torch.dtype, side: str) -> None:
    """Finite and exact: 1e4 below the row's maximum, as in the reference; where only one side excludes tokens, its
    value is so large that the shard's own maximum, some units higher or lower, is in the fourth digit."""
    student, teacher = (each.to(dtype) for each in excluded(side))
    joined = Joined(combine(sums(function, student, teacher, 8)))
    assert joined.sums.isfinite().all()
    z, t = student.double().requires_grad_(), teacher.double()
    rough, exact = 1e-3, 1e-12 if dtype == torch.float64 else 3e-6
    for kind, hidden_by in (("reverse_kl", "teacher"), ("forward_kl", "student")):
        want = reference.divergence(z, t, Objective(kind))  # type: ignore[arg-type]
        got = joined.value(Objective(kind))  # type: ignore[arg-type]
        one_sided = side in (hidden_by, "apart")
        assert bool((want > 1e3).all()) == one_sided
        assert ((got - want).abs() <= (rough if one_sided else exact) * want).all(), (kind, got, want)
        (gradient,) = torch.autograd.grad(want.sum(), z)
        rows = joined.gradient_rows(Objective(kind), torch.ones(2)).to(dtype)  # type: ignore[arg-type]
        found = rows_torch.divergence_gradient(student, teacher, rows, torch.empty_like(student))
        assert (found - gradient).norm() <= (3e-3 if one_sided else 10 * exact) * gradient.norm()
    assert (joined.student_entropy() - reference.entropy(student.double())).abs().max() < 10 * exact
    assert (joined.teacher_entropy() - reference.entropy(teacher.double())).abs().max() < 10 * exact
    lse = torch.stack((student.double().logsumexp(-1), teacher.double().logsumexp(-1)))
    assert (joined.lse() - lse).abs().max() < 10 * exact


def test_maxima_far_apart() -> None:
    """A shard of finite logits further down than the floor counts as if it were excluded."""
    student = torch.tensor([[0.0, 1.0, -5e4, -5e4]]).double()
    teacher = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).double()
    got = Joined(combine(sums(rows_torch.divergence_sums, student, teacher, 2))).forward_kl()
    want = reference.divergence(student, teacher, Objective("forward_kl"))
    assert float(got) == pytest.approx(float(want), rel=1e-12)
    assert 4e3 < float(want) < 6e3

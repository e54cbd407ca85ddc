"""Run by `test_rows_triton.py` under TRITON_INTERPRET=1: logits of -inf and NaN in the Triton row primitives."""

from __future__ import annotations

import pytest
import torch

from kernels import Objective, reference, rows_torch, rows_triton
from kernels.partials import Joined, combine
from tests.kernels.triton_interpreted import WIDE, entropy, error, gradient_rows, kl, logits, merged

COLUMNS = 4096 + 40
"""One unmasked tile, and columns behind it."""


@pytest.mark.parametrize("columns", [151, WIDE])
def test_masked_logits(columns: int) -> None:
    student, teacher = logits(4, columns, 0.5)
    student[0, 5:90] = teacher[0, 5:90] = -torch.inf
    student[1, 3:60] = -torch.inf
    student[2, :-1] = teacher[2, :-1] = -torch.inf
    found = merged([rows_triton.divergence_sums(student, teacher, both=True)])
    want = kl(student, teacher)
    assert ((found["reverse"] - want).abs() <= 1e-5 * want + 1e-7).all(), (found["reverse"], want)
    assert error(found["entropy"][[0, 1, 3]], entropy(student)[[0, 1, 3]]) < 2e-6
    forward = reference.divergence(student.double(), teacher.double(), Objective("forward_kl"))
    assert forward[1] > 5  # the teacher likes what is impossible for the student
    assert ((found["forward"] - forward).abs() <= 1e-3 * forward + 1e-6).all(), (found["forward"], forward)
    rows = gradient_rows(student, teacher, "reverse")
    out = rows_triton.divergence_gradient(student, teacher, rows, torch.empty_like(student))
    p, q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    exact = torch.nan_to_num(p.exp() * (p - q - want[:, None]))
    assert out.isfinite().all()
    assert error(out[[0, 1, 3]], exact[[0, 1, 3]]) < 1e-5
    assert out[2].abs().max() < 1e-6
    sums = rows_triton.token_sums(student, torch.tensor([0, 0, columns - 1, 1]), torch.ones(4, dtype=torch.bool))
    lse = sums[0] + sums[1].log()
    assert error(lse, student.double().logsumexp(-1)) < 1e-6
    assert error((lse - sums[0] - sums[2] / sums[1])[[0, 1, 3]], entropy(student)[[0, 1, 3]]) < 2e-6


@pytest.mark.parametrize(
    ("columns", "dtype"), [(151, torch.bfloat16), (COLUMNS, torch.float32), (COLUMNS, torch.bfloat16)]
)
def test_impossible_on_one_side(monkeypatch: pytest.MonkeyPatch, columns: int, dtype: torch.dtype) -> None:
    """-inf counts as 1e4 below the maximum of what is looked at, by whom and in how many pieces it may be: rows
    where the teacher excludes, the student, both by turns, most lanes, all but one shard."""
    monkeypatch.setattr(rows_triton, "_split", lambda count, columns, logits: (-(-columns // 4096), 4096))
    student, teacher = (each.to(dtype) for each in logits(5, columns, 0.5, (5.0, -5.0)))
    teacher[0, 3::5] = student[1, 3::5] = -torch.inf
    student[2, ::3] = teacher[2, 1::3] = -torch.inf
    student[3, 3 * columns // 4 :], teacher[3, : columns // 2] = -torch.inf, -torch.inf
    student[4, : columns // 2] = teacher[4, : columns // 2] = -torch.inf
    z, t = student.double().requires_grad_(), teacher.double()
    for cuts in ([columns], [columns // 2, columns - columns // 2]):
        pairs = zip(student.split(cuts, 1), teacher.split(cuts, 1), strict=True)
        sums = torch.stack([rows_triton.divergence_sums(*pair, both=True) for pair in pairs])
        assert sums.isfinite().all()
        joined = Joined(combine(sums))
        for kind in ("reverse_kl", "forward_kl"):
            want = reference.divergence(z, t, Objective(kind))
            assert (want > 100).sum() >= 2
            got = joined.value(Objective(kind))
            assert ((got - want).abs() <= 2e-3 * want + 1e-6).all(), (kind, got, want)
            (gradient,) = torch.autograd.grad(want.sum(), z)
            rows = joined.gradient_rows(Objective(kind), torch.ones(5)).float()
            out = rows_triton.divergence_gradient(student, teacher, rows, torch.empty(5, columns))
            exact = rows_torch.divergence_gradient(student, teacher, rows, torch.empty(5, columns))
            assert error(out, exact) < 1e-6
            # Where much is excluded, the mean that is taken off p (x - y) depends on the parts as the value does.
            allowed = torch.where(want > 1, 2e-3 * want.detach(), 1e-5 * gradient.norm(dim=-1))
            assert ((out - gradient).norm(dim=-1) <= allowed + 1e-8).all()
        assert error(joined.student_entropy(), entropy(student)) < 2e-6
        assert error(joined.teacher_entropy(), entropy(teacher)) < 2e-6


@pytest.mark.parametrize(("dtype", "of_student", "of_teacher"), [(torch.float32, 700, 4100), (torch.bfloat16, 4100, 0)])
def test_nan_is_its_row_s_alone(dtype: torch.dtype, of_student: int, of_teacher: int) -> None:
    """In the loop and behind it: NaN in every sum that a value is made of, and in the whole gradient; rows of the same
    launch as if it were not there. Row 1 has the student's, row 3 the teacher's, row 4 is masked besides."""
    student, teacher = (each.to(dtype) for each in logits(5, COLUMNS, 0.5))
    student[4, 5:70] = -torch.inf
    clean = rows_triton.divergence_sums(student, teacher, both=True)
    student[1, of_student] = teacher[3, of_teacher] = torch.nan
    sums = rows_triton.divergence_sums(student, teacher, both=True)
    assert torch.equal(sums[:, ::2], clean[:, ::2])
    joined = Joined(sums.double())
    for kind in ("reverse_kl", "forward_kl"):
        value = joined.value(Objective(kind))
        assert value.isnan().tolist() == [False, True, False, True, False]
        rows = joined.gradient_rows(Objective(kind), torch.ones(5)).float()
        out = rows_triton.divergence_gradient(student, teacher, rows, torch.empty(5, COLUMNS))
        assert out[1].isnan().all() and out[3].isnan().all() and out[::2].isfinite().all()
    lse = joined.lse().float()
    pair = rows_triton.jsd_sums(student, teacher, lse, 0.3)
    assert (0.3 * pair[1] + 0.7 * pair[0]).isnan().tolist() == [False, True, False, True, False]
    rows = torch.cat((lse, pair[:1] + 0.0 * pair[1:], torch.ones(1, 5)))  # as `sweep.jsd`
    out = rows_triton.jsd_gradient(student, teacher, rows, 0.3, torch.empty(5, COLUMNS))
    assert out[1].isnan().all() and out[3].isnan().all() and out[::2].isfinite().all()
    ids, owned = torch.arange(5), torch.ones(5, dtype=torch.bool)
    token = rows_triton.token_sums(student, ids, owned)
    assert token[1].isnan().tolist() == [False, True, False, False, False]
    rows = torch.stack((token[0], -1.0 / token[1], torch.ones(5)))
    out = rows_triton.token_gradient(student, ids, owned, rows, torch.empty(5, COLUMNS))
    assert out[1].isnan().all() and out[[0, 2, 3, 4]].isfinite().all()


def test_shard_without_a_possible_token() -> None:
    nothing = torch.full((2, WIDE), -torch.inf)
    sums = rows_triton.divergence_sums(nothing, nothing, both=True)
    assert torch.equal(sums[[0, 2]], torch.full((2, 2), -1e30))
    assert not sums[[1, 3, 4, 5, 6, 7]].any()

"""The C++ row primitives where inputs are unusual: masked, strided, empty, NaN, or wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import rows_cpp
from tests.kernels.test_rows_cpp import (
    DTYPES,
    error,
    gradient_rows,
    instruction_set,
    kl,
    logits,
    pytestmark,
    want_gradient,
    want_sums,
)  # fmt: skip

__all__ = ["instruction_set", "pytestmark"]  # a fixture and a mark, used by being here
MASKED = -math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [40, 1000])
def test_masked_on_both_sides(columns: int, dtype: torch.dtype) -> None:
    """As if the masked columns were not there, and their gradient is exactly zero."""
    student, teacher = logits(4, columns, dtype)
    hidden = torch.arange(columns) % 3 == 0
    hidden[: columns // 2] = True  # the first lanes see nothing at all for a while
    student[:, hidden] = teacher[:, hidden] = MASKED
    got = rows_cpp.divergence_sums(student, teacher, both=True)
    want = want_sums(student[:, ~hidden], teacher[:, ~hidden])
    assert max(error(got[k], want[k]) for k in range(8)) < 1e-6
    rows = gradient_rows(student, teacher)
    gradient = rows_cpp.divergence_gradient(student, teacher, rows, torch.empty(4, columns))
    assert error(gradient[:, ~hidden], want_gradient(student, teacher, rows)[:, ~hidden]) < 5e-7
    assert not gradient[:, hidden].any()
    lse = torch.stack((student.double().logsumexp(-1), teacher.double().logsumexp(-1))).float()
    unmasked = rows_cpp.jsd_sums(student[:, ~hidden], teacher[:, ~hidden], lse, 0.3)
    torch.testing.assert_close(rows_cpp.jsd_sums(student, teacher, lse, 0.3), unmasked, rtol=1e-5, atol=1e-7)
    rows = torch.cat((lse, torch.ones(2, 4)))
    assert not rows_cpp.jsd_gradient(student, teacher, rows, 0.3, torch.empty(4, columns))[:, hidden].any()
    ids, owned = torch.full((4,), columns - 2), torch.ones(4, dtype=torch.bool)
    tokens = rows_cpp.token_sums(student, ids, owned)
    assert max(error(tokens[k], want[j]) for k, j in ((0, 0), (1, 1), (2, 5))) < 1e-6
    assert not rows_cpp.token_gradient(student, ids * 0, ~owned, tokens[:3], torch.empty(4, columns))[:, hidden].any()


def test_masked_on_one_side() -> None:
    """Impossible for the student: nothing to reverse KL. Impossible for the teacher: a divergence of 1e4 p."""
    student, teacher = logits(3, 500)
    student[:, ::2] = MASKED
    got, want = rows_cpp.divergence_sums(student, teacher, both=True), want_sums(student, teacher)
    assert max(error(got[k], want[k]) for k in (0, 1, 2, 3, 4, 5, 7)) < 1e-6
    assert error(got[6], want[6]) < 2e-3  # 1e4 below the maximum of a lane at the time, not of the row
    exact = torch.nn.functional.kl_div(
        teacher.double().log_softmax(-1)[:, 1::2], student.double().log_softmax(-1)[:, 1::2],
        reduction="none", log_target=True,
    ).sum(-1)  # fmt: skip
    assert error(kl(got), exact) < 1e-6
    swapped, want = rows_cpp.divergence_sums(teacher, student, both=True), want_sums(teacher, student)
    assert max(error(swapped[k], want[k]) for k in (0, 1, 2, 3, 5, 6, 7)) < 1e-6
    assert error(swapped[4], want[4]) < 2e-3
    excluded = teacher.double().softmax(-1)[:, ::2].sum(-1)
    assert error(kl(swapped), 1e4 * excluded) < 5e-3


def test_far_apart() -> None:
    """The student's favourite is e^-90 for the teacher and the other way round: nothing overflows."""
    student, teacher = torch.zeros(2, 64), torch.zeros(2, 64)
    student[0, 5], teacher[0, 40] = 90.0, 90.0
    student[1, 5], teacher[1, 40] = 1000.0, 1000.0
    got, want = rows_cpp.divergence_sums(student, teacher, both=True), want_sums(student, teacher)
    assert torch.isfinite(got).all()
    assert error(got[4], want[4]) < 1e-6 and error(got[6], want[6]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    """A window of columns, every other row, transposed, every other column, one row for all."""
    student, teacher = logits(12, 300, dtype)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[:, 17:131], lambda t: t[::2, 5:], lambda t: t.t(), lambda t: t[:, ::2],
        lambda t: t[3:4].expand(5, -1),
    ]  # fmt: skip
    for view in views:
        s, t = view(student), view(teacher)
        sums = rows_cpp.divergence_sums(s.contiguous(), t.contiguous(), both=True)
        assert torch.equal(rows_cpp.divergence_sums(s, t, both=True), sums)
        rows = gradient_rows(s, t)
        want = rows_cpp.divergence_gradient(s.contiguous(), t.contiguous(), rows, torch.empty(s.shape))
        around = torch.full((12, 300), 7.0)
        out = around.t() if s.shape == (300, 12) else around[: s.shape[0], 1 : 1 + s.shape[1]]
        if s.shape[1] < 300:
            rows_cpp.divergence_gradient(s, t, rows, out)
            assert torch.equal(out, want)
            assert (around == 7.0).sum() >= around.numel() - out.numel()
        token_rows = torch.stack((sums[0], sums[1], sums[1]))
        ids, owned = torch.zeros(2 * len(s), dtype=torch.int32)[::2], torch.ones(len(s), dtype=torch.bool)
        got = rows_cpp.token_gradient(s, ids, owned, token_rows, torch.empty(s.shape))
        assert torch.equal(got, rows_cpp.token_gradient(s.contiguous(), ids, owned, token_rows, torch.empty(s.shape)))


@pytest.mark.parametrize(("count", "columns"), [(0, 50), (1, 50), (3, 0), (1, 1)])
def test_no_or_one(count: int, columns: int) -> None:
    student, teacher = logits(count, columns)
    got = rows_cpp.divergence_sums(student, teacher, both=True)
    assert got.shape == (8, count)
    if columns:
        torch.testing.assert_close(got.double(), want_sums(student, teacher), rtol=1e-6, atol=1e-9)
    else:
        assert (got[[0, 2]] == -1e30).all() and not got[[1, 3, 4, 5, 6, 7]].any()
    assert rows_cpp.divergence_gradient(student, teacher, torch.ones(5, count), student) is student
    assert rows_cpp.jsd_sums(student, teacher, torch.ones(2, count), 0.5).shape == (2, count)
    none = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
    assert rows_cpp.token_sums(student, *none).shape == (4, count)
    assert rows_cpp.token_gradient(student, *none, torch.ones(3, count), student) is student


def test_nan_is_not_hidden() -> None:
    for side in (0, 1):
        pair = logits(2, 100)
        pair[side][1, 33] = math.nan
        sums = rows_cpp.divergence_sums(*pair, both=True)
        assert torch.isfinite(sums[:, 0]).all() and torch.isnan(sums[4, 1])
        gradient = rows_cpp.divergence_gradient(*pair, torch.ones(5, 2), torch.empty(2, 100, dtype=torch.bfloat16))
        assert gradient.isnan().nonzero().tolist() == [[1, 33]]


def test_threads_change_nothing() -> None:
    student, teacher = logits(9, 500)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            sums = rows_cpp.divergence_sums(student, teacher, both=True)
            found.append((sums, rows_cpp.divergence_gradient(student, teacher, sums[:5], torch.empty(9, 500))))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_overwriting_is_noticed() -> None:
    leaf = torch.zeros(1, 8, requires_grad=True)
    kept = leaf * 2.0
    loss = (kept * kept).sum()  # saves `kept`
    rows_cpp.divergence_gradient(kept.detach(), torch.zeros(1, 8), torch.ones(5, 1), kept.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


S, IDS, YES = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows_cpp.divergence_sums(S.double(), S.double(), both=True), r"\(2, 5\) torch.float64 on cpu: exp"),
        (lambda: rows_cpp.divergence_sums(S[0], S[0], both=True), r"logits are \(5,\)"),
        (lambda: rows_cpp.divergence_sums(S, S[:, :4], both=True), r"\(2, 5\) torch.float32 .* logits \(2, 4\)"),
        (lambda: rows_cpp.divergence_sums(S, S.bfloat16(), both=True), "teacher logits .* torch.bfloat16"),
        (lambda: rows_cpp.divergence_sums(S.to("meta"), S.to("meta"), both=True), "on meta: expected"),
        (lambda: rows_cpp.divergence_gradient(S, S, torch.ones(4, 2), S), r"rows are \(4, 2\) .*expected \(5, 2\)"),
        (lambda: rows_cpp.divergence_gradient(S, S, torch.ones(5, 2), S[:1]), r"out is \(1, 5\)"),
        (lambda: rows_cpp.divergence_gradient(S, S, torch.ones(5, 2), S.half()), "out is .* torch.float16"),
        (lambda: rows_cpp.jsd_sums(S, S, torch.ones(2, 2), 1.0), "beta must lie between 0 and 1, got 1.0"),
        (lambda: rows_cpp.token_sums(S, IDS + 5, YES), "token 5 is outside the shard of 5"),
        (lambda: rows_cpp.token_sums(S, IDS - 1, YES), "token -1 is outside"),
        (lambda: rows_cpp.token_sums(S, IDS[:1], YES), r"ids are \(1,\)"),
        (lambda: rows_cpp.token_sums(S, IDS, IDS), "owned of torch.bool"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""The torch row primitives against their definitions in float64, block by block and all at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import rows_torch
from tests.kernels.test_rows_cpp import error, gradient_rows, kl, want_gradient, want_jsd, want_sums

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(7, 151), (3, 1000), (1, 3), (5, 1)]


@pytest.fixture(params=[1 << 19, 300], autouse=True)
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """One block, and one of a row or two."""
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", request.param)
    return request.param


def logits(shape: tuple[int, int], dtype: torch.dtype, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Far from 0 and from one another."""
    draw = torch.Generator().manual_seed(shape[1])
    student = 3.0 * torch.randn(*shape, generator=draw, dtype=torch.float64)
    teacher = student + noise * torch.randn(*shape, generator=draw, dtype=torch.float64) - 40.0
    return (student + 40.0).to(dtype), teacher.to(dtype)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-13 if dtype == torch.float64 else 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_sums(shape: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher = logits(shape, dtype)
    before = student.clone(), teacher.clone()
    got, want = rows_torch.divergence_sums(student, teacher, both=True), want_sums(student, teacher)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got[[0, 2]].double(), want[[0, 2]])
    for k in (1, 3, 4, 5, 6, 7):
        assert (got[k] - want[k]).norm() <= tolerance(dtype) * want[k].norm(), k
    assert torch.equal(rows_torch.divergence_sums(student, teacher, both=False), got[:6])
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1, 1.0, 6.0])
def test_no_cancellation(noise: float) -> None:
    student, teacher = logits((8, 1000), torch.float32, noise)
    teacher = student + noise * torch.randn(8, 1000, generator=torch.Generator().manual_seed(2))
    want = kl(want_sums(student, teacher))
    got = kl(rows_torch.divergence_sums(student, teacher, both=False))
    assert ((got - want) / want).abs().max() < 1e-6 + 1e-6 / noise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [(0.7, -0.2, 0.0), (0.0, -0.2, 0.3), (0.7, -0.2, 0.3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_divergence_gradient(shape: tuple[int, int], factors: tuple[float, float, float], dtype: torch.dtype) -> None:
    student, teacher = logits(shape, dtype)
    rows = gradient_rows(student, teacher, *factors)
    rows = rows.double() if dtype == torch.float64 else rows
    want = want_gradient(student, teacher, rows)
    out = torch.full(shape, torch.nan, dtype=rows.dtype)
    assert rows_torch.divergence_gradient(student, teacher, rows, out) is out
    assert error(out, want) < tolerance(dtype)
    in_place = student.clone()
    rows_torch.divergence_gradient(in_place, teacher, rows, in_place)
    assert torch.equal(in_place, out.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [1e-2, 0.5, 5.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd(beta: float, noise: float, dtype: torch.dtype) -> None:
    student, teacher = logits((6, 151), dtype, noise)
    student[1, 5:9] = teacher[2, 7:30] = student[3, :20] = teacher[3, :20] = -torch.inf
    p, of_student, of_teacher = want_jsd(student, teacher, beta)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.stack((student.double().logsumexp(-1), teacher.double().logsumexp(-1)))
    got = rows_torch.jsd_sums(student, teacher, lse.to(kind), beta)
    # fp32 normalisers of 40 and more are off by 2e-6, which K_P and K_Q inherit
    assert (torch.stack((of_student.sum(-1), of_teacher.sum(-1))) - got).abs().max() < (
        1e-12 if kind == torch.float64 else 5e-6
    )
    mean, factor = of_student.sum(-1), torch.linspace(0.5, 1.5, 6).double()
    want = factor[:, None] * (1 - beta) * (of_student - p * mean[:, None])
    rows = torch.cat((lse, torch.stack((mean, factor)))).to(kind)
    out = rows_torch.jsd_gradient(student, teacher, rows, beta, torch.full_like(student, torch.nan, dtype=kind))
    assert error(out, want) < (1e-10 if kind == torch.float64 else 5e-6 + 5e-6 / noise)
    assert not out[student == -torch.inf].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_token(shape: tuple[int, int], dtype: torch.dtype) -> None:
    student, _ = logits(shape, dtype)
    count, columns = shape
    ids, owned = torch.arange(count) * 7919 % columns, torch.arange(count) % 3 != 2
    got, want = rows_torch.token_sums(student, ids, owned), want_sums(student, student)
    assert error(got[:3], want[[0, 1, 5]]) < tolerance(dtype)
    assert torch.equal(got[3], student.to(got.dtype).gather(1, ids[:, None])[:, 0] * owned)
    rows = torch.stack((got[0], -torch.linspace(0.1, 1.0, count), torch.linspace(1.0, 0.2, count))).to(got.dtype)
    gradient = (student.double() - rows[0, :, None]).exp() * rows[1, :, None]
    gradient.scatter_add_(1, ids[:, None], (rows[2] * owned).double()[:, None])
    out = rows_torch.token_gradient(student, ids, owned, rows, torch.empty(shape, dtype=got.dtype))
    assert error(out, gradient) < tolerance(dtype)
    in_place = student.clone()
    rows_torch.token_gradient(in_place, ids, owned, rows, in_place)
    assert torch.equal(in_place, out.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked(dtype: torch.dtype) -> None:
    """On both sides: as if the columns were not there. On one: 1e4 below the maximum."""
    student, teacher = logits((6, 151), dtype)
    hidden = torch.arange(151) % 3 == 0
    student[:, hidden] = teacher[:, hidden] = -torch.inf
    student[0, 1::3] = -torch.inf
    teacher[1, 1::3] = -torch.inf
    want = want_sums(student[:, ~hidden], teacher[:, ~hidden])
    got = rows_torch.divergence_sums(student, teacher, both=True)
    assert max(error(got[k], want[k]) for k in range(8)) < 1e-6
    rows = gradient_rows(student, teacher)
    gradient = rows_torch.divergence_gradient(student, teacher, rows, torch.empty(6, 151))
    assert error(gradient, want_gradient(student, teacher, rows)) < 1e-6
    assert not gradient[:, hidden].any()


def test_strided() -> None:
    wide = [each.contiguous() for each in logits((12, 300), torch.float32)]
    for cut in (lambda z: z[:, 17:131], lambda z: z[::2, 5:], lambda z: z.t(), lambda z: z[3:4].expand(5, -1)):
        student, teacher = map(cut, wide)
        straight = student.contiguous(), teacher.contiguous()
        sums = rows_torch.divergence_sums(student, teacher, both=True)
        torch.testing.assert_close(sums, rows_torch.divergence_sums(*straight, both=True), rtol=1e-5, atol=1e-5)
        rows = gradient_rows(student, teacher)
        around = torch.full((400, 400), 7.0)
        out = around[1 : 1 + len(student), 2 : 2 + student.shape[1]]
        rows_torch.divergence_gradient(student, teacher, rows, out)
        assert torch.equal(out, rows_torch.divergence_gradient(*straight, rows, torch.empty(student.shape)))
        assert (around == 7.0).sum() == around.numel() - out.numel()


@pytest.mark.parametrize(("count", "columns"), [(0, 50), (3, 0), (0, 0)])
def test_nothing(count: int, columns: int) -> None:
    z = torch.zeros(count, columns)
    sums = rows_torch.divergence_sums(z, z, both=True)
    assert sums.shape == (8, count) and (
        columns or ((sums[[0, 2]] == -1e30).all() and not sums[[1, 3, 4, 5, 6, 7]].any())
    )
    assert rows_torch.divergence_gradient(z, z, torch.ones(5, count), z) is z
    assert rows_torch.jsd_sums(z, z, torch.ones(2, count), 0.5).tolist() == [[0.0] * count] * 2
    assert rows_torch.jsd_gradient(z, z, torch.ones(4, count), 0.5, z) is z
    none = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
    tokens = rows_torch.token_sums(z, *none)
    assert tokens.shape == (4, count) and (columns or (tokens[0] == -1e30).all())
    assert rows_torch.token_gradient(z, *none, torch.ones(3, count), z) is z

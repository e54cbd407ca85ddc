"""The C++ row primitives against their definitions in float64, in every instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import build_cpp, rows_cpp

pytestmark = pytest.mark.skipif(not rows_cpp.available(), reason=str(rows_cpp.reason()))
DTYPES = (torch.float32, torch.bfloat16)
LOWEST = -1e4


@pytest.fixture(params=build_cpp.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(rows_cpp, "instruction_sets", lambda: (request.param,))
    return request.param


def logits(
    count: int, columns: int, dtype: torch.dtype = torch.float32, noise: float = 0.5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student = 3.0 * torch.randn(count, columns, generator=draw)
    teacher = student + noise * torch.randn(count, columns, generator=draw)
    return student.to(dtype), teacher.to(dtype)


def centred(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima [C] and what lies below them [C, rows], in float64."""
    highest = values.double().amax(-1)
    return highest, (values.double() - highest[:, None]).clamp(min=LOWEST)


def want_sums(student: Tensor, teacher: Tensor) -> Tensor:
    (m, x), (n, y) = centred(student), centred(teacher)
    e, f = x.exp(), y.exp()
    terms = (e, f - e, e * (x - y), e * x, f * (y - x), f * y)
    z, excess, d, a, forward, b = (term.sum(-1) for term in terms)
    return torch.stack((m, z, n, excess, d, a, forward, b))


def want_gradient(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    m, n, r0, r1, r2 = rows.double()[:, :, None]
    x, y = (student.double() - m).clamp(min=LOWEST), (teacher.double() - n).clamp(min=LOWEST)
    return x.exp() * (r0 * (x - y) + r1) + r2 * y.exp()


def want_jsd(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """p, p (log p - log mix) and q (log q - log mix), each [C, rows]."""
    log_p, log_q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    mix = beta * q + (1 - beta) * p
    return p, torch.special.xlogy(p, p / mix).nan_to_num(0.0), torch.special.xlogy(q, q / mix).nan_to_num(0.0)


def gradient_rows(student: Tensor, teacher: Tensor, r0: float = 0.7, r1: float = -0.2, r2: float = 0.3) -> Tensor:
    """[5, C] about the maxima, with factors that differ from row to row; one row is switched off."""
    count = len(student)
    factors = torch.tensor([r0, r1, r2])[:, None] * torch.linspace(0.5, 1.5, count)
    factors[:, 1::3] = 0.0
    return torch.cat((torch.stack((student.float().amax(-1), teacher.float().amax(-1))), factors))


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-300))


def kl(sums: Tensor) -> Tensor:
    z, f, d = sums[[1, 3, 4]].double()
    return d / z + (f / z).log1p()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 16, 151, 1000, 18992])
@pytest.mark.parametrize("offsets", [(0.0, 0.0), (40.0, -40.0), (-40.0, 40.0)])
def test_divergence_sums(columns: int, dtype: torch.dtype, offsets: tuple[float, float]) -> None:
    student, teacher = logits(5, columns, torch.float32)
    student, teacher = (student + offsets[0]).to(dtype), (teacher + offsets[1]).to(dtype)
    got, want = rows_cpp.divergence_sums(student, teacher, both=True), want_sums(student, teacher)
    assert torch.equal(got[[0, 2]].double(), want[[0, 2]])
    for k in (1, 3, 4, 5, 6, 7):
        assert error(got[k], want[k]) < 1e-6, k
    one_sided = rows_cpp.divergence_sums(student, teacher, both=False)
    torch.testing.assert_close(one_sided, got[:6], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    ("noise", "low", "high", "allowed"),
    [(1.5e-3, 1e-7, 3e-6, 5e-4), (1e-2, 5e-6, 2e-4, 1e-4), (0.1, 5e-4, 2e-2, 2e-5), (1.0, 0.1, 1.0, 4e-6),
     (6.0, 2.0, 20.0, 3e-6)],
)  # fmt: skip
@pytest.mark.parametrize("columns", [151, 151936])
def test_divergence_from_tiny_to_large(columns: int, noise: float, low: float, high: float, allowed: float) -> None:
    """Relative, every row. fp32 log_softmax is off by 0.5 in the first case, 2e-2 in the second."""
    student, teacher = logits(8, columns, noise=noise)
    want = kl(want_sums(student, teacher))
    assert low < want.min() and want.max() < high
    assert ((kl(rows_cpp.divergence_sums(student, teacher, both=False)) - want) / want).abs().max() < allowed


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_sums_of_sorted_logits(direction: float) -> None:
    """Ascending, every step raises the maxima; descending, only the first."""
    student = direction * torch.linspace(-50.0, 30.0, 3000).repeat(2, 1)
    teacher = direction * torch.linspace(-70.0, 35.0, 3000).repeat(2, 1)
    got, want = rows_cpp.divergence_sums(student, teacher, both=True), want_sums(student, teacher)
    assert ((got - want) / want).abs().max() < 1e-6
    tokens = rows_cpp.token_sums(student, torch.zeros(2, dtype=torch.int64), torch.tensor([True, False]))
    assert ((tokens[:3] - want[[0, 1, 5]]) / want[[0, 1, 5]]).abs().max() < 1e-6


@pytest.mark.parametrize("columns", [37, 5000])
def test_sums_join_over_shards(columns: int) -> None:
    """Uneven shards, one empty: re-centred and added up they are the sums of the whole vocabulary."""
    student, teacher = logits(4, columns)
    cuts = [0, columns // 7, columns // 7, columns // 2, columns]
    parts = [rows_cpp.divergence_sums(student[:, a:b], teacher[:, a:b], both=True).double() for a, b in pairwise(cuts)]
    assert torch.equal(parts[1][[0, 2]], torch.full((2, 4), -1e30).double()) and not parts[1][[1, 3, 4, 5, 6, 7]].any()
    m, z, n, f, d, a, e, b = torch.stack(parts).unbind(1)
    dm, dn = m - m.amax(0), n - n.amax(0)
    s, t, teacher_z = dm.exp(), dn.exp(), z + f
    joined = torch.stack((
        m.amax(0), (s * z).sum(0), n.amax(0), (t * f + (t - s) * z).sum(0), (s * (d + (dm - dn) * z)).sum(0),
        (s * (a + dm * z)).sum(0), (t * (e + (dn - dm) * teacher_z)).sum(0), (t * (b + dn * teacher_z)).sum(0),
    ))  # fmt: skip
    torch.testing.assert_close(joined, want_sums(student, teacher), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [(0.7, -0.2, 0.0), (0.0, -0.2, 0.3), (0.7, -0.2, 0.3)])
@pytest.mark.parametrize("columns", [3, 151, 1000])
def test_divergence_gradient(columns: int, factors: tuple[float, float, float], dtype: torch.dtype) -> None:
    student, teacher = logits(7, columns, dtype)
    rows = gradient_rows(student, teacher, *factors)
    want = want_gradient(student, teacher, rows)
    for kind, allowed in ((torch.float32, 5e-7), (torch.bfloat16, 3e-3)):
        out = torch.full((7, columns), float("nan"), dtype=kind)
        assert rows_cpp.divergence_gradient(student, teacher, rows, out) is out
        assert error(out, want) < allowed
        assert not out[1::3].any()
    in_place = student.clone()
    rows_cpp.divergence_gradient(in_place, teacher, rows, in_place)
    assert torch.equal(in_place, rows_cpp.divergence_gradient(student, teacher, rows, torch.empty_like(student)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [1e-2, 0.5, 5.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("columns", [3, 1000])
def test_jsd(columns: int, beta: float, noise: float, dtype: torch.dtype) -> None:
    student, teacher = logits(6, columns, dtype, noise)
    p, of_student, of_teacher = want_jsd(student, teacher, beta)
    lse = torch.stack((student.double().logsumexp(-1), teacher.double().logsumexp(-1)))
    got = rows_cpp.jsd_sums(student, teacher, lse.float(), beta)
    # Single terms are as large as p log(p / mix); rounding the normalisers to fp32 alone moves each by 1e-7 p.
    scale = of_student.abs().sum(-1) + of_teacher.abs().sum(-1) + 1.0
    assert (torch.stack((of_student.sum(-1), of_teacher.sum(-1))) - got).abs().div(scale).max() < 1e-6
    mean = of_student.sum(-1)
    factor = torch.linspace(0.5, 1.5, 6).double()
    want = factor[:, None] * (1 - beta) * (of_student - p * mean[:, None])
    rows = torch.cat((lse, torch.stack((mean, factor)))).float()
    allowed = 1e-6 / noise + 1e-6
    assert error(rows_cpp.jsd_gradient(student, teacher, rows, beta, torch.empty(6, columns)), want) < allowed
    in_place = student.clone()
    rows_cpp.jsd_gradient(in_place, teacher, rows, beta, in_place)
    assert error(in_place, want) < (3e-3 if dtype == torch.bfloat16 else allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 151, 1000])
def test_token(columns: int, dtype: torch.dtype) -> None:
    student, _ = logits(6, columns, dtype)
    ids = torch.arange(6) * 7919 % columns
    owned = torch.tensor([True, True, False, True, False, True])
    got, want = rows_cpp.token_sums(student, ids, owned), want_sums(student, student)
    assert torch.equal(got[0].double(), want[0])
    assert error(got[1], want[1]) < 1e-6 and error(got[2], want[5]) < 1e-6
    chosen = student.float().gather(1, ids[:, None])[:, 0] * owned
    assert torch.equal(got[3], chosen)
    rows = torch.stack((got[0], -torch.linspace(0.1, 1.0, 6), torch.linspace(1.0, 0.2, 6)))
    gradient = (student.double() - rows[0, :, None]).exp() * rows[1, :, None]
    gradient.scatter_add_(1, ids[:, None], (rows[2] * owned).double()[:, None])
    assert error(rows_cpp.token_gradient(student, ids, owned, rows, torch.empty(6, columns)), gradient) < 5e-7
    in_place = student.clone()
    rows_cpp.token_gradient(in_place, ids, owned, rows, in_place)
    assert error(in_place, gradient) < (5e-7 if dtype == torch.float32 else 3e-3)

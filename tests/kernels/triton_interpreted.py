"""Run by `test_rows_triton.py` under TRITON_INTERPRET=1: every primitive against float64 torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import rows_triton
from tests.kernels import gpu_arithmetic

gpu_arithmetic.install()

FLOOR = 1.5e-8
"""Nats: where logits are bf16, or a column is in the tail, e^y - e^x carries the roundings of both."""

WIDE = 4096 + 1024 + 7
"""One unmasked tile, and a masked part that is no multiple of anything."""


def logits(
    rows: int, columns: int, noise: float, offsets: tuple[float, float] = (0.0, 0.0), seed: int = 0
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    student = 2.5 * torch.randn(rows, columns, generator=draw)
    # Language models are sure of most tokens.
    student[torch.arange(rows), torch.randint(columns, (rows,), generator=draw)] += 12.0
    teacher = student + noise * torch.randn(rows, columns, generator=draw)
    return student + offsets[0], teacher + offsets[1]


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return torch.nan_to_num(p.exp() * (p - q)).sum(-1)


def merged(parts: list[Tensor]) -> dict[str, Tensor]:
    """[8, C] of each shard -> float64 statistics of the vocabulary."""
    m, Z, n, F, D, A, E, B = torch.stack(parts).double().unbind(1)
    dm, dn = m - m.amax(0), n - n.amax(0)
    a, b, W = dm.exp(), dn.exp(), Z + F
    z, f = (a * Z).sum(0), (b * F + (b - a) * Z).sum(0)
    w = z + f
    return {
        "reverse": (a * (D + (dm - dn) * Z)).sum(0) / z + (f / z).log1p(),
        "forward": (b * (E + (dn - dm) * W)).sum(0) / w - (f / z).log1p(),
        "entropy": z.log() - (a * (A + dm * Z)).sum(0) / z,
        "teacher_entropy": w.log() - (b * (B + dn * W)).sum(0) / w,
        "lse_s": m.amax(0) + z.log(),
        "lse_t": n.amax(0) + w.log(),
    }


def entropy(z: Tensor) -> Tensor:
    p = z.double().log_softmax(-1)
    return -torch.nan_to_num(p.exp() * p).sum(-1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("offsets", [(0.0, 0.0), (40.0, -40.0)])
@pytest.mark.parametrize("noise", [3.0, 0.3, 1e-2, 1e-3])
def test_sums(noise: float, offsets: tuple[float, float]) -> None:
    student, teacher = logits(3, WIDE, noise, offsets)
    found = merged([rows_triton.divergence_sums(student, teacher, both=True)])
    want = kl(student, teacher)
    assert ((found["reverse"] - want).abs() <= 1e-5 * want + FLOOR).all(), (found["reverse"], want)
    want = kl(teacher, student)
    assert ((found["forward"] - want).abs() <= 1e-5 * want + FLOOR).all(), (found["forward"], want)
    assert error(found["entropy"], entropy(student)) < 2e-6
    assert error(found["teacher_entropy"], entropy(teacher)) < 2e-6
    assert error(found["lse_s"], student.double().logsumexp(-1)) < 1e-7
    assert error(found["lse_t"], teacher.double().logsumexp(-1)) < 1e-7


@pytest.mark.parametrize(("noise", "offset", "tolerance"), [(0.03, 0.0, 5e-5), (0.03, 40.0, 5e-5), (3e-3, 0.0, 5e-4)])
def test_small_divergence(noise: float, offset: float, tolerance: float) -> None:
    """A KL of 1e-4 to 5e-5 of itself and one of 1e-6 to 5e-4, in every row, whole and in two shards."""
    student, teacher = logits(12, WIDE, noise, (offset, -offset))
    want = kl(student, teacher)
    heavy = want > 0.08 * noise**2
    assert heavy.sum() >= 6
    for cuts in ([WIDE], [5000, WIDE - 5000]):
        pairs = zip(student.split(cuts, 1), teacher.split(cuts, 1), strict=True)
        found = merged([rows_triton.divergence_sums(s, t, both=True) for s, t in pairs])["reverse"]
        assert ((found - want).abs() / want)[heavy].max() < tolerance


def test_maxima_that_move_apart() -> None:
    """Far up in the second tile, each for its own tokens: what the first tile's centres would lose."""
    student, teacher = logits(3, 2 * 4096, 0.5)
    student[0, 5000] = 150.0
    teacher[1, 5000] = 150.0
    student[2, :4096], teacher[2, 4096:] = -150.0, 90.0
    found = merged([rows_triton.divergence_sums(student, teacher, both=True)])
    want = kl(student, teacher)
    assert ((found["reverse"] - want).abs() <= 1e-5 * want + 1e-7).all(), (found["reverse"], want)
    want = kl(teacher, student)
    assert ((found["forward"] - want).abs() <= 1e-5 * want + 1e-7).all(), (found["forward"], want)


def test_six_sums_are_the_first_of_eight() -> None:
    student, teacher = logits(2, WIDE, 0.3)
    eight = rows_triton.divergence_sums(student, teacher, both=True)
    assert torch.equal(rows_triton.divergence_sums(student, teacher, both=False), eight[:6])


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_sums_of_shards(shards: int) -> None:
    student, teacher = logits(2, 1000, 0.01, (40.0, -40.0))
    parts = [
        rows_triton.divergence_sums(s, t, both=True)
        for s, t in zip(student.tensor_split(shards, 1), teacher.tensor_split(shards, 1), strict=True)
    ]
    found = merged([*parts, rows_triton.divergence_sums(student[:, :0], teacher[:, :0], both=True)])
    want = kl(student, teacher)
    assert ((found["reverse"] - want).abs() <= 2e-5 * want + FLOOR).all()
    want = kl(teacher, student)
    assert ((found["forward"] - want).abs() <= 2e-5 * want + FLOOR).all()


def test_split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits(2, 3 * 4096 + 100, 0.1, (3.0, -5.0))
    whole = merged([rows_triton.divergence_sums(student, teacher, both=True)])
    beta_rows = torch.stack((whole["lse_s"], whole["lse_t"])).float()
    jsd = rows_triton.jsd_sums(student, teacher, beta_rows, 0.5)
    monkeypatch.setattr(rows_triton, "MIN_SPLIT", 4096)
    assert rows_triton._split(2, student.shape[1], student)[0] > 1
    split = merged([rows_triton.divergence_sums(student, teacher, both=True)])
    for name, value in whole.items():
        assert error(split[name], value) < 3e-6, name
    six = rows_triton.divergence_sums(student, teacher, both=False)
    assert torch.equal(six, rows_triton.divergence_sums(student, teacher, both=True)[:6])
    assert error(rows_triton.jsd_sums(student, teacher, beta_rows, 0.5), jsd) < 1e-5


def test_bf16_logits() -> None:
    student, teacher = (each.bfloat16() for each in logits(2, WIDE, 0.5))
    found = merged([rows_triton.divergence_sums(student, teacher, both=True)])
    assert error(found["reverse"], kl(student, teacher)) < 1e-5
    mixed = merged([rows_triton.divergence_sums(student.float(), teacher, both=True)])
    assert error(mixed["reverse"], kl(student, teacher)) < 1e-5


def gradient_rows(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """[5, C]: m, n, r0, r1, r2 of one shard that is the vocabulary, from float64."""
    z, t = student.double(), teacher.double()
    m, n = z.amax(-1), t.amax(-1)
    c_s, c_t = (z.logsumexp(-1) - m), (t.logsumexp(-1) - n)
    zero, p, q = torch.zeros_like(m), (-c_s).exp(), (-c_t).exp()
    if kind == "reverse":  # log p - log q - KL = (x - y) - (c_s - c_t + KL)
        return torch.stack((m, n, p, -p * (c_s - c_t + kl(student, teacher)), zero)).float()
    if kind == "forward":
        return torch.stack((m, n, zero, p, -q)).float()
    reverse, forward = gradient_rows(student, teacher, "reverse"), gradient_rows(student, teacher, "forward")
    return torch.cat((reverse[:2], 0.3 * forward[2:] + 0.7 * reverse[2:]))


@pytest.mark.parametrize("kind", ["reverse", "forward", "mixed"])
@pytest.mark.parametrize("noise", [3.0, 1e-2])
def test_gradient(noise: float, kind: str) -> None:
    student, teacher = logits(3, 8192 + 77, noise, (40.0, -40.0))
    z = student.double().requires_grad_()
    p, q = z.log_softmax(-1), teacher.double().log_softmax(-1)
    reverse, forward = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    value = {"reverse": reverse, "forward": forward, "mixed": 0.3 * forward + 0.7 * reverse}[kind]
    (want,) = torch.autograd.grad(value, z)
    rows = gradient_rows(student, teacher, kind)
    out = torch.full_like(student, torch.nan)
    assert rows_triton.divergence_gradient(student, teacher, rows, out) is out
    # Forward KL subtracts two exponentials: 1e-7 of p, against a p - q of 1e-2 p.
    assert error(out, want) < (1e-5 if noise > 1 or kind == "reverse" else 1e-4)
    rounded = torch.empty_like(student, dtype=torch.bfloat16)
    rows_triton.divergence_gradient(student, teacher, rows, rounded)
    assert error(rounded, want) < 2**-7  # the interpreter cuts off where the GPU rounds
    inplace = student.clone()
    assert rows_triton.divergence_gradient(inplace, teacher, rows, inplace) is inplace
    assert torch.equal(inplace, out)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("noise", [3.0, 1e-2])
def test_jsd(noise: float, beta: float) -> None:
    student, teacher = logits(3, WIDE, noise, (40.0, -40.0))
    z = student.double().requires_grad_()
    p, q = z.softmax(-1), teacher.double().softmax(-1)
    mix = beta * q + (1 - beta) * p
    k_p, k_q = (p * (p.log() - mix.log())).sum(-1), (q * (q.log() - mix.log())).sum(-1)
    (want,) = torch.autograd.grad((beta * k_q + (1 - beta) * k_p).sum(), z)
    lse = torch.stack((student.double().logsumexp(-1), teacher.double().logsumexp(-1)))
    sums = rows_triton.jsd_sums(student, teacher, lse.float(), beta)
    together = beta * sums[1] + (1 - beta) * sums[0]
    exact = (beta * k_q + (1 - beta) * k_p).detach()
    # lse at 40 is rounded to 2e-6, which p and q inherit: it moves K_P and K_Q apart, not their weighted sum.
    assert error(sums, torch.stack((k_p, k_q)).detach()) < (1e-5 if noise > 1 else 4e-2)
    assert ((together - exact).abs() <= 1e-5 * exact + FLOOR / 2).all(), together - exact
    rows = torch.cat((lse.float(), sums[:1], torch.ones(1, 3)))
    out = rows_triton.jsd_gradient(student, teacher, rows, beta, torch.empty_like(student))
    assert error(out, want) < (1e-5 if noise > 1 else 5e-4)
    student[0, :9] = teacher[0, 4:20] = -torch.inf
    assert rows_triton.jsd_sums(student, teacher, lse.float(), beta).isfinite().all()
    assert rows_triton.jsd_gradient(student, teacher, rows, beta, student).isfinite().all()


def test_token() -> None:
    student, _ = logits(4, WIDE, 0.0, (40.0, 0.0))
    ids, owned = torch.tensor([0, 700, WIDE - 1, 3]), torch.tensor([True, True, True, False])
    m, Z, A, chosen = rows_triton.token_sums(student, ids, owned)
    assert torch.equal(m, student.amax(-1))
    assert torch.equal(chosen, student[torch.arange(4), ids] * owned)
    assert error(Z, (student.double() - m[:, None]).exp().sum(-1)) < 1e-6
    assert error(Z.log() - A / Z, entropy(student)) < 2e-6
    upstream = torch.tensor([1.0, -0.5, 0.0, 2.0])
    out = rows_triton.token_gradient(student, ids, owned, torch.stack((m, -upstream / Z, upstream)), student.clone())
    want = -upstream[:, None].double() * student.double().softmax(-1)
    want[torch.arange(4), ids] += (upstream * owned).double()
    assert error(out, want) < 1e-5


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    student, teacher = logits(rows, 40, 0.5)
    assert rows_triton.divergence_sums(student, teacher, both=True).shape == (8, rows)
    out = torch.empty_like(student)
    assert rows_triton.divergence_gradient(student, teacher, torch.zeros(5, rows), out) is out
    assert not out.any()


def test_strided_logits() -> None:
    student, teacher = logits(3, 300, 0.5)
    want = rows_triton.divergence_sums(student, teacher, both=True)
    wide = torch.full((3, 310), torch.nan)
    wide[:, 5:305] = student
    assert torch.equal(rows_triton.divergence_sums(wide[:, 5:305], teacher.t().contiguous().t(), both=True), want)
    rows = gradient_rows(student, teacher, "reverse")
    gradient = rows_triton.divergence_gradient(student, teacher, rows, torch.empty_like(student))
    rows_triton.divergence_gradient(wide[:, 5:305], teacher, rows, wide[:, 5:305])
    assert torch.equal(wide[:, 5:305], gradient)
    assert wide[:, :5].isnan().all()
    assert wide[:, 305:].isnan().all()


Z = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows_triton.divergence_sums(Z, Z[:, :4], both=False), r"student's logits are \(2, 8\) on cpu"),
        (lambda: rows_triton.divergence_sums(Z.double(), Z, both=False), "torch.float64: expected"),
        (lambda: rows_triton.divergence_gradient(Z, Z, torch.zeros(4, 2), Z), r"rows are \(4, 2\) torch.float32"),
        (lambda: rows_triton.divergence_gradient(Z, Z, torch.zeros(5, 2), Z[:1]), r"out is \(1, 8\)"),
        (lambda: rows_triton.divergence_gradient(Z, Z, torch.zeros(5, 2), torch.zeros(8, 2).t()), "out has strides"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

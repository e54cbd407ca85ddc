"""Run by `test_layers_triton.py` under TRITON_INTERPRET=1: `linear_divergence` by the fused kernels, 1 and 2 ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import DivergenceKind, Objective, VocabShard, layers_triton, linear_divergence, reference
from kernels.layer_blocks import Teachers
from kernels.partials import Joined
from tests.kernels import gpu_arithmetic
from tests.kernels.problems import CollectiveCounter, local_rows, relative_error
from tests.kernels.ranks import Ranks

gpu_arithmetic.install()

COUNTS = (5, 0, 17)
SIZES = (40, 16, 24)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    kind: DivergenceKind = "reverse_kl"
    vocab: int = 151
    tokens: int = 22
    hidden: int = 24
    teacher_hidden: int = 40
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    noise: float | None = None
    """Of a teacher that is the student plus so much; None: another model."""
    offset: float = 0.0
    """Added to all of the student's logits, taken from the teacher's."""
    routed: bool = False
    chunk_tokens: int | None = None
    slab_elements: int | None = None
    """Several slabs of the vocabulary."""
    fused: bool = True


def tensors(case: Case) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:
    source = torch.Generator().manual_seed(case.vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    hidden, weight = normal(case.tokens, case.hidden), 0.5 * normal(case.vocab, case.hidden)
    hidden[:, 0] = 4.0  # one direction that all rows share carries the offset
    weight[:, 0] += case.offset / 4.0
    if case.noise is not None:
        states, heads = [hidden + case.noise * normal(*hidden.shape)], [weight.clone()]
        states[0][:, 0] = 4.0
        heads[0][:, 0] -= case.offset / 2.0
    elif case.routed:
        states = [normal(count, size) for count, size in zip(COUNTS, SIZES, strict=True)]
        heads = [0.5 * normal(case.vocab, size) for size in SIZES]
    else:
        states, heads = [normal(case.tokens, case.teacher_hidden)], [0.5 * normal(case.vocab, case.teacher_hidden)]
    upstream = torch.rand(case.tokens, generator=source) - 0.3
    to = case.dtype
    return hidden.to(to), weight.to(to), [h.to(to) for h in states], [h.to(to) for h in heads], upstream


def solve(group: ProcessGroup, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    hidden, weight, states, heads, upstream = tensors(case)
    rows = -(-case.vocab // dist.get_world_size(group))
    shard = VocabShard.of_rank(rows, case.vocab, group)
    hidden.requires_grad_()
    weight = local_rows(weight, shard, rows).requires_grad_()
    heads = [local_rows(head, shard, rows) for head in heads]
    index = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS)) if case.routed else None
    launched = 0

    def counted(*arguments: object, **options: object) -> Tensor:
        nonlocal launched
        launched += 1
        return sums(*arguments, **options)  # type: ignore[arg-type]

    sums, layers_triton.linear_sums = layers_triton.linear_sums, counted  # type: ignore[assignment]
    before = layers_triton.BLOCK_ELEMENTS, layers_triton.TILE
    if case.slab_elements:
        layers_triton.BLOCK_ELEMENTS, layers_triton.TILE = case.slab_elements, layers_triton.SMALL_TILE
    try:
        with CollectiveCounter() as counter:
            found = linear_divergence(
                hidden, weight, states if case.routed else states[0], heads if case.routed else heads[0], case.kind,
                alpha=0.3, shard=shard, temperature=case.temperature, teacher_index=index,
                chunk_tokens=case.chunk_tokens, gradient="recompute", impl="triton",
            )  # fmt: skip
            found.divergence.backward(upstream.to(found.divergence.dtype))
    finally:
        layers_triton.linear_sums = sums
        layers_triton.BLOCK_ELEMENTS, layers_triton.TILE = before
    assert (launched > 0) == case.fused
    assert hidden.grad is not None and weight.grad is not None
    assert counter.calls == (dist.get_world_size(group) > 1)
    return found.divergence.detach(), found.student_entropy, hidden.grad, weight.grad[: shard.rows], launched


def check(ranks: Ranks, size: int, case: Case, values: float = 2e-6, gradients: float = 1e-5) -> int:
    found = ranks.run(size, solve, case)
    hidden, weight, states, heads, upstream = tensors(case)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z = x @ w.T
    teacher = torch.cat([state.double() @ head.double().T for state, head in zip(states, heads, strict=True)])
    value = reference.divergence(z, teacher, Objective(case.kind, 0.3, 0.5, case.temperature))
    x_grad, w_grad = torch.autograd.grad(value, (x, w), upstream.double())
    log_p = (z / case.temperature).log_softmax(-1)
    assert all(torch.equal(each[0], found[0][0]) for each in found)
    assert relative_error(found[0][0], value.detach()) < values
    assert relative_error(found[0][1], -(log_p.exp() * log_p).sum(-1).detach()) < 1e-5
    assert relative_error(torch.stack([each[2].double() for each in found]).sum(0), x_grad) < gradients
    assert relative_error(torch.cat([each[3].double() for each in found]), w_grad) < gradients
    return int(found[0][4])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "mixed"])
def test_kinds(ranks: Ranks, size: int, kind: DivergenceKind) -> None:
    check(ranks, size, Case(kind=kind, temperature=1.3))


def test_large_vocabulary_in_halves(ranks: Ranks) -> None:
    """fp16 operands, fp32 logits; hidden sizes that are no multiple of a tile's."""
    case = Case(vocab=1000, hidden=21, teacher_hidden=33, dtype=torch.float16)
    check(ranks, 2, case, gradients=1e-3)  # of which 5e-4 is the rounding of the gradient to fp16


@pytest.mark.parametrize("kind", ["reverse_kl", "mixed"])
def test_teachers_by_row_in_several_blocks(ranks: Ranks, kind: DivergenceKind) -> None:
    launched = check(ranks, 2, Case(kind=kind, routed=True, chunk_tokens=8, slab_elements=256))
    assert launched == 3 * 4  # 76 rows in slabs of 32; 22 tokens cut at 5, 8, 16


@pytest.mark.parametrize(("noise", "tolerance"), [(1e-2, 1e-4), (1e-3, 1e-3)])
def test_small_divergence_with_offset_logits(ranks: Ranks, noise: float, tolerance: float) -> None:
    """KL of 1e-4 and 1e-6. In the second, logits of 15 are rounded to 1e-6 where they differ by 1e-3."""
    check(ranks, 2, Case(noise=noise, offset=8.0, vocab=300), values=tolerance, gradients=tolerance)


HUGE = 1e20
"""Its square is inf in fp32: a product of two hidden units, one of each token and one of each row of the layer, that
makes a logit -inf, where the products of other tokens and rows with a 0 stay 0."""


def layers_with_impossible_tokens() -> tuple[list[Tensor], Tensor, Tensor]:
    """Layers of 20 tokens and 151 rows; their logits in float64. The teacher excludes tokens of rows 0, 4, ..., the
    student of 1, 5, ..., two whole tiles of 32 among them, each side others of 2, 6, ...; row 7 has one NaN of the
    student, row 9 of the teacher."""
    source = torch.Generator().manual_seed(5)
    layers, logits = [], []
    for side in range(2):
        hidden, weight = torch.randn(20, 16, generator=source), 0.7 * torch.randn(151, 16, generator=source)
        exact = hidden.double() @ weight.double().t()
        more, rows = torch.zeros(20, 4), torch.zeros(151, 4)
        for unit, first, excluded in ((0, 1 - side, torch.arange(151) < 70), (1, 2, torch.arange(151) % 3 == side)):
            more[first::4, unit], rows[excluded, unit] = HUGE, -HUGE
            exact[first::4, excluded] = -torch.inf
        token, column = ((7, 100), (9, 20))[side]
        more[token, 2:], rows[column, 2], rows[column, 3] = HUGE, HUGE, -HUGE  # inf in one step, -inf in the next
        exact[token, column] = torch.nan
        pairs = (hidden, more), (weight, rows)
        layers += [torch.cat((units[:, :3], own, units[:, 3:]), 1) for own, units in pairs]
        logits.append(exact)
    return layers, *logits


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_impossible_tokens_and_nan(kind: DivergenceKind) -> None:
    """-inf counts as 1e4 below the maximum, as in the row primitives; a NaN is its row's alone."""
    layers, student, teacher = layers_with_impossible_tokens()
    both = kind == "forward_kl"
    joined = Joined(layers_triton.linear_sums(*layers, 1.0, both=True))
    good = torch.ones(20, dtype=torch.bool)
    good[[7, 9]] = False
    z = student[good].requires_grad_()
    want = reference.divergence(z, teacher[good], Objective(kind))
    (gradient,) = torch.autograd.grad(want.sum(), z)
    got = joined.value(Objective(kind))
    assert got[~good].isnan().all()
    assert (want > 100).sum() >= 5
    assert ((got[good] - want).abs() <= torch.where(want > 100, 2e-3, 3e-6) * want).all()
    rows = joined.gradient_rows(Objective(kind), torch.ones(20)).float()
    out = layers_triton.linear_gradient(*layers, 1.0, rows, torch.float32, teacher=both)
    assert out[~good].isnan().all()
    allowed = torch.where(want > 100, 2e-3 * want, 1e-5 * gradient.norm(dim=-1))
    assert ((out[good] - gradient).norm(dim=-1) <= allowed).all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_rows(tokens: int) -> None:
    hidden, weight = torch.randn(tokens, 16, requires_grad=True), torch.randn(40, 16)
    value = linear_divergence(hidden, weight, hidden.detach() + 1, weight, gradient="recompute", impl="triton")
    value.divergence.sum().backward()
    assert value.divergence.shape == (tokens,)
    assert hidden.grad is not None and hidden.grad.shape == (tokens, 16)


def test_other_jobs_take_the_logits(ranks: Ranks) -> None:
    check(ranks, 1, Case(kind="jsd", fused=False))
    hidden = torch.zeros(1, 8)
    assert layers_triton.fits(Objective(), Teachers((hidden,), ()), hidden)
    assert not layers_triton.fits(Objective(), Teachers((hidden.bfloat16(),), ()), hidden)

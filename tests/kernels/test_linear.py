"""`linear_divergence` in all its options: kinds, plans, teachers, weights, main_grad; 1 to 8 ranks against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import DivergenceKind, Objective, VocabShard, layer_blocks, linear_divergence, reference
from tests.kernels.problems import CollectiveCounter, local_rows, relative_error
from tests.kernels.ranks import Ranks

TOKENS, HIDDEN = 13, 24
COUNTS, SIZES = (5, 0, 8), (24, 16, 40)
"""Rows and hidden sizes of three teachers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    kind: DivergenceKind = "reverse_kl"
    vocab: int = 151
    teachers: str = "one"
    """one, routed, mixture."""
    gradient: str = "recompute"
    weighted: bool = False
    temperature: float = 1.0
    chunk_tokens: int | None = None
    dtype: torch.dtype = torch.float32
    main_grad: bool = False
    impl: str = "torch"
    rows_per_rank: int | None = None
    small_blocks: bool = False
    """Several slabs of the vocabulary."""
    tokens: int = TOKENS
    """As this and the next ones, for one teacher."""
    noise: float = 0.3
    offset: float = 0.0
    """Added to all of the student's logits, taken from the teacher's."""
    excluded: bool = False
    """In some rows the student's logits of some tokens are -inf, in others the teacher's, in others some of either."""
    strided: bool = False
    """Columns of hidden states and weights lie apart."""


def tensors(case: Case) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor]:
    source = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    hidden, weight = normal(TOKENS, HIDDEN), 0.5 * normal(case.vocab, HIDDEN)
    heads = [0.5 * normal(case.vocab, size) for size in SIZES]
    counts = COUNTS if case.teachers == "routed" else (TOKENS,) * 3
    states = [normal(count, size) for count, size in zip(counts, SIZES, strict=True)]
    if case.teachers == "one":
        states, heads = [hidden + case.noise * normal(TOKENS, HIDDEN)], [weight.clone()]
        (hidden, weight), (states[0], heads[0]) = (
            with_units(case, side, *layer) for side, layer in enumerate(((hidden, weight), (states[0], heads[0])))
        )
        hidden, states[0] = hidden[: case.tokens], states[0][: case.tokens]
    weights = torch.rand(TOKENS, generator=source) if case.weighted else None
    if weights is not None:
        weights[[0, 1, 6, 12]] = 0.0
    upstream = torch.rand(TOKENS, generator=source) - 0.3
    if case.gradient == "in_forward":
        upstream = torch.full((TOKENS,), 0.7)
    to, tokens = case.dtype, case.tokens
    weights, upstream = weights if weights is None else weights[:tokens], upstream[:tokens]
    return hidden.to(to), weight.to(to), [h.to(to) for h in states], [h.to(to) for h in heads], weights, upstream


HUGE = 1e20
"""Of a token and a row of the layer: their product is -inf in fp32, and 0 where the other has a 0."""


def with_units(case: Case, side: int, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The layer of the student (side 0) or teacher with hidden units of its own for `offset` and `excluded`."""
    if case.offset:
        hidden = torch.cat((hidden, torch.full((len(hidden), 1), 4.0).double()), 1)
        weight = torch.cat((weight, torch.full((len(weight), 1), (1 - 2 * side) * case.offset / 4).double()), 1)
    if case.excluded:
        of_token, of_row = hidden.new_zeros(len(hidden), 2), weight.new_zeros(len(weight), 2)
        of_token[side::4, 0] = of_token[2::4, 1] = HUGE
        of_row[: len(weight) // 3, 0] = of_row[side::3, 1] = -HUGE
        hidden, weight = torch.cat((hidden, of_token), 1), torch.cat((weight, of_row), 1)
    return hidden, weight


def apart(each: Tensor) -> Tensor:
    return each.t().contiguous().t()


BEFORE = 2.0**-7
"""What main_grad holds already; little, or adding to it would round off what is compared."""

MIXTURE = (0.5, 0.3, 0.2)
INDEX = torch.tensor([0] * 5 + [2] * 8)


def solve_case(group: ProcessGroup, case: Case) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Value, dX, dW of this rank, collectives."""
    if case.small_blocks:
        layer_blocks.BLOCK_ELEMENTS, layer_blocks.SMALLEST_SLAB = 64, 8
    try:
        return _solve(group, case)
    finally:
        layer_blocks.BLOCK_ELEMENTS, layer_blocks.SMALLEST_SLAB = 1 << 22, 1024


def _solve(group: ProcessGroup, case: Case) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    hidden, weight, states, heads, weights, upstream = tensors(case)
    place = apart if case.strided else Tensor.contiguous
    rows = case.rows_per_rank or -(-case.vocab // dist.get_world_size(group))
    shard = VocabShard.of_rank(rows, case.vocab, group)
    hidden = place(hidden).requires_grad_()
    weight = place(local_rows(weight, shard, rows)).requires_grad_()
    heads, states = [place(local_rows(head, shard, rows)) for head in heads], [place(each) for each in states]
    one = case.teachers == "one"
    main_grad = torch.full(weight.shape, BEFORE) if case.main_grad else None
    with CollectiveCounter() as counter:
        value = linear_divergence(
            hidden, weight, states[0] if one else states, heads[0] if one else heads, case.kind, alpha=0.3, beta=0.25,
            shard=shard, temperature=case.temperature, weights=weights, chunk_tokens=case.chunk_tokens,
            teacher_index=INDEX if case.teachers == "routed" else None,
            teacher_mixture=MIXTURE if case.teachers == "mixture" else None,
            gradient=case.gradient, main_grad=main_grad, impl=case.impl,  # type: ignore[arg-type]
        ).divergence  # fmt: skip
        forward = counter.calls
        value.backward(upstream.to(value.dtype))
    assert hidden.grad is not None
    if main_grad is not None:
        assert weight.grad is None
        weight_grad = main_grad - BEFORE
    else:
        assert weight.grad is not None and weight.grad.dtype == case.dtype
        weight_grad = weight.grad
    assert not weight_grad[shard.rows :].any()
    return value.detach(), hidden.grad, weight_grad[: shard.rows], (forward, counter.calls - forward)


def expected_case(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, states, heads, weights, upstream = tensors(case)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = [state.double() @ head.double().T for state, head in zip(states, heads, strict=True)]
    teacher = torch.cat(logits)
    if case.teachers == "mixture":
        teacher = torch.stack([share * each for share, each in zip(MIXTURE, logits, strict=True)]).sum(0)
    value = reference.divergence(x @ w.T, teacher, Objective(case.kind, 0.3, 0.25, case.temperature))
    if weights is not None:
        value = value * weights
    return value.detach(), *torch.autograd.grad(value, (x, w), upstream.double())


def check(ranks: Ranks, size: int, case: Case, values: float = 2e-6, gradients: float = 1e-5) -> tuple[int, int]:
    found = ranks.run(size, solve_case, case)
    value, hidden_grad, weight_grad = expected_case(case)
    assert all(torch.equal(each[0], found[0][0]) for each in found)
    assert relative_error(found[0][0], value) < values
    assert relative_error(torch.stack([each[1].double() for each in found]).sum(0), hidden_grad) < gradients
    assert relative_error(torch.cat([each[2] for each in found]), weight_grad) < gradients
    return found[0][3]


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "mixed"])
@pytest.mark.parametrize("teachers", ["one", "routed", "mixture"])
@pytest.mark.parametrize("gradient", ["recompute", "in_forward"])
@pytest.mark.parametrize(("size", "impl"), [(1, "torch"), (1, "cpp"), (2, "cpp"), (4, "torch"), (8, "cpp")])
def test_kinds_teachers_plans(
    ranks: Ranks, size: int, impl: str, gradient: str, teachers: str, kind: DivergenceKind
) -> None:
    case = Case(kind=kind, teachers=teachers, gradient=gradient, temperature=1.3, impl=impl)
    forward, backward = check(ranks, size, case)
    assert backward == 0
    if gradient == "recompute":
        assert forward == (0 if size == 1 else 2 if kind == "jsd" else 1)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "mixed"])
@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("gradient", ["recompute", "in_forward"])
@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_blocks_weights_main_grad(
    ranks: Ranks, size: int, main_grad: bool, gradient: str, small_blocks: bool, kind: str
) -> None:
    case = Case(kind=kind, gradient=gradient, main_grad=main_grad, small_blocks=small_blocks, weighted=True,
                teachers="routed", chunk_tokens=3, impl="cpp" if size == 2 else "torch")  # type: ignore[arg-type] # fmt: skip
    check(ranks, size, case)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("gradient", ["recompute", "in_forward"])
@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_bfloat16(ranks: Ranks, impl: str, small_blocks: bool, gradient: str, kind: DivergenceKind) -> None:
    case = Case(kind=kind, gradient=gradient, small_blocks=small_blocks, dtype=torch.bfloat16, impl=impl)
    check(ranks, 2, case, gradients=3e-3)


@pytest.mark.parametrize("teachers", ["one", "routed", "mixture"])
@pytest.mark.parametrize("gradient", ["auto", "recompute", "in_forward"])
@pytest.mark.parametrize(("size", "rows", "impl"), [(2, 96, "cpp"), (4, 64, "torch"), (4, 151, "cpp"), (8, 25, "auto")])
def test_padding_and_empty_shards(ranks: Ranks, size: int, rows: int, impl: str, gradient: str, teachers: str) -> None:
    """The ranks hold 96 55, 64 64 23 0, 151 0 0 0 or 25 six times, 1 and 0; the padding is NaN."""
    check(ranks, size, Case(rows_per_rank=rows, impl=impl, gradient=gradient, teachers=teachers, main_grad=size == 4))


@pytest.mark.parametrize("gradient", ["auto", "recompute", "in_forward"])
@pytest.mark.parametrize("flag", [False, True])
def test_main_grad_of_two_micro_batches(gradient: str, flag: bool) -> None:
    """Megatron's fp32 buffer gets both, unrounded, though the weight is bf16; with its flag autograd gets a dummy."""
    case = Case(dtype=torch.bfloat16, gradient=gradient)
    hidden, weight, states, heads, _, upstream = tensors(case)
    weight.requires_grad_()
    if flag:
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    main_grad = torch.zeros(weight.shape)
    if gradient != "in_forward":
        upstream = torch.ones(TOKENS)
    for _ in range(2):
        found = linear_divergence(hidden, weight, states[0], heads[0], gradient=gradient, main_grad=main_grad)  # type: ignore[arg-type]
        found.divergence.backward(upstream)
    want = expected_case(replace(case, gradient="in_forward"))[2] * upstream[0].double() / 0.7
    assert relative_error(main_grad, 2 * want) < 1e-5
    if flag:
        assert weight.grad_added_to_main_grad is True  # type: ignore[attr-defined]
        assert weight.grad is not None and weight.grad.shape == weight.shape and not weight.grad.any()
    else:
        assert weight.grad is None


def solve_statistics(group: ProcessGroup, gradient: str, small_blocks: bool) -> tuple[Tensor, ...]:
    hidden, weight, states, heads, _, _ = tensors(Case())
    shard = VocabShard.of_rank(-(-151 // dist.get_world_size(group)), 151, group)
    weight, head = (local_rows(each, shard, shard.rows) for each in (weight, heads[0]))
    if small_blocks:
        layer_blocks.BLOCK_ELEMENTS, layer_blocks.SMALLEST_SLAB = 64, 8
    try:
        found = linear_divergence(
            hidden.requires_grad_(), weight, states[0], head, "forward_kl", shard=shard,
            token_ids=torch.arange(TOKENS) * 12, chunk_tokens=4 if small_blocks else None,
            gradient=gradient, return_stats=True,  # type: ignore[arg-type]
        )  # fmt: skip
    finally:
        layer_blocks.BLOCK_ELEMENTS, layer_blocks.SMALLEST_SLAB = 1 << 22, 1024
    kept = found.reverse_kl, found.student_entropy, found.teacher_entropy, found.student_logprob, found.teacher_logprob
    assert found.agreement is not None
    return (*(each for each in kept if each is not None), found.agreement.double())


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("gradient", ["recompute", "in_forward"])
@pytest.mark.parametrize("size", [1, 4])
def test_statistics_are_those_of_the_logits(ranks: Ranks, size: int, gradient: str, small_blocks: bool) -> None:
    """Also of tokens and maxima in later blocks of the vocabulary."""
    hidden, weight, states, heads, _, _ = tensors(Case(dtype=torch.float64))
    ids = torch.arange(TOKENS) * 12
    want = reference.statistics(hidden @ weight.T, states[0] @ heads[0].T, ids, 1.0)
    assert 0.0 < want[5].mean() < 1.0
    for found in ranks.run(size, solve_statistics, gradient, small_blocks):
        torch.testing.assert_close(torch.stack([each.double() for each in found]), want, rtol=1e-5, atol=1e-5)


def test_gradient_in_forward_needs_one_upstream_gradient() -> None:
    hidden, weight, states, heads, _, _ = tensors(Case())
    weight.requires_grad_()
    value = linear_divergence(hidden, weight, states[0], heads[0], gradient="in_forward").divergence
    with pytest.raises(ValueError, match=r"it is 1\.0 to 2\.0: pass the factors of the rows as `weights`"):
        value.backward(torch.tensor([1.0, 2.0] + [1.0] * 11))


X, W = torch.zeros(3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_divergence(X, W, [X[:2], X[:1]], [W, W], teacher_index=torch.tensor([0, 1, 0])),
         "not sorted by teacher: row 2 has teacher 0 after 1"),
        (lambda: linear_divergence(X, W, [X[:2], X[:1]], [W, W], teacher_index=torch.tensor([0, 1, 1])),
         r"have \[2, 1\] rows, teacher_index says \[1, 2\]"),
        (lambda: linear_divergence(X, W, X, [W, W], teacher_index=torch.tensor([0, 1, 2])), "0 to 2, but there are 2"),
        (lambda: linear_divergence(X, W, X, [W, W]), "2 teacher heads in a list need a teacher_index"),
        (lambda: linear_divergence(X, W, [X], [W, W], teacher_mixture=[1.0]), "1 teacher_hidden, 2 heads, 1 mixture"),
        (lambda: linear_divergence(X, W, X, W, main_grad=torch.zeros(4, 4)), r"main_grad is \(4, 4\)"),
        (lambda: linear_divergence(X, W, X, W, gradient="both"), "gradient must be"),  # type: ignore[arg-type]
        (lambda: linear_divergence(X, W, X, W, weights=torch.ones(2)), r"weights are \(2,\)"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

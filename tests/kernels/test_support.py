"""Supports from hidden states, and the statistics of a top-k divergence: on 1 to 8 ranks, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import Support, TopkStats, VocabShard, layer_blocks, linear_support, reference, support, topk_divergence
from kernels.dispatch import Implementation
from kernels.support import SupportOf
from kernels.topk_divergence import TopkKind
from tests.kernels.problems import local_rows
from tests.kernels.ranks import Ranks
from tests.kernels.shares import Share, columns, draw, topk_expected
from tests.kernels.test_one_rank import LargestTensor

TOKENS, VOCAB, K = 9, 151, 6


def layers(dtype: torch.dtype, ties: bool) -> tuple[Tensor, ...]:
    """Hidden states and weights of student and teacher; with `ties` small integers, whose products are exact and often
    equal, across shards and blocks."""
    source = torch.Generator().manual_seed(4)
    shapes = ((TOKENS, 12), (VOCAB, 12), (TOKENS, 20), (VOCAB, 20))
    if ties:
        return tuple(torch.randint(-1, 2, shape, generator=source).to(dtype) for shape in shapes)
    return tuple(torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes)


def find(
    group: ProcessGroup, dtype: torch.dtype, ties: bool, k: int, of: SupportOf, impl: Implementation, rows: int,
    small_blocks: bool,
) -> Support:  # fmt: skip
    hidden, weight, teacher_hidden, teacher_weight = layers(dtype, ties)
    shard = VocabShard.of_rank(rows, VOCAB, group)
    heads = hidden, local_rows(weight, shard, rows), teacher_hidden, local_rows(teacher_weight, shard, rows)
    if of == "teacher":
        heads = None, None, *heads[2:]  # type: ignore[assignment]
    before = layer_blocks.BLOCK_ELEMENTS, layer_blocks.SMALLEST_SLAB
    if small_blocks:
        layer_blocks.BLOCK_ELEMENTS, layer_blocks.SMALLEST_SLAB = 64, 8
    try:
        chunk = 4 if small_blocks else None
        return linear_support(*heads, k, of, shard=shard, temperature=0.7, chunk_tokens=chunk, impl=impl)
    finally:
        layer_blocks.BLOCK_ELEMENTS, layer_blocks.SMALLEST_SLAB = before


def wanted(dtype: torch.dtype, ties: bool, k: int, of: SupportOf) -> tuple[Tensor, Tensor]:
    """By sorting all logits in float64; -1 and -inf for unused places."""
    hidden, weight, teacher_hidden, teacher_weight = (each.double() for each in layers(dtype, ties))
    z, t = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    mine, theirs = (each.sort(dim=-1, descending=True, stable=True).indices[:, :k] for each in (z, t))
    ids = {"teacher": theirs, "student": mine}.get(of)
    if ids is None:
        new = [[each if each not in row else -1 for each in own]
               for own, row in zip(mine.tolist(), theirs.tolist(), strict=True)]  # fmt: skip
        ids = torch.cat((theirs, torch.tensor(new)), 1)
    logprobs = (t / 0.7).log_softmax(-1).gather(1, ids.clamp(min=0))
    return ids, torch.where(ids >= 0, logprobs, -torch.inf)


@pytest.mark.parametrize("of", ["teacher", "student", "union"])
@pytest.mark.parametrize(("ties", "dtype"), [(False, torch.float64), (True, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize(
    ("size", "rows", "impl", "small_blocks"),
    [(1, 151, "torch", True), (1, 160, "auto", False), (2, 76, "auto", True), (4, 38, "torch", False),
     (4, 151, "torch", True), (8, 25, "auto", True)],
)  # fmt: skip
def test_from_hidden_states(
    ranks: Ranks, size: int, rows: int, impl: Implementation, small_blocks: bool, ties: bool, dtype: torch.dtype,
    of: SupportOf,
) -> None:  # fmt: skip
    """Padded and empty shards, too. Of equal logits the lowest id wins, on whichever rank and in whichever block."""
    found = ranks.run(size, find, dtype, ties, K, of, impl, rows, small_blocks)
    ids, logprobs = wanted(dtype, ties, K, of)
    for each in found:
        assert torch.equal(each.ids, ids)
        assert torch.equal(each.logprobs, found[0].logprobs)
    exact = dtype == torch.float64
    torch.testing.assert_close(found[0].logprobs.double(), logprobs, rtol=1e-12 if exact else 1e-6, atol=0.0)


@pytest.mark.parametrize("k", [1, 40, 151])
@pytest.mark.parametrize("size", [2, 8])
def test_more_than_a_shard_holds(ranks: Ranks, size: int, k: int) -> None:
    for found in ranks.run(size, find, torch.float32, True, k, "teacher", "cpp", -(-VOCAB // size), True):
        assert torch.equal(found.ids, wanted(torch.float32, True, k, "teacher")[0])


def test_same_as_from_logits() -> None:
    """Also where -inf fills up the last places, and for rows of which some are tied at the last place."""
    logits = torch.tensor(
        [[0.0, 3.0, 1.0, 1.0, 1.0], [-torch.inf, 5.0, -torch.inf, -torch.inf, 4.0], [5.0, 4, 3, 2, 1]]
    )
    found = support(None, logits, 3)
    assert found.ids.tolist() == [[1, 2, 3], [1, 4, 0], [0, 1, 2]]
    assert found.logprobs[1, 2] == -torch.inf
    head = logits.nan_to_num(neginf=-1e9).t().contiguous()
    assert linear_support(None, None, torch.eye(3), head, 3).ids.tolist() == found.ids.tolist()


def test_no_tensor_of_all_logits() -> None:
    hidden, weight = torch.randn(64, 24), torch.randn(1000, 24)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call, unused-ignore]
        linear_support(None, None, hidden, weight, 7, chunk_tokens=8)
    assert largest.elements <= 1000 * 24  # logits of all tokens would be 1000 * 64


def solve_stats(group: ProcessGroup | None, share: Share) -> TopkStats:
    drawn = draw(share)
    shard = VocabShard.of_rank(-(-share.vocab // (1 if group is None else group.size())), share.vocab, group)
    z, t = (columns(each, shard, shard.rows, False) for each in (drawn.student, drawn.teacher))
    chosen = support(z, t, share.k, share.of, shard=shard, temperature=share.temperature)  # type: ignore[arg-type]
    return topk_divergence(
        z, chosen.ids, chosen.logprobs, share.kind, form=share.form, shard=shard, temperature=share.temperature,  # type: ignore[arg-type]
        weights=drawn.weights, token_ids=drawn.token_ids, impl=share.impl, return_stats=True,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("form", ["raw", "tail", "renormalised"])
@pytest.mark.parametrize("of", ["teacher", "union"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize(("size", "impl", "dtype"), [(1, "cpp", torch.float32), (2, "torch", torch.bfloat16),
                                                     (4, "torch", torch.float64)])  # fmt: skip
def test_statistics(
    ranks: Ranks,
    size: int,
    impl: str,
    dtype: torch.dtype,
    kind: TopkKind,
    of: str,
    form: str,
) -> None:
    """Whatever kind and form are asked for."""
    share = Share(kind=kind, of=of, form=form, temperature=1.4, impl=impl, dtype=dtype)
    found = ranks.run(size, solve_stats, share)
    drawn = draw(share)
    z, t = drawn.student.double(), drawn.teacher.double()
    log_p, log_q = ((each / 1.4).log_softmax(-1) for each in (z, t))
    top = [[each.sort(dim=-1, descending=True, stable=True).indices[: share.k] for each in rows]
           for rows in ((t,) if of == "teacher" else (t, z))]  # fmt: skip
    inside = torch.zeros(z.shape, dtype=torch.bool)
    for side in top:
        inside.scatter_(1, torch.stack(side), True)
    p, q = (torch.where(inside, each.exp(), 0.0).sum(-1) for each in (log_p, log_q))
    kl = torch.where(inside, log_p.exp() * (log_p - log_q), 0.0).sum(-1) + (1 - p) * ((1 - p) / (1 - q)).log()
    got, close = found[0], 1e-12 if dtype == torch.float64 else 3e-6
    for other in found[1:]:
        assert torch.equal(other.reverse_kl, got.reverse_kl) and torch.equal(other.student_entropy, got.student_entropy)
    assert got.student_logprob is not None
    full = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (kl < full).all() and (kl > 0.05 * full).all()
    for mine, want in (
        (got.divergence, topk_expected(share, z, t)),
        (got.reverse_kl, kl),
        (got.student_mass, p),
        (got.teacher_mass, q),
        (got.student_entropy, reference.entropy(z, 1.4)),
        (got.student_logprob, log_p.gather(1, drawn.token_ids[:, None])[:, 0]),
    ):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.double(), want, rtol=10 * close, atol=close)


@pytest.mark.parametrize("weight", [None, torch.eye(3)])
def test_statistics_by_hand(weight: Tensor | None) -> None:
    """p = 1/2, 1/4, 1/4 from logits, or hidden states and the identity; the support is token 0 and an unused place."""
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log().requires_grad_()
    ids, log_q = torch.tensor([[0, -1]]), torch.tensor([[math.log(0.75), -torch.inf]])
    options = {"token_ids": torch.tensor([2]), "weights": torch.tensor([3.0]), "student_weight": weight}
    found = topk_divergence(logits, ids, log_q, return_stats=True, **options)  # type: ignore[call-overload]
    half = 0.5 * math.log(0.5 / 0.75)
    assert found.divergence.item() == pytest.approx(3 * (half - 0.5 + 0.75), rel=1e-6)
    assert found.reverse_kl.item() == pytest.approx(half + 0.5 * math.log(0.5 / 0.25), rel=1e-6)
    assert (found.student_mass.item(), found.teacher_mass.item()) == pytest.approx((0.5, 0.75), rel=1e-6)
    assert found.student_entropy.item() == pytest.approx(1.5 * math.log(2.0), rel=1e-6)
    assert found.student_logprob.item() == pytest.approx(math.log(0.25), rel=1e-6)
    statistics = (found.reverse_kl, found.student_mass, found.student_entropy, found.student_logprob)
    assert not any(each.requires_grad for each in statistics)
    (gradient,) = torch.autograd.grad(found.divergence.sum(), logits)
    # h = p log(p / q), dz_j = 3 h (1[j = 0] - p_j): the sampled token is in it only if it is in the support
    assert gradient[0].tolist() == pytest.approx([1.5 * half, -0.75 * half, -0.75 * half], rel=1e-5)
    plain = topk_divergence(logits, ids, log_q, weights=torch.tensor([3.0]), student_weight=weight)
    assert torch.equal(plain, found.divergence)


def test_the_target_may_be_in_the_support() -> None:
    """The same token twice among the log-probs: its gradient counts once, in bf16 too."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 4e-3)):
        logits = torch.tensor([[0.5, 1.0, -2.0], [1.0, 0.0, 0.25]]).to(dtype).requires_grad_()
        ids, log_q = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[-1.0, -0.5], [-2.0, -1.0]]).double()
        alone = topk_divergence(logits, ids, log_q)
        both = topk_divergence(logits, ids, log_q, token_ids=torch.tensor([1, 2]), return_stats=True).divergence
        want, got = (torch.autograd.grad(each.sum(), logits)[0] for each in (alone, both))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-12)

"""Log-probs of tokens and top-k divergences from logits: every implementation, 1 to 8 ranks, against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import VocabShard, reference, support, topk_divergence
from kernels.dispatch import Implementation
from kernels.support import SupportOf
from tests.kernels.problems import relative_error
from tests.kernels.ranks import Ranks
from tests.kernels.shares import Share, columns, draw, errors, share_expected, solve_share

PAIRS = ((1, "torch"), (1, "cpp"), (2, "cpp"), (4, "torch"), (8, "cpp"))
FORMS = ("raw", "tail", "renormalised")
BF16 = torch.bfloat16

VARIANTS = [
    Share(),
    Share(masked=True),
    Share(masked=True, vocab=1000, offsets=(40.0, -40.0)),
    Share(rows_per_rank=151),
    Share(rows_per_rank=100),
    Share(dtype=BF16),
    Share(dtype=BF16, temperature=2.0, vocab=1000),
    Share(dtype=BF16, spread=8.0, vocab=1000),
]
"""Beside those of `test_grid`."""


def compare(ranks: Ranks, size: int, share: Share, operation: str) -> tuple[int, int]:
    """Values to 3e-6, gradients to 1e-5; of bf16 logits to the rounding of the gradient."""
    found, want = ranks.run(size, solve_share, share, operation), share_expected(share, operation)
    value, gradient = errors(found, want)
    assert value < 3e-6
    assert gradient < (3e-3 if share.dtype == BF16 else 1e-5)
    if operation == "logprob":
        assert relative_error(found[0].stats[0], want.stats[0]) < 3e-6
        assert torch.equal(found[0].stats[1], want.stats[1])
    return found[0].collectives


def cases(operation: str) -> list[tuple[int, Share]]:
    """Every variant on 5 pairs of ranks and implementation, in place and each form in turn."""
    found = []
    for number, share in enumerate(VARIANTS):
        inplace = operation == "logprob" and number % 2 == 0
        for turn, (size, impl) in enumerate(PAIRS):
            if (share.rows_per_rank or share.vocab) * size >= share.vocab:
                form = FORMS[(number + turn) % 3]
                found.append((size, replace(share, impl=impl, inplace=inplace, form=form, of="union")))
    return found


@pytest.mark.parametrize(("size", "share"), cases("logprob"))
def test_token_logprob(ranks: Ranks, size: int, share: Share) -> None:
    """Also the entropy and the most likely token."""
    assert compare(ranks, size, share, "logprob") == (0 if size == 1 else 1, 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", ["teacher", "student", "union"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize(("size", "impl"), PAIRS[1:])
def test_topk(
    ranks: Ranks, size: int, impl: str, kind: Literal["reverse_kl", "forward_kl"], of: str, form: str
) -> None:
    share = Share(kind=kind, of=of, form=form, vocab=67, temperature=1.5, impl=impl)
    assert compare(ranks, size, share, "topk") == (0 if size == 1 else 4 if of == "union" else 3, 0)


@pytest.mark.parametrize(("size", "share"), cases("topk"))
def test_topk_variants(ranks: Ranks, size: int, share: Share) -> None:
    """bf16 logits have many equals: the lowest id wins, on whichever rank it is."""
    compare(ranks, size, share, "topk")


@pytest.mark.parametrize(("noise", "low", "high"), [(2e-3, 1e-8, 2e-5), (2e-2, 1e-6, 1e-3), (5.0, 1.0, 40.0)])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 4])
def test_topk_from_tiny_to_huge(
    ranks: Ranks, size: int, form: str, kind: Literal["reverse_kl", "forward_kl"], noise: float, low: float, high: float
) -> None:
    """log p is rounded to fp32, so to 1e-6 of a divergence of 1e-6 are 5e-4: what is stored is log p, not p / q."""
    share = Share(noise=noise, kind=kind, form=form, spread=4.0)
    found, want = ranks.run(size, solve_share, share, "topk"), share_expected(share, "topk")
    assert low < want.value.mean() < high
    value, gradient = errors(found, want)
    assert value < (1e-5 if form == "tail" else 1e-6) + 3e-7 / want.value.mean().sqrt()
    assert gradient < 1e-5 + 1e-6 / noise


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", ["teacher", "student", "union"])
@pytest.mark.parametrize("size", [1, 8])
def test_topk_of_what_one_side_excludes(
    ranks: Ranks, size: int, of: str, form: str, kind: Literal["reverse_kl", "forward_kl"]
) -> None:
    """-inf counts as 1e4 below the maximum, as in `divergence`: much, but neither inf nor NaN."""
    share = Share(one_sided=True, kind=kind, of=of, form=form)
    found, want = ranks.run(size, solve_share, share, "topk"), share_expected(share, "topk")
    assert want.grad.isfinite().all() and want.value.isfinite().all()
    searched = ("student", "union") if kind == "reverse_kl" else ("teacher", "union")
    assert (want.value.max() > 100.0) == (of in searched)
    value, gradient = errors(found, want)
    assert value < 1e-5
    assert gradient < 2e-5


def test_topk_of_everything_is_the_divergence() -> None:
    drawn = draw(Share(vocab=32))
    ids = torch.arange(32).expand(11, 32)
    log_q = drawn.teacher.log_softmax(-1)
    for form in FORMS:
        value = topk_divergence(drawn.student, ids, log_q, form=form)  # type: ignore[arg-type]
        torch.testing.assert_close(value, reference.reverse_kl(drawn.student, drawn.teacher), rtol=1e-5, atol=1e-6)


def search(group: ProcessGroup, logits: Tensor, k: int, of: SupportOf) -> tuple[Tensor, Tensor]:
    shard = VocabShard.of_rank(5, logits.shape[1], group)
    local = columns(logits, shard, 5, False)
    found = support(-local, local, k, of, shard=shard)
    return found.ids, found.logprobs


@pytest.mark.parametrize("k", [1, 6, 12, 17])
@pytest.mark.parametrize("size", [4, 8])
def test_support_of_few_possible_tokens(ranks: Ranks, size: int, k: int) -> None:
    """17 tokens on ranks of 5 (and empty ones), most of them impossible, ties among the others."""
    logits = torch.full((3, 17), -torch.inf)
    logits[:, 3:14:2] = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 0.0])
    want = logits.sort(dim=-1, descending=True, stable=True)
    for ids, logprobs in ranks.run(size, search, logits, k, "teacher"):
        assert torch.equal(ids, want.indices[:, :k])
        torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, ids))


def test_union_names_each_token_once(ranks: Ranks) -> None:
    logits = torch.randn(5, 17, generator=torch.Generator().manual_seed(1))
    for ids, logprobs in ranks.run(4, search, logits, 10, "union"):
        for row, of_row in enumerate(ids.tolist()):
            used = [each for each in of_row if each >= 0]
            top = {*logits[row].topk(10).indices.tolist(), *(-logits[row]).topk(10).indices.tolist()}
            assert len(used) == len({*used}) and {*used} == top
        assert torch.equal(logprobs == -torch.inf, ids < 0)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_a_sampled_token_that_is_impossible(impl: Implementation) -> None:
    """Log-prob -inf, a finite gradient: that of a logit that is merely very small."""
    logits = torch.tensor([[1.0, -torch.inf, 0.0]], requires_grad=True)
    ids = torch.tensor([[1, 2, -1]])
    value = topk_divergence(logits, ids, torch.tensor([[-2.0, -1.0, -torch.inf]]), "forward_kl", impl=impl)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    q = torch.tensor([-2.0, -1.0]).exp()
    p = torch.tensor([1.0, 0.0]).softmax(0)
    assert 1e3 < value.item() < 1e4
    # dz_j = h_j - p_j sum h with h = p - q on the support
    h = torch.tensor([0.0, -q[0], p[1] - q[1]])
    want = h - torch.tensor([p[0], 0.0, p[1]]) * h.sum()
    torch.testing.assert_close(gradient[0], want, rtol=1e-5, atol=1e-6)

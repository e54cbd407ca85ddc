"""Operations on logits: every kind, on 1 to 8 gloo ranks, values and gradients against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kernels import DivergenceKind, VocabShard, divergence, reference, topk_divergence
from kernels.objective import Objective
from tests.kernels.ranks import Ranks
from tests.kernels.shares import Share, draw, errors, share_expected, solve_share, solve_stats

KINDS = ("reverse_kl", "forward_kl", "jsd", "mixed")
SIZES = (1, 2, 4, 8)
IMPLS = ("torch", "cpp")
PAIRS = ((1, "cpp"), (2, "cpp"), (4, "torch"), (8, "cpp"))


def compare(
    ranks: Ranks, size: int, share: Share, values: float, gradients: float, operation: str = "divergence"
) -> tuple[int, int]:
    found = ranks.run(size, solve_share, share, operation)
    value, gradient = errors(found, share_expected(share, operation))
    assert value < values
    assert gradient < gradients
    return found[0].collectives


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", SIZES)
def test_float32(ranks: Ranks, size: int, impl: str, kind: DivergenceKind) -> None:
    """Other vocabularies, offsets, temperatures and so on: `test_grid`."""
    collectives = compare(ranks, size, Share(seed=151, kind=kind, impl=impl), 2e-6, 1e-5)
    assert collectives == (0 if size == 1 else 2 if kind == "jsd" else 1, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4])
def test_float64(ranks: Ranks, size: int, kind: DivergenceKind) -> None:
    compare(ranks, size, Share(dtype=torch.float64, kind=kind, temperature=0.7), 1e-13, 1e-12)


VARIANTS = [
    Share(masked=True, vocab=1000, offsets=(40.0, -40.0)),
    Share(weighted=True),
    Share(weighted=True, temperature=0.5, inplace=True),
    Share(inplace=True),
    Share(rows_per_rank=151),
    Share(rows_per_rank=100),
]
"""With 151 or 100 rows a rank, the others hold only padding and, from 4 ranks, nothing at all."""


def runs(share: Share, size: int) -> bool:
    return (share.rows_per_rank or 151) * size >= share.vocab


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "impl", "share"), [(*pair, each) for pair in PAIRS for each in VARIANTS if runs(each, pair[0])]
)
def test_variants(ranks: Ranks, size: int, share: Share, impl: str, kind: DivergenceKind) -> None:
    compare(ranks, size, replace(share, kind=kind, impl=impl), 3e-6, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [Share(), *VARIANTS])
def test_reference_implementation(share: Share, kind: DivergenceKind) -> None:
    """On one rank; in the dtype of accumulation, so that it spends the digits that the other ones keep."""
    share = replace(share, kind=kind, impl="reference", rows_per_rank=None)
    value, gradient = errors([solve_share(None, share)], share_expected(share))
    assert value < 1e-5
    assert gradient < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_bfloat16(ranks: Ranks, size: int, impl: str, inplace: bool, kind: DivergenceKind) -> None:
    """What is left is the rounding of the gradient itself: the reference gets the very same bf16 logits."""
    for temperature in (1.0, 0.7):
        share = Share(dtype=torch.bfloat16, kind=kind, inplace=inplace, vocab=1000, impl=impl, temperature=temperature)
        compare(ranks, size, share, 3e-6, 3e-3)


@pytest.mark.parametrize(
    ("noise", "low", "high", "values", "gradients"),
    [
        (0.14, 2e-3, 2e-2, 1e-5, 1e-5),
        (1.0, 0.1, 2.0, 3e-6, 1e-5),
    ],
)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "mixed", "jsd"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_between(
    ranks: Ranks, size: int, impl: str, kind: DivergenceKind, noise: float, low: float, high: float,
    values: float, gradients: float,
) -> None:  # fmt: skip
    share = Share(vocab=1000, noise=noise, kind=kind, offsets=(0.0, 3.0), impl=impl)
    drawn = draw(share)
    kl = reference.reverse_kl(drawn.student.double(), drawn.teacher.double())
    assert low < kl.min() and kl.max() < high
    compare(ranks, size, share, values, gradients)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("size", "kind"),
    [*((1, kind) for kind in KINDS), (2, "mixed"), (4, "reverse_kl"), (8, "forward_kl"), (8, "jsd")],
)
def test_a_real_vocabulary(ranks: Ranks, size: int, kind: DivergenceKind, impl: str) -> None:
    compare(ranks, size, Share(vocab=151936, tokens=2, spread=3.0, kind=kind, impl=impl), 1e-5, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_impossible_on_one_side(ranks: Ranks, size: int, impl: str, kind: DivergenceKind) -> None:
    """-inf counts as 1e4 below the maximum of the part of the vocabulary that is looked at: a lane, a shard, a row."""
    share = Share(one_sided=True, kind=kind, impl=impl)
    allowed = 3e-6 if kind == "jsd" or impl == "reference" else 1e-3
    want = share_expected(share)
    assert kind == "jsd" or (want.value.min() > 10 and want.value.max() < 1e4)
    if impl != "reference":
        compare(ranks, size, share, allowed, 3e-3 if kind == "reverse_kl" else max(allowed, 1e-5))
    elif size == 1:
        value, gradient = errors([solve_share(None, share)], want)
        assert value < allowed
        assert gradient < 1e-5


@pytest.mark.parametrize("size", [1, 2, 8])
def test_statistics(ranks: Ranks, size: int) -> None:
    share = Share(vocab=151, kind="forward_kl", noise=2.0, seed=3)
    drawn = draw(share)
    z, t = drawn.student.double(), drawn.teacher.double()
    want = reference.statistics(z, t, drawn.token_ids, 1.0)
    assert 0 < want[5].sum() < 11
    for stats in ranks.run(size, solve_stats, share):
        found = (stats.reverse_kl, stats.student_entropy, stats.teacher_entropy, stats.student_logprob,
                 stats.teacher_logprob, stats.agreement)  # fmt: skip
        for got, right in zip(found, want, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=3e-6, atol=1e-6)


def test_second_backward_in_place() -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    loss = divergence(logits * 1, torch.randn(3, 8), inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="second backward"):
        loss.backward()


def test_in_place_is_in_place() -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    middle = logits * 1
    divergence(middle, torch.randn(3, 8), inplace=True).sum().backward()
    assert logits.grad is not None
    assert torch.equal(middle.detach(), logits.grad)


def test_teacher_excludes_what_the_student_likes() -> None:
    """Large, finite, and with a gradient that pushes away from it."""
    logits = torch.tensor([[2.0, 0.0, 1.0]], requires_grad=True)
    value = divergence(logits, torch.tensor([[-torch.inf, 0.0, 1.0]]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert 1e3 < value.item() < 1e5
    assert gradient[0, 0] > 100 and gradient.isfinite().all()


Z, IDS = torch.zeros(2, 5), torch.tensor([[0, 1], [2, -1]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergence(Z, Z[:1]), r"\(2, 5\), teacher_logits \(1, 5\)"),
        (lambda: divergence(Z, Z.double()), "torch.float32 and torch.float64"),
        (lambda: divergence(Z.long(), Z.long()), "expected one floating dtype"),
        (lambda: divergence(Z, Z, "l2"), "kind must be one of .* got 'l2'"),  # type: ignore[call-overload]
        (lambda: divergence(Z, Z, impl="gpu"), "impl must be one of .* got 'gpu'"),  # type: ignore[call-overload]
        (lambda: divergence(Z, Z, temperature=0.0), "temperature must be positive"),
        (lambda: divergence(Z, Z, weights=torch.ones(3)), r"weights are \(3,\)"),
        (lambda: divergence(Z, Z, token_ids=torch.tensor([0, 5])), "token id 5 is outside"),
        (lambda: divergence(Z, Z, shard=VocabShard.whole(6)), r"the shard holds rows \[0, 6\) of 6"),
        (lambda: Objective("jsd", beta=1.0), r"beta must be in \(0, 1\)"),
        (lambda: Objective("mixed", alpha=1.5), r"alpha must be in \[0, 1\]"),
        (lambda: topk_divergence(Z, IDS, Z[:, :2], "jsd"), "kind must be reverse_kl or forward_kl"),  # type: ignore[arg-type]
        (lambda: topk_divergence(Z, IDS + 4, Z[:, :2]), "token id"),
        (lambda: topk_divergence(Z, IDS * 0, Z[:, :2]), "token id 0 is twice in row 0"),
        (lambda: topk_divergence(Z, IDS, Z), r"topk_logprobs are \(2, 5\)"),
        (lambda: topk_divergence(Z, IDS, Z[:, :2], form="top"), "form must be one of"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_run_here_says_so() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="impl='triton' cannot run here: "):
            divergence(Z, Z, impl="triton")

"""Run by `test_operations_in_triton.py` under TRITON_INTERPRET=1: whole operations on 1 and 2 ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import DivergenceKind
from tests.kernels.problems import Problem, expected, joined, relative_error, solve
from tests.kernels.ranks import Ranks
from tests.kernels.shares import Share, errors, share_expected, solve_share
from tests.kernels.test_linear import Case, check
from tests.kernels.test_support import find, wanted

KINDS = ("reverse_kl", "forward_kl", "jsd", "mixed")


WEIGHTED = Share(weighted=True, temperature=0.5, inplace=True, tokens=7)
MASKED = Share(offsets=(40.0, -40.0), masked=True, tokens=3)
STRIDED = Share(rows_per_rank=151, strided=True, tokens=2)


@pytest.mark.parametrize(
    ("size", "share", "kind"),
    [
        *((1, WEIGHTED, kind) for kind in KINDS),
        *((2, MASKED, kind) for kind in ("reverse_kl", "jsd")),
        *((2, STRIDED, kind) for kind in ("forward_kl", "mixed")),
    ],
)
def test_divergence(ranks: Ranks, size: int, share: Share, kind: DivergenceKind) -> None:
    share = replace(share, kind=kind, impl="triton")
    found, want = ranks.run(size, solve_share, share), share_expected(share)
    value, gradient = errors(found, want)
    assert value < 5e-6
    assert gradient < 2e-5
    assert found[0].collectives == (0 if size == 1 else 2 if kind == "jsd" else 1, 0)


@pytest.mark.parametrize(
    ("size", "kind", "share"),
    [
        (1, "reverse_kl", Share(tokens=0)),
        (2, "mixed", Share(tokens=0, vocab=32)),
        (4, "forward_kl", Share(tokens=1, vocab=32, temperature=2.0)),
        (8, "reverse_kl", Share(tokens=1, vocab=32, rows_per_rank=5)),
        (4, "mixed", Share(tokens=2, vocab=1000, noise=5.0, offsets=(-40.0, 40.0))),
        (8, "jsd", Share(tokens=2, vocab=1000, noise=5.0, temperature=0.5)),
        (8, "reverse_kl", Share(tokens=1, vocab=151936, spread=3.0)),
        (8, "jsd", Share(tokens=1, vocab=151936, spread=3.0)),
    ],
)
def test_sizes(ranks: Ranks, size: int, kind: DivergenceKind, share: Share) -> None:
    """No row, one row, ranks that hold two tokens or none, and 18,992 of 151,936."""
    share = replace(share, kind=kind, impl="triton")
    value, gradient = errors(ranks.run(size, solve_share, share), share_expected(share))
    assert value < 5e-6
    assert gradient < 2e-5


@pytest.mark.parametrize(("noise", "values", "gradients"), [(1.4e-3, 5e-3, 2e-3), (1.4e-2, 1e-4, 2e-4)])
def test_small_divergence(ranks: Ranks, noise: float, values: float, gradients: float) -> None:
    """KL of 1e-6 and 1e-4."""
    for kind in KINDS[:2]:
        share = Share(vocab=4096 * 4, noise=noise, kind=kind, impl="triton", tokens=2)  # all in the main loop
        value, gradient = errors(ranks.run(4, solve_share, share), share_expected(share))
        assert value < values
        assert gradient < gradients


@pytest.mark.parametrize("operation", ["logprob", "topk"])
@pytest.mark.parametrize(
    ("size", "share"),
    [
        (4, Share(tokens=1, vocab=32, offsets=(40.0, 40.0))),
        (2, Share(tokens=0)),
        (8, Share(tokens=2, vocab=1000, temperature=0.5, strided=True)),
    ],
)
def test_tokens_of_other_sizes(ranks: Ranks, size: int, share: Share, operation: str) -> None:
    share = replace(share, impl="triton", form="tail")
    value, gradient = errors(ranks.run(size, solve_share, share, operation), share_expected(share, operation))
    assert value < 3e-6
    assert gradient < 1e-5


@pytest.mark.parametrize("operation", ["logprob", "topk"])
@pytest.mark.parametrize(("size", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_tokens(ranks: Ranks, size: int, dtype: torch.dtype, operation: str) -> None:
    share = Share(tokens=4, impl="triton", dtype=dtype, masked=True)
    value, gradient = errors(ranks.run(size, solve_share, share, operation), share_expected(share, operation))
    assert value < 3e-6
    assert gradient < (1e-5 if dtype == torch.float32 else 2**-7)  # the interpreter cuts off where the GPU rounds


@pytest.mark.parametrize("operation", ["divergence", "logprob", "topk"])
def test_from_hidden_states(ranks: Ranks, operation: str) -> None:
    problem = Problem(tokens=4, impl="triton", chunk_tokens=3)
    got, want = joined(ranks.run(2, solve, problem, operation), problem), expected(problem, operation)
    assert relative_error(got.value, want.value) < 5e-6
    assert relative_error(got.hidden_grad, want.hidden_grad) < 2e-5
    assert relative_error(got.weight_grad, want.weight_grad) < 2e-5


def test_support_from_hidden_states(ranks: Ranks) -> None:
    ids, logprobs = wanted(torch.float32, True, 6, "union")
    for found in ranks.run(2, find, torch.float32, True, 6, "union", "triton", 80, False):
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.logprobs.double(), logprobs, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("teachers", "gradient"), [("routed", "in_forward")])
def test_teachers(ranks: Ranks, teachers: str, gradient: str) -> None:
    check(ranks, 2, Case(teachers=teachers, gradient=gradient, kind="mixed", impl="triton"), 5e-6, 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_on_one_side(ranks: Ranks, kind: DivergenceKind) -> None:
    """-inf counts as 1e4 below the maximum, as in the other implementations."""
    share = Share(one_sided=True, kind=kind, impl="triton", tokens=2)
    value, gradient = errors(ranks.run(2, solve_share, share), share_expected(share))
    assert value < 1e-3
    assert gradient < 3e-3

"""Every operation with every implementation that runs on a CPU, on 1, 2, 4 and 8 ranks, over what logits can be:
vocabularies, offsets, excluded tokens, divergences of 1e-6 to 10, temperatures, no row and one, strides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import DivergenceKind, VocabShard, divergence, reference, token_logprob
from kernels.dispatch import Implementation
from tests.kernels.problems import Problem, expected, joined, relative_error, solve
from tests.kernels.ranks import Ranks
from tests.kernels.shares import Share, columns, draw, errors, share_expected, solve_share
from tests.kernels.test_linear import Case, check, expected_case

KINDS = ("reverse_kl", "forward_kl", "jsd", "mixed")
FORMS = ("raw", "tail", "renormalised")
SIZES = (1, 2, 4, 8)
IMPLS = ("torch", "cpp")

LOGITS = {
    "vocabulary of 32": Share(vocab=32),
    "vocabulary of 1000": Share(vocab=1000),
    "offsets up and down": Share(offsets=(40.0, -40.0)),
    "offsets down and up": Share(offsets=(-40.0, 40.0)),
    "excluded by both": Share(masked=True, vocab=1000),
    "KL of 1e-6": Share(vocab=1000, noise=1.4e-3, offsets=(0.0, 3.0)),
    "KL of 1e-4": Share(vocab=1000, noise=1.4e-2, offsets=(0.0, 3.0)),
    "KL of 10": Share(vocab=1000, noise=5.0, offsets=(0.0, 3.0)),
    "cold": Share(temperature=0.5),
    "hot": Share(temperature=2.0),
    "no row": Share(tokens=0),
    "one row": Share(tokens=1),
    "strided": Share(strided=True),
    "strided and padded": Share(strided=True, rows_per_rank=160),
}
TOLERANCES = {"KL of 1e-6": (1e-3, 1e-3), "KL of 1e-4": (1e-4, 1e-4)}
"""Of values and gradients; else 3e-6 and 1e-5."""


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize(("size", "impl"), [*((size, impl) for size in SIZES for impl in IMPLS), (1, "reference")])
def test_divergence(ranks: Ranks, size: int, impl: str, name: str) -> None:
    values, gradients = TOLERANCES.get(name, (3e-6, 1e-5))
    if impl == "reference":  # the specification in fp32: log-sum-exps lose what the others keep
        values, gradients = (10 * values, 10 * gradients) if name not in TOLERANCES else (1.0, 0.2)
    for kind in KINDS:
        share = replace(LOGITS[name], kind=kind, impl=impl)
        value, gradient = errors(ranks.run(size, solve_share, share), share_expected(share))
        assert value < values, kind
        assert gradient < gradients, kind


@pytest.mark.parametrize(("name", "low", "high"), [("KL of 1e-6", 1e-7, 2e-6), ("KL of 1e-4", 3e-5, 2e-4),
                                                   ("KL of 10", 5.0, 20.0)])  # fmt: skip
def test_these_divergences_are_so_large(name: str, low: float, high: float) -> None:
    drawn = draw(LOGITS[name])
    kl = reference.reverse_kl(drawn.student.double(), drawn.teacher.double())
    assert low < kl.min() and kl.max() < high
    if name in LAYERS:
        assert low < expected_case(LAYERS[name])[0].mean() < high


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", SIZES)
def test_tokens(ranks: Ranks, size: int, impl: str, name: str) -> None:
    """Log-probs, entropies and most likely tokens; top-k divergences and the supports they are on."""
    place = list(LOGITS).index(name)
    share = replace(LOGITS[name], impl=impl)
    found, want = ranks.run(size, solve_share, share, "logprob"), share_expected(share, "logprob")
    value, gradient = errors(found, want)
    assert value < 3e-6 and gradient < 1e-5
    assert relative_error(found[0].stats[0], want.stats[0]) < 3e-6
    assert torch.equal(found[0].stats[1], want.stats[1])
    # log p is stored in fp32, so of a small divergence sqrt(1e-7 / KL) or so is lost
    values, gradients = {"KL of 1e-6": (3e-3, 3e-3), "KL of 1e-4": (3e-4, 3e-4)}.get(name, (3e-6, 1e-5))
    for kind in KINDS[:2]:
        topk = replace(share, kind=kind, form=FORMS[(place + size) % 3], of=("teacher", "student", "union")[place % 3])
        value, gradient = errors(ranks.run(size, solve_share, topk, "topk"), share_expected(topk, "topk"))
        assert value < values, topk
        assert gradient < gradients, topk


def solve_with_nan(group: ProcessGroup, kind: DivergenceKind, impl: Implementation) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence, gradients of it and of log-probs; the student has a NaN in row 1, the teacher in 3."""
    drawn = draw(Share(tokens=5))
    student, teacher = drawn.student.clone(), drawn.teacher.clone()
    student[1, 20], teacher[3, 140] = torch.nan, torch.nan
    shard = VocabShard.of_rank(-(-151 // group.size()), 151, group)
    z, t = (columns(each, shard, shard.rows, False) for each in (student, teacher))
    z.requires_grad_()
    value = divergence(z, t, kind, shard=shard, impl=impl)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    logprob = token_logprob(z, None, drawn.token_ids, shard=shard, impl=impl).logprob
    return value.detach(), gradient, torch.autograd.grad(logprob.sum(), z)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 2])
def test_nan_is_its_row_s_alone(ranks: Ranks, size: int, impl: Implementation, kind: DivergenceKind) -> None:
    bad = torch.tensor([False, True, False, True, False])
    for value, gradient, of_logprob in ranks.run(size, solve_with_nan, kind, impl):
        assert torch.equal(value.isnan(), bad)
        assert gradient[bad].isnan().all() and gradient[~bad].isfinite().all()
        assert of_logprob[1].isnan().all() and of_logprob[[0, 2, 3, 4]].isfinite().all()


LAYERS = {
    "vocabulary of 32": Case(vocab=32),
    "vocabulary of 1000": Case(vocab=1000),
    "offsets up and down": Case(offset=40.0),
    "offsets down and up": Case(offset=-40.0),
    "excluded": Case(excluded=True),
    "KL of 1e-4": Case(noise=6e-3),
    "KL of 1e-4, in float64": Case(noise=6e-3, dtype=torch.float64),
    "KL of 10": Case(noise=3.0),
    "cold": Case(temperature=0.5),
    "hot": Case(temperature=2.0),
    "no row": Case(tokens=0),
    "one row": Case(tokens=1),
    "strided": Case(strided=True),
    "strided, in bf16": Case(strided=True, dtype=torch.bfloat16),
}


LAYER_TOLERANCES = {"excluded": (1e-3, 3e-3), "strided, in bf16": (2e-6, 3e-3), "KL of 1e-4": (1e-4, 1e-4)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("gradient", ["auto", "recompute", "in_forward"])
@pytest.mark.parametrize("size", SIZES)
def test_linear_divergence(ranks: Ranks, size: int, gradient: str, name: str) -> None:
    """Where one side excludes tokens, values of 1e3 and more depend in the fourth digit on the parts."""
    place = list(LAYERS).index(name)
    impl = "auto" if gradient == "auto" else IMPLS[(place + size) % 2]
    impl = "torch" if LAYERS[name].dtype == torch.float64 else impl
    values, gradients = LAYER_TOLERANCES.get(name, (3e-6, 1e-5))
    for kind in KINDS[:1] if gradient == "auto" else KINDS:
        check(ranks, size, replace(LAYERS[name], kind=kind, gradient=gradient, impl=impl), values, gradients)


@pytest.mark.parametrize("operation", ["divergence", "logprob", "topk"])
@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("size", SIZES)
def test_strided_layers(ranks: Ranks, size: int, impl: str, operation: str) -> None:
    problem = Problem(strided=True, impl=impl)  # type: ignore[arg-type]
    got, want = joined(ranks.run(size, solve, problem, operation), problem), expected(problem, operation)
    assert relative_error(got.value, want.value) < 2e-6
    assert relative_error(got.hidden_grad, want.hidden_grad) < 1e-5
    assert relative_error(got.weight_grad, want.weight_grad) < 1e-5

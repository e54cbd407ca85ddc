"""What needs no second rank: the noise floor, memory, extremes, autograd's corners and bad input."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import VocabShard, dispatch, layer_blocks, linear_divergence, rows_cpp, rows_torch, token_logprob
from tests.kernels.problems import Problem, expected, make_inputs, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_student_equal_to_teacher(chunk_tokens: int | None, dtype: torch.dtype) -> None:
    inputs = make_inputs(Problem(vocab=1000, tokens=50, dtype=dtype))
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    stats = linear_divergence(hidden, weight, hidden, weight, chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(stats.divergence.sum(), (hidden, weight))
    assert stats.divergence.abs().max() < 1e-7
    assert all(gradient.norm() < 1e-6 for gradient in gradients)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return result


def losses(problem: Problem) -> tuple[Callable[[int | None], Tensor], tuple[Tensor, Tensor]]:
    """Both operations in one loss, as a function of `chunk_tokens`, and the leaves to differentiate it by."""
    inputs = make_inputs(problem)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()

    def both(chunk_tokens: int | None) -> Tensor:
        teacher_hidden, teacher_weight = inputs.teacher_hidden, inputs.teacher_weight
        stats = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, chunk_tokens=chunk_tokens)
        tokens = token_logprob(hidden, weight, inputs.token_ids, chunk_tokens=chunk_tokens)
        return (stats.divergence + tokens.logprob) @ inputs.upstream

    return both, (hidden, weight)


def test_no_tensor_of_all_logits() -> None:
    both, leaves = losses(Problem(tokens=64, vocab=1000))
    with LargestTensor() as largest:  # type: ignore[no-untyped-call, unused-ignore]
        torch.autograd.grad(both(8), leaves)
    assert largest.elements == 1000 * 32  # the teacher's weight; the logits of all tokens would be 1000 * 64


def test_sums_of_slabs_are_merged_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 slabs of 5 rows: kept until the end their sums would be the largest tensor, [200, 6, 64]."""
    both, leaves = losses(Problem(tokens=64, vocab=1000))
    want = torch.autograd.grad(both(64), leaves)
    monkeypatch.setattr(layer_blocks, "BLOCK_ELEMENTS", 5 * 32)
    monkeypatch.setattr(layer_blocks, "SMALLEST_SLAB", 5)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call, unused-ignore]
        got = torch.autograd.grad(both(32), leaves)
    assert largest.elements == 1000 * 32
    assert max(map(relative_error, got, want)) < 1e-6


def test_small_problems_take_torch() -> None:
    """Of a few logits a call of the C++ library, or building it, would cost more than it brings."""
    small, large = dispatch.WORTH_COMPILING - 1, 2 * dispatch.WORTH_COMPILING
    cpu = torch.device("cpu")
    assert dispatch.row_kernels("auto", cpu, torch.float32, small) is rows_torch
    assert dispatch.row_kernels("auto", cpu, torch.float16, large) is rows_torch
    assert dispatch.row_kernels("auto", cpu, torch.bfloat16, large) is rows_cpp


def test_default_blocks_grow_with_nothing() -> None:
    for tokens, rows in ((64, 151936), (1000, 151936), (100_000, 151936), (1000, 32)):
        slabs, chunks = layer_blocks.cut(tokens, rows, 2048, None, None)
        assert (slabs[-1].stop, chunks[-1].stop) == (rows, tokens)
        sizes = [max(piece.stop - piece.start for piece in pieces) for pieces in (slabs, chunks)]
        assert sizes[0] * sizes[1] <= layer_blocks.BLOCK_ELEMENTS
        assert sizes[0] * 2048 <= layer_blocks.BLOCK_ELEMENTS


def test_kept_and_recomputed_logits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    both, leaves = losses(Problem(dtype=torch.float64, tokens=20))
    kept = torch.autograd.grad(both(None), leaves)
    for module in (linear_divergence_module, token_logprob_module):
        monkeypatch.setattr(module, "KEPT_ELEMENTS", 0)
    for again, first in zip(torch.autograd.grad(both(None), leaves), kept, strict=True):
        assert relative_error(again, first) < 1e-14


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_backward_twice(chunk_tokens: int | None) -> None:
    both, leaves = losses(Problem())
    loss = both(chunk_tokens)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves), first))


def test_only_what_is_asked_for() -> None:
    both, (hidden, weight) = losses(Problem())
    want = torch.autograd.grad(both(None), (hidden, weight))
    for frozen, free, gradient in ((weight, hidden, want[0]), (hidden, weight, want[1])):
        frozen.requires_grad_(False)
        for chunk_tokens in (None, 3):
            assert relative_error(torch.autograd.grad(both(chunk_tokens), free)[0], gradient) < 1e-5
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not both(None).requires_grad
    with torch.inference_mode():
        assert not both(None).requires_grad


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_teacher_scored_in_inference_mode(chunk_tokens: int | None) -> None:
    problem = Problem()
    inputs, want = make_inputs(problem), expected(problem, "divergence")
    with torch.inference_mode():
        teacher_hidden, teacher_weight = inputs.teacher_hidden.clone(), inputs.teacher_weight.clone()
    hidden = inputs.hidden.requires_grad_()
    stats = linear_divergence(hidden, inputs.weight, teacher_hidden, teacher_weight, chunk_tokens=chunk_tokens)
    (gradient,) = torch.autograd.grad(stats.divergence, hidden, inputs.upstream)
    assert relative_error(gradient, want.hidden_grad) < 1e-5


def test_far_apart() -> None:
    """The student is certain of what the teacher finds impossible: large, not infinite, not NaN."""
    hidden = torch.tensor([[0.0, -200.0, -300.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 0.0, -300.0]])
    eye = torch.eye(3)
    stats = linear_divergence(hidden, eye, teacher, eye)
    (gradient,) = torch.autograd.grad(stats.divergence.sum(), hidden)
    assert stats.divergence.item() == pytest.approx(200.0, rel=1e-6)
    assert gradient.abs().max() < 1e-6


def test_token_outside_the_vocabulary() -> None:
    hidden, weight = torch.zeros(2, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match="token id 5 is outside the vocabulary of 5"):
        token_logprob(hidden, weight, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="token id -1 "):
        token_logprob(hidden, weight, torch.tensor([-1, 0]))


linear_divergence_module = sys.modules["kernels.linear_divergence"]
token_logprob_module = sys.modules["kernels.token_logprob"]

X, W, IDS = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_divergence(X, W, X, W, kind="kl"),  # type: ignore[arg-type]
         "kind must be one of reverse_kl, forward_kl, jsd, mixed, got 'kl'"),
        (lambda: linear_divergence(X, W, X[:1], W), "2 rows on cpu, teacher_hidden 1 rows"),
        (lambda: linear_divergence(X, W, X, W[:4]), r"\(5, 4\) and \(4, 4\): pass a shard"),
        (lambda: linear_divergence(X, W[:, :3], X, W), r"student_hidden \(2, 4\), student_weight \(5, 3\)"),
        (lambda: linear_divergence(X, W, X.double(), W), "teacher_hidden is torch.float64"),
        (lambda: linear_divergence(X, W.to("meta"), X, W), "student_weight on meta"),
        (lambda: linear_divergence(X, W, X, W, chunk_tokens=0), "chunk_tokens must be at least 1, got 0"),
        (lambda: token_logprob(X, W, IDS[:1]), r"token_ids are \(1,\) torch.int64: expected \(2,\)"),
        (lambda: token_logprob(X, W, IDS.float()), "token_ids are .* torch.float32"),
        (lambda: token_logprob(X, W, IDS, temperature=0.0), "temperature must be positive and finite"),
        (lambda: token_logprob(X, W, IDS, shard=VocabShard.whole(6)), r"the shard holds rows \[0, 6\) of 6"),
        (lambda: VocabShard(0, 3, 5), "pass the group"),
        (lambda: VocabShard(3, 2, 5), r"rows \[3, 2\) are not a part"),
        (lambda: VocabShard.of_rank(4, 5, None), r"1 rank\(s\) of 4 rows cannot hold a vocabulary of 5"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_padding_on_one_rank() -> None:
    inputs = make_inputs(Problem(vocab=32))
    padded = torch.cat((inputs.weight, torch.full((96, 24), float("nan"))))
    whole = token_logprob(inputs.hidden, inputs.weight, inputs.token_ids)
    cut = token_logprob(inputs.hidden, padded, inputs.token_ids, shard=VocabShard.of_rank(128, 32, None))
    assert torch.equal(cut.logprob, whole.logprob)


def test_imports_nothing_of_ours() -> None:
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("megatron_mopd", "megatron")], path

"""What does not fit raises ValueError with the offending values, before any work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels import (
    VocabShard,
    divergence,
    linear_divergence,
    linear_support,
    support,
    token_logprob,
    topk_divergence,
)

T, V, H = 3, 5, 4
Z, X, W = torch.zeros(T, V), torch.zeros(T, H), torch.zeros(V, H)
IDS, TOP = torch.zeros(T, dtype=torch.int64), torch.tensor([[0, 1]] * T)
Q = torch.zeros(T, 2)
OUT = torch.tensor([0, 1, V])
META = "meta"
"""A device that is not the CPU, on every machine."""

SHAPES = [
    (lambda: divergence(Z[0], Z[0]), r"\(5,\), teacher_logits \(5,\): expected \[T, columns\]"),
    (lambda: divergence(Z, Z[:, :4]), r"\(3, 5\), teacher_logits \(3, 4\)"),
    (lambda: divergence(Z, Z, weights=torch.ones(T, 1)), r"weights are \(3, 1\) .*: expected \(3,\)"),
    (lambda: divergence(Z, Z, token_ids=IDS[:2]), r"token_ids are \(2,\)"),
    (lambda: token_logprob(Z[0], None, IDS), r"logits are \(5,\)"),
    (lambda: token_logprob(X[:, :3], W, IDS), r"hidden \(3, 3\), weight \(5, 4\)"),
    (lambda: token_logprob(X, W, IDS[:, None]), r"token_ids are \(3, 1\)"),
    (lambda: topk_divergence(Z, TOP[:2], Q[:2]), r"topk_ids are \(2, 2\) .*: expected \(3, k\)"),
    (lambda: topk_divergence(Z, TOP[:, :0], Q[:, :0]), r"topk_ids are \(3, 0\).* k > 0"),
    (lambda: topk_divergence(X, TOP, Q, student_weight=W[:, :3]), r"student_hidden \(3, 4\), student_weight \(5, 3\)"),
    (lambda: topk_divergence(Z, TOP, Q, weights=torch.ones(2)), r"weights are \(2,\)"),
    (lambda: support(None, Z, 6), r"k must be in \[1, 5\], got 6"),
    (lambda: support(None, Z, 2, "union"), "the support of the union needs student_logits"),
    (lambda: support(Z[:2], Z, 2, "student"), r"student_logits \(2, 5\) .*, teacher_logits \(3, 5\)"),
    (lambda: support(None, Z, 2, temperature=0.0), "temperature must be positive and finite, got 0"),
    (lambda: support(Z, Z, 2, "both"), "of must be one of teacher, student, union, got 'both'"),  # type: ignore[arg-type]
    (lambda: topk_divergence(Z, TOP, Q, token_ids=IDS[:2], return_stats=True), r"token_ids are \(2,\)"),
    (lambda: linear_support(None, None, X, W, 6), r"k must be in \[1, 5\], got 6"),
    (lambda: linear_support(None, None, X, W[:, :3], 2), r"teacher_hidden \(3, 4\), teacher_weight \(5, 3\)"),
    (lambda: linear_support(X, W[:4], X, W, 2, "student"), r"student_weight \(4, 4\): the shard holds"),
    (lambda: linear_support(X[:2], W, X, W, 2, "union"), "student_hidden has 2 rows on cpu, teacher_hidden 3 on cpu"),
    (lambda: linear_support(None, None, X, W, 2, "union"), "the union needs student_hidden and student_weight"),
    (lambda: linear_support(X, W, X, W, 2, "both"), "of must be one of teacher, student, union"),  # type: ignore[arg-type]
    (lambda: linear_support(X, W, X, W, 2, temperature=-1.0), "temperature must be positive"),
    (lambda: linear_divergence(X, W, X[:, :3], W), r"teacher_hidden \(3, 3\), teacher_weight \(5, 4\)"),
    (lambda: linear_divergence(X, W, X, W, teacher_index=IDS[:2]), r"teacher_index is \(2,\)"),
    (lambda: linear_divergence(X, W, X, [W], teacher_index=-IDS - 1), "teacher_index has -1 to -1, but there are 1"),
    (lambda: linear_divergence(X, W, X, [W, W], teacher_index=torch.tensor([1, 1, 0])), "row 2 has teacher 0 after 1"),
    (lambda: linear_divergence(X, W, [X], [W], teacher_index=IDS, teacher_mixture=[1.0]), "give one of them"),
    (lambda: linear_divergence(X, W, X, W, temperature=-1.0), "temperature must be positive and finite, got -1"),
    (lambda: VocabShard(0, 6, 5), r"rows \[0, 6\) are not a part of a vocabulary of 5"),
    (lambda: VocabShard.whole(0), "a vocabulary of 0"),
    (lambda: VocabShard.whole(2**24 + 1), "vocabularies of up to 16777216"),
]
DTYPES = [
    (lambda: divergence(Z, Z.bfloat16()), "torch.float32 and torch.bfloat16"),
    (lambda: divergence(Z, Z, weights=IDS), "weights are .* torch.int64"),
    (lambda: divergence(Z, Z, weights=torch.ones(T, requires_grad=True)), "constants here: detach them"),
    (lambda: divergence(Z, Z, token_ids=IDS.float()), "token_ids are .* torch.float32"),
    (lambda: divergence(Z.half(), Z.half(), impl="cpp"), "torch.float16 on cpu: expected .* float32 or bfloat16"),
    (lambda: divergence(Z.double(), Z.double(), impl="cpp"), "torch.float64 on cpu: expected"),
    (lambda: token_logprob(Z.long(), None, IDS), "torch.int64: expected .* floating dtype"),
    (lambda: token_logprob(X, W.bfloat16(), IDS), "hidden is torch.float32, weight torch.bfloat16"),
    (lambda: topk_divergence(Z, TOP.int(), Q), "torch.int32: expected .* torch.int64"),
    (lambda: topk_divergence(Z, TOP, TOP), "topk_logprobs are .* torch.int64"),
    (lambda: topk_divergence(X, TOP, Q, student_weight=W.double()), "student_weight torch.float64"),
    (lambda: linear_divergence(X, W.bfloat16(), X, W), "student_weight torch.bfloat16"),
    (lambda: linear_divergence(X, W, X, W, main_grad=W.bfloat16()), "main_grad is .* torch.bfloat16"),
    (lambda: linear_divergence(X, W, X, [W], teacher_index=IDS.float()), "teacher_index is .* torch.float32"),
]
DEVICES = [
    (lambda: divergence(Z, Z.to(META)), "student_logits are on cpu, teacher_logits on meta"),
    (lambda: divergence(Z, Z, weights=torch.ones(T, device=META)), "on meta: expected .* on cpu"),
    (lambda: divergence(Z, Z, token_ids=IDS.to(META)), "token_ids are on meta"),
    (lambda: token_logprob(Z, None, IDS.to(META)), "token_ids are on meta"),
    (lambda: token_logprob(X.to(META), W, IDS), "hidden is on meta, weight on cpu"),
    (lambda: topk_divergence(Z, TOP.to(META), Q), "topk_ids on meta"),
    (lambda: topk_divergence(Z, TOP, Q.to(META)), "topk_logprobs meta"),
    (lambda: support(Z.to(META), Z, 2, "union"), "student_logits .* on meta, teacher_logits .* on cpu"),
    (lambda: linear_divergence(X, W, X.to(META), W.to(META)), "2 rows on|3 rows on meta"),
    (lambda: linear_divergence(X, W, X.to(META), [W.to(META)], teacher_index=IDS), "teacher 0's hidden on meta"),
    (lambda: linear_divergence(X, W, X, W, main_grad=W.to(META)), "main_grad is .* on meta"),
    (lambda: linear_divergence(X, W, X, W, weights=torch.ones(T, device=META)), "on meta: expected"),
]
VOCABULARY = [
    (lambda: divergence(Z, Z, token_ids=OUT), "token id 5 is outside the vocabulary of 5"),
    (lambda: divergence(Z, Z, token_ids=IDS - 1), "token id -1 is outside the vocabulary of 5"),
    (lambda: token_logprob(Z, None, OUT), "token id 5 is outside the vocabulary of 5"),
    (lambda: linear_divergence(X, W, X, W, token_ids=OUT), "token id 5 is outside the vocabulary of 5"),
    (lambda: topk_divergence(Z, TOP + 4, Q), "token id 5 is outside the vocabulary of 5"),
    (lambda: topk_divergence(Z, TOP - 2, Q), "token id -2 is outside the vocabulary of 5"),
    (lambda: topk_divergence(X, TOP + 4, Q, student_weight=W), "token id 5 is outside the vocabulary of 5"),
    (lambda: divergence(Z, Z, shard=VocabShard.whole(6)), r"logits \(3, 5\): the shard holds rows \[0, 6\) of 6"),
    (lambda: support(None, Z, 2, shard=VocabShard.whole(6)), r"the shard holds rows \[0, 6\) of 6"),
    (lambda: linear_divergence(X, W, X, W[:4], shard=VocabShard.whole(5)), r"teacher_weight \(4, 4\): the shard holds"),
]


@pytest.mark.parametrize(("call", "message"), [*SHAPES, *DTYPES, *DEVICES, *VOCABULARY])
def test_value_error(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_second_backward_in_place(temperature: float) -> None:
    """Also where the logits are a leaf of their own, and of a token's log-prob."""
    for name in ("divergence", "token"):
        logits = torch.randn(T, V, requires_grad=True)
        middle = logits * 1
        if name == "divergence":
            value = divergence(middle, Z, inplace=True, temperature=temperature)
        else:
            value = token_logprob(middle, None, IDS, inplace=True, temperature=temperature).logprob
        value.sum().backward(retain_graph=True)
        assert logits.grad is not None and torch.equal(middle.detach(), logits.grad)
        with pytest.raises(ValueError, match="second backward"):
            value.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_triton_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    calls: list[Callable[[], object]] = [
        lambda: divergence(Z, Z, impl="triton"),
        lambda: linear_divergence(X, W, X, W, impl="triton"),
        lambda: token_logprob(X, W, IDS, impl="triton"),
        lambda: token_logprob(Z, None, IDS, impl="triton"),
        lambda: topk_divergence(Z, TOP, Q, impl="triton"),
        lambda: topk_divergence(X, TOP, Q, student_weight=W, impl="triton"),
        lambda: support(None, Z, 2, impl="triton"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"impl='triton' cannot run here: .*(on cpu|not installed)"):
            call()

"""What travels between ranks: how often and how much, as in the README's table; who must agree; dX under Megatron's
sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import (
    TokenStats,
    VocabShard,
    divergence,
    linear_divergence,
    linear_support,
    reference,
    support,
    token_logprob,
    topk_divergence,
)
from tests.kernels.problems import CollectiveCounter, relative_error
from tests.kernels.ranks import Ranks

VOCAB, TOKENS, HIDDEN, K = 150, 12, 16, 7
Sent = list[tuple[str, torch.dtype, int, int]]


def whole_layer(seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, HIDDEN, generator=source), torch.randn(VOCAB, HIDDEN, generator=source)


def layer(seed: int, group: ProcessGroup) -> tuple[Tensor, Tensor, VocabShard]:
    """hidden [T, H], this rank's weight, its shard."""
    hidden, weight = whole_layer(seed)
    shard = VocabShard.of_rank(-(-VOCAB // dist.get_world_size(group)), VOCAB, group)
    return hidden.requires_grad_(), weight[shard.start : shard.stop].clone().requires_grad_(), shard


def run_operation(group: ProcessGroup, name: str) -> tuple[Tensor, Sent, int]:
    """Value of one row of the table, what this rank sent for it, collectives of its backward."""
    hidden, weight, shard = layer(0, group)
    teacher_hidden, teacher_weight, _ = layer(1, group)
    z = (hidden @ weight.t()).detach().requires_grad_()
    t = (teacher_hidden @ teacher_weight.t()).detach()
    ids = torch.arange(TOKENS) * 11
    operation, _, option = name.partition(" ")
    chosen = support(z, t, K, "teacher", shard=shard) if operation == "topk" else None
    with CollectiveCounter() as counter:
        if operation == "divergence" and option == "stats":
            value = divergence(z, t, shard=shard, token_ids=ids, return_stats=True).divergence
        elif operation == "divergence":
            value = divergence(z, t, option, shard=shard)  # type: ignore[call-overload]
        elif operation == "linear":
            kind, _, plan = option.partition(" ")
            value = linear_divergence(
                hidden, weight, teacher_hidden, teacher_weight, kind, shard=shard, gradient=plan, chunk_tokens=5,  # type: ignore[arg-type]
            ).divergence  # fmt: skip
        elif operation == "token":
            tokens: TokenStats = token_logprob(z, None, ids, shard=shard, top=option == "top")
            value = tokens.logprob
        elif operation == "token_linear":
            value = token_logprob(hidden, weight, ids, shard=shard).logprob
        elif operation == "topk":
            assert chosen is not None
            source = (hidden, weight) if option == "linear" else (z, None)
            pair = chosen.ids, chosen.logprobs
            if option == "stats":
                value = topk_divergence(z, *pair, shard=shard, token_ids=ids, return_stats=True).divergence
            else:
                value = topk_divergence(source[0], *pair, student_weight=source[1], shard=shard)
        elif operation == "linear_support":
            heads = hidden, weight, teacher_hidden, teacher_weight
            value = linear_support(*heads, K, option, shard=shard, chunk_tokens=5).logprobs  # type: ignore[arg-type]
        else:
            value = support(z, t, K, option, shard=shard).logprobs  # type: ignore[arg-type]
        forward = list(counter.sent)
        if value.requires_grad:
            value.sum().backward()
    return value.detach(), forward, counter.calls - len(forward)


TABLE: dict[str, list[tuple[int, int]]] = {
    "divergence reverse_kl": [(6, TOKENS)],
    "divergence forward_kl": [(8, TOKENS)],
    "divergence mixed": [(8, TOKENS)],
    "divergence stats": [(12, TOKENS)],
    "divergence jsd": [(6, TOKENS), (2, TOKENS)],
    "token": [(4, TOKENS)],
    "token top": [(5, TOKENS)],
    "token_linear": [(4, TOKENS)],
    "topk": [(3 + K, TOKENS)],
    "topk linear": [(3 + K, TOKENS)],
    "support teacher": [(2 * K, TOKENS), (3 + K, TOKENS)],
    "support student": [(2 * K, TOKENS), (3 + K, TOKENS)],
    "support union": [(2 * K, TOKENS), (2 * K, TOKENS), (3 + 2 * K, TOKENS)],
    "topk stats": [(4 + K, TOKENS)],
    "linear_support teacher": [(3 + 2 * K, TOKENS)],
    "linear_support student": [(3 + 2 * K, TOKENS), (3 + K, TOKENS)],
    "linear_support union": [(3 + 2 * K, TOKENS), (3 + 2 * K, TOKENS), (3 + 2 * K, TOKENS)],
    "linear reverse_kl recompute": [(6, TOKENS)],
    "linear mixed recompute": [(8, TOKENS)],
    "linear jsd recompute": [(6, TOKENS), (2, TOKENS)],
    "linear reverse_kl auto": [(6, TOKENS)],
    "linear reverse_kl in_forward": [(6, 5), (6, 5), (6, 2)],
    "linear jsd in_forward": [(6, 5), (2, 5), (6, 5), (2, 5), (6, 2), (2, 2)],
}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_as_in_the_table(ranks: Ranks, size: int, name: str) -> None:
    """fp32 all-gathers of [sums, T], one column more for the shards' bounds; nothing backward; nothing when alone."""
    found = ranks.run(size, run_operation, name)
    for value, sent, backward in found:
        assert torch.equal(value, found[0][0])
        assert backward == 0
        assert all(each[0].startswith("all_gather") and each[1] == torch.float32 for each in sent)
        assert [each[2:] for each in sent] == ([] if size == 1 else [(k, t + 1) for k, t in TABLE[name]])


def test_the_counter_counts(ranks: Ranks) -> None:
    assert ranks.run(2, count_two) == [["all_reduce", "broadcast"]] * 2


def count_two(group: ProcessGroup) -> list[str]:
    with CollectiveCounter() as counter:
        dist.all_reduce(torch.ones(1), group=group)
        dist.broadcast(torch.ones(1), 0, group=group)
    return [each[0] for each in counter.sent]


def sequence_parallel(group: ProcessGroup, operation: str) -> tuple[Tensor, Tensor]:
    """Each rank has a part of the sequence: all-gathered hidden states in, dX reduce-scattered out."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    hidden, weight, shard = layer(0, group)
    teacher_hidden, teacher_weight, _ = layer(1, group)
    own = hidden.detach().chunk(size)[rank].contiguous()
    whole = torch.empty(TOKENS, HIDDEN)
    dist.all_gather(list(whole.chunk(size)), own, group=group)
    whole.requires_grad_()
    if operation == "divergence":
        value = linear_divergence(whole, weight, teacher_hidden, teacher_weight, shard=shard).divergence
    elif operation == "logprob":
        value = token_logprob(whole, weight, torch.arange(TOKENS), shard=shard).logprob
    else:
        ids = torch.arange(K).expand(TOKENS, K)
        value = topk_divergence(whole, ids, -3.0 - 0.1 * ids, student_weight=weight, shard=shard)
    value.sum().backward()
    assert whole.grad is not None and weight.grad is not None
    mine = torch.empty_like(own)
    dist.reduce_scatter(mine, [part.contiguous() for part in whole.grad.chunk(size)], group=group)
    return mine, weight.grad


@pytest.mark.parametrize("operation", ["divergence", "logprob", "topk"])
@pytest.mark.parametrize("size", [2, 4])
def test_sequence_parallel(ranks: Ranks, size: int, operation: str) -> None:
    """The ranks' shares of dX, reduce-scattered, are the gradients of the parts of the sequence."""
    found = ranks.run(size, sequence_parallel, operation)
    alone = ranks.run(1, sequence_parallel, operation)[0]
    assert alone[0].norm() > 1e-2
    assert relative_error(torch.cat([each[0] for each in found]), alone[0]) < 1e-5
    assert relative_error(torch.cat([each[1] for each in found]), alone[1]) < 1e-5
    if operation == "divergence":
        (x, w), (y, v) = (map(Tensor.double, whole_layer(seed)) for seed in (0, 1))
        x.requires_grad_()
        reference.reverse_kl(x @ w.t(), y @ v.t()).sum().backward()
        assert x.grad is not None
        assert relative_error(alone[0], x.grad) < 1e-5


def wrong_shard(group: ProcessGroup, bounds: list[tuple[int, int, int]], operation: str) -> str:
    """The message of the ValueError, here, with the shard of these bounds."""
    start, stop, vocab = bounds[dist.get_rank(group)]
    shard, rows, hidden = VocabShard(start, stop, vocab, group), stop - start, torch.zeros(2, 4)
    z, weight, ids = torch.zeros(2, rows), torch.zeros(rows, 4), torch.zeros(2, 1, dtype=torch.int64)
    calls: dict[str, Callable[[], object]] = {
        "divergence": lambda: divergence(z, z, shard=shard),
        "linear": lambda: linear_divergence(hidden, weight, hidden, weight, shard=shard),
        "in_forward": lambda: linear_divergence(
            hidden.requires_grad_(), weight, hidden, weight, shard=shard, gradient="in_forward"
        ),
        "token": lambda: token_logprob(hidden, weight, ids[:, 0], shard=shard),
        "topk": lambda: topk_divergence(z, ids, z[:, :1], shard=shard),
        "support": lambda: support(None, z, 3, shard=shard),
    }
    try:
        calls[operation]()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("operation", ["divergence", "linear", "in_forward", "token", "topk", "support"])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([(0, 10, 20), (0, 9, 20)], "the ranks hold rows [0, 10), [0, 9): together not 20 rows exactly once"),
        ([(0, 10, 20), (8, 20, 20)], "[0, 10), [8, 20): together not 20 rows"),
        ([(0, 8, 20), (10, 20, 20)], "[0, 8), [10, 20): together not 20 rows"),
        ([(0, 10, 20), (10, 19, 20)], "[0, 10), [10, 19): together not 20 rows"),
        ([(10, 20, 20), (0, 10, 20)], "[10, 20), [0, 10): together not 20 rows exactly once in rank order"),
        ([(0, 10, 20), (10, 21, 21)], "the ranks hold parts of vocabularies of 20 and 21"),
    ],
    ids=["twice", "overlap", "gap", "short", "swapped", "sizes"],
)
def test_shards_that_do_not_cover_the_vocabulary(
    ranks: Ranks, bounds: list[tuple[int, int, int]], message: str, operation: str
) -> None:
    """Every rank says so, with the bounds of all."""
    for found in ranks.run(2, wrong_shard, bounds, operation):
        assert message in found

"""Logits-level problems: every rank builds the whole, solves its columns, and is compared with float64 autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import (
    DivergenceKind,
    DivergenceStats,
    Objective,
    VocabShard,
    divergence,
    reference,
    support,
    token_logprob,
    topk_divergence,
)
from kernels.dispatch import Implementation
from tests.kernels.problems import CollectiveCounter, relative_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    kind: DivergenceKind = "reverse_kl"
    vocab: int = 151
    tokens: int = 11
    noise: float = 0.5
    """Spread of teacher minus student."""
    spread: float = 2.0
    offsets: tuple[float, float] = (0.0, 0.0)
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    alpha: float = 0.3
    beta: float = 0.25
    masked: bool = False
    """Some tokens are -inf on both sides, and the first 40 in the first row."""
    one_sided: bool = False
    """Some tokens are -inf for the student, others for the teacher."""
    weighted: bool = False
    """Some rows have weight 0 and NaN logits."""
    inplace: bool = False
    rows_per_rank: int | None = None
    strided: bool = False
    impl: str = "torch"
    form: str = "raw"
    of: str = "teacher"
    k: int = 7
    seed: int = 0

    @property
    def objective(self) -> Objective:
        return Objective(self.kind, self.alpha, self.beta, self.temperature)


@dataclass(frozen=True, slots=True)
class Drawn:
    student: Tensor
    teacher: Tensor
    token_ids: Tensor
    weights: Tensor | None
    upstream: Tensor


def draw(share: Share) -> Drawn:
    """Full logits in the share's dtype; what the reference gets in float64 is exactly that."""
    source = torch.Generator().manual_seed(share.seed)
    shape = (share.tokens, share.vocab)

    def normal() -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    student = share.spread * normal()
    teacher = student + share.noise * normal() + share.offsets[1]
    student = student + share.offsets[0]
    token_ids = torch.randint(share.vocab, (share.tokens,), generator=source)
    if share.masked:
        hidden = torch.rand(*shape, generator=source) < 0.3
        hidden[:1, : min(40, share.vocab // 2)] = True
        hidden[torch.arange(share.tokens), token_ids] = False
        student[hidden] = teacher[hidden] = -torch.inf
    if share.one_sided:
        student[:, 3::7] = teacher[:, 5::7] = -torch.inf
        token_ids = torch.arange(share.tokens) % 3
    weights = None
    if share.weighted:
        weights = torch.rand(share.tokens, generator=source) + 0.1
        weights[::3] = 0.0
        weights[3:6] = 0.0
        student[weights == 0] = torch.nan
    upstream = torch.rand(share.tokens, generator=source, dtype=torch.float64) - 0.3
    dtype = torch.float64 if share.dtype == torch.float64 else torch.float32
    student, teacher = student.to(share.dtype), teacher.to(share.dtype)
    if weights is not None:
        weights = weights.to(dtype)
    return Drawn(student, teacher, token_ids, weights, upstream.to(dtype))


@dataclass(frozen=True, slots=True)
class Solved:
    value: Tensor
    grad: Tensor
    stats: tuple[Tensor, ...] = ()
    """entropy and most likely token of `logprob`"""
    collectives: tuple[int, int] = (0, 0)


def columns(logits: Tensor, shard: VocabShard, rows: int, strided: bool) -> Tensor:
    """The rank's columns, NaN in the padding; perhaps as a view whose rows are far apart."""
    local = logits.new_full((len(logits), rows + (5 if strided else 0)), float("nan"))
    local[:, : shard.rows] = logits[:, shard.start : shard.stop]
    return local[:, :rows]


def call(
    share: Share, operation: str, student: Tensor, teacher: Tensor, drawn: Drawn, shard: VocabShard
) -> tuple[Tensor, tuple[Tensor, ...]]:
    weights, impl = drawn.weights, cast(Implementation, share.impl)
    if operation == "divergence":
        value = divergence(
            student, teacher, share.kind, alpha=share.alpha, beta=share.beta, shard=shard, weights=weights,
            temperature=share.temperature, impl=impl, inplace=share.inplace,
        )  # fmt: skip
        return value, ()
    if operation == "logprob":
        tokens = token_logprob(
            student, None, drawn.token_ids, shard=shard, temperature=share.temperature, inplace=share.inplace,
            impl=impl, top=True,
        )  # fmt: skip
        assert tokens.top is not None
        return tokens.logprob, (tokens.entropy, tokens.top)
    chosen = support(
        student, teacher, share.k, share.of, shard=shard, temperature=share.temperature, impl=impl,  # type: ignore[arg-type]
    )  # fmt: skip
    value = topk_divergence(
        student, chosen.ids, chosen.logprobs, share.kind, form=share.form, shard=shard,  # type: ignore[arg-type]
        temperature=share.temperature, weights=weights, impl=impl,
    )  # fmt: skip
    return value, (chosen.ids, chosen.logprobs)


def solve_share(group: ProcessGroup | None, share: Share, operation: str = "divergence") -> Solved:
    drawn = draw(share)
    size = 1 if group is None else dist.get_world_size(group)
    rows = share.rows_per_rank or -(-share.vocab // size)
    shard = VocabShard.of_rank(rows, share.vocab, group)
    leaf = columns(drawn.student, shard, rows, share.strided).requires_grad_()
    student = leaf * 1 if share.inplace else leaf
    teacher = columns(drawn.teacher, shard, rows, share.strided)
    with CollectiveCounter() as counter:
        value, stats = call(share, operation, student, teacher, drawn, shard)
        forward = counter.calls
        (grad,) = torch.autograd.grad(value, leaf, drawn.upstream)
    assert not grad[:, shard.rows :].any()
    assert grad.dtype == share.dtype
    return Solved(value.detach(), grad[:, : shard.rows], stats, (forward, counter.calls - forward))


def solve_stats(group: ProcessGroup, share: Share) -> DivergenceStats:
    drawn = draw(share)
    shard = VocabShard.of_rank(-(-share.vocab // dist.get_world_size(group)), share.vocab, group)
    student, teacher = (columns(each, shard, shard.rows, False) for each in (drawn.student, drawn.teacher))
    return divergence(
        student, teacher, share.kind, shard=shard, token_ids=drawn.token_ids, return_stats=True, impl="torch"
    )


def topk_expected(share: Share, z: Tensor, t: Tensor) -> Tensor:
    """The support by sorting, the rest by `reference`, row by row."""
    log_p, log_q = (each.div(share.temperature).log_softmax(-1) for each in (z, t))
    values = []
    for row in range(len(z)):
        of_teacher = t[row].sort(descending=True, stable=True).indices[: share.k].tolist()
        of_student = z[row].sort(descending=True, stable=True).indices[: share.k].tolist()
        ids = {"teacher": of_teacher, "student": of_student, "union": sorted({*of_teacher, *of_student})}[share.of]
        pair = (each[row, ids][None] for each in (log_p, log_q))
        values.append(reference.topk_divergence(*pair, share.kind, share.form)[0])  # type: ignore[arg-type]
    return torch.stack(values) if values else z.sum(-1)


def share_expected(share: Share, operation: str = "divergence") -> Solved:
    """float64 autograd of the reference on the active rows; zero elsewhere."""
    drawn = draw(share)
    active = torch.ones(share.tokens, dtype=torch.bool) if drawn.weights is None else drawn.weights != 0
    student = drawn.student.double()[active].requires_grad_()
    teacher = drawn.teacher.double()[active]
    stats: tuple[Tensor, ...] = ()
    if operation == "divergence":
        value = reference.divergence(student, teacher, share.objective)
    elif operation == "logprob":
        value = reference.token_logprob(student, drawn.token_ids[active], share.temperature)
        tempered = student.detach() / share.temperature
        stats = (reference.entropy(tempered), student.detach().argmax(-1))
    else:
        value = topk_expected(share, student, teacher)
    scale = torch.ones(share.tokens) if drawn.weights is None else drawn.weights
    value = value * scale.double()[active]
    (grad,) = torch.autograd.grad(value, student, drawn.upstream.double()[active])
    full_value = torch.zeros(share.tokens, dtype=torch.float64)
    full_grad = torch.zeros(share.tokens, share.vocab, dtype=torch.float64)
    full_value[active], full_grad[active] = value.detach(), grad
    return Solved(full_value, full_grad, stats)


def errors(found: list[Solved], want: Solved) -> tuple[float, float]:
    """Relative errors of value and gradient; the ranks' values must be equal to the bit."""
    for each in found:
        assert torch.equal(each.value, found[0].value)
        assert all(map(torch.equal, each.stats, found[0].stats))
    grad = torch.cat([each.grad for each in found], 1)
    return relative_error(found[0].value, want.value), relative_error(grad, want.grad)

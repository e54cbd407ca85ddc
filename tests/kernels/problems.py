"""Problems that every rank can build by itself, and what a rank finds when it solves its share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels import VocabShard, linear_divergence, reference, token_logprob, topk_divergence
from kernels.dispatch import Implementation
from kernels.reference import TopkForm

COLLECTIVES = tuple(
    name
    for name in dir(dist)
    if name.startswith(
        ("all_", "broadcast", "reduce", "gather", "scatter", "send", "recv", "isend", "irecv", "barrier")
    )
    and type(vars(dist)[name]) is FunctionType
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    vocab: int = 151
    tokens: int = 10
    noise: float = 0.5
    """How far the teacher is from the student."""
    dtype: torch.dtype = torch.float32
    chunk_tokens: int | None = None
    rows_per_rank: int | None = None
    """None: as few as will do."""
    offsets: tuple[float, float] | None = None
    """Added to all logits of student and teacher. If given, the weights are the identity and the hidden
    states the logits, so that nothing is rounded before the kernel."""
    temperature: float = 1.0
    impl: Implementation = "auto"
    form: TopkForm = "raw"
    kind: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    """As `form`, of `topk`."""
    k: int = 5
    strided: bool = False
    """Columns of hidden states and weight lie apart."""
    seed: int = 0

    def rows(self, size: int) -> int:
        return self.rows_per_rank or -(-self.vocab // size)


@dataclass(frozen=True, slots=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    token_ids: Tensor
    upstream: Tensor
    """[T] gradient of the loss with respect to each row, zero in places."""


def make_inputs(problem: Problem) -> Inputs:
    """The whole vocabulary, in the problem's dtype. The teacher's hidden size differs from the student's."""
    draw = torch.Generator().manual_seed(problem.seed)
    tokens, vocab = problem.tokens, problem.vocab

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    if problem.offsets is not None:
        logits, change = 2.0 * normal(tokens, vocab), problem.noise * normal(tokens, vocab)
        hidden, teacher_hidden = logits + problem.offsets[0], logits + change + problem.offsets[1]
        weight = teacher_weight = torch.eye(vocab, dtype=torch.float64)
    else:
        hidden, weight = normal(tokens, 24), 0.5 * normal(vocab, 24)
        teacher_hidden = torch.cat((hidden + problem.noise * normal(tokens, 24), normal(tokens, 8)), 1)
        teacher_weight = torch.cat((weight, 0.1 * problem.noise * normal(vocab, 8)), 1)
    token_ids = torch.randint(vocab, (tokens,), generator=draw)
    upstream = torch.rand(tokens, generator=draw) - 0.3
    upstream[1::4] = 0.0
    kind = problem.dtype
    return Inputs(
        hidden=hidden.to(kind),
        weight=weight.to(kind),
        teacher_hidden=teacher_hidden.to(kind),
        teacher_weight=teacher_weight.to(kind),
        token_ids=token_ids,
        upstream=upstream.to(torch.float64 if kind == torch.float64 else torch.float32),
    )


@dataclass(frozen=True, slots=True)
class Found:
    """Values [T], gradients; of one rank, or of the reference."""

    value: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor
    collectives: tuple[int, int] = (0, 0)
    """In forward and in backward."""


def expected(problem: Problem, operation: str) -> Found:
    """float64 autograd of the reference, from the very values that the kernel gets."""
    inputs = make_inputs(problem)
    hidden = inputs.hidden.double().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    logits = hidden @ weight.T
    if operation == "divergence":
        teacher_logits = inputs.teacher_hidden.double() @ inputs.teacher_weight.double().T
        value, entropy = reference.reverse_kl(logits, teacher_logits), reference.entropy(logits)
    elif operation == "topk":
        ids, log_q = teacher_top(problem, inputs)
        log_p = (logits / problem.temperature).log_softmax(-1).gather(1, ids)
        value = entropy = reference.topk_divergence(log_p, log_q, problem.kind, problem.form)
    else:
        value = reference.token_logprob(logits, inputs.token_ids, problem.temperature)
        entropy = reference.entropy(logits, problem.temperature)
    hidden_grad, weight_grad = torch.autograd.grad(value, (hidden, weight), inputs.upstream.double())
    return Found(value.detach(), entropy.detach(), hidden_grad, weight_grad)


def teacher_top(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """ids and log-probs [T, k] in float64, the same on every rank."""
    logits = inputs.teacher_hidden.double() @ inputs.teacher_weight.double().T
    top = (logits / problem.temperature).log_softmax(-1).topk(problem.k)
    return top.indices, top.values


class CollectiveCounter:
    """Counts calls of torch.distributed's collectives while they go on working."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, torch.dtype, int, int]] = []
        """Of each: its name, dtype and shape of what this rank contributes to an all-gather."""
        self.originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    @property
    def calls(self) -> int:
        return len(self.sent)

    def __enter__(self) -> CollectiveCounter:
        for name, original in self.originals.items():
            setattr(dist, name, self._counted(original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            own = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else torch.empty(0, 0)
            self.sent.append((original.__name__, own.dtype, *own.shape))
            return original(*args, **kwargs)

        return call


def local_rows(weight: Tensor, shard: VocabShard, rows: int) -> Tensor:
    """The rank's rows; NaN in the padding shows at once if anything reads it."""
    local = weight.new_full((rows, weight.shape[1]), float("nan"))
    local[: shard.rows] = weight[shard.start : shard.stop]
    return local


def solve(group: ProcessGroup, problem: Problem, operation: str) -> Found:
    """One rank's share of the problem."""
    inputs, rows = make_inputs(problem), problem.rows(dist.get_world_size(group))
    shard = VocabShard.of_rank(rows, problem.vocab, group)
    hidden, weight = inputs.hidden, local_rows(inputs.weight, shard, rows)
    if problem.strided:
        hidden, weight = (each.t().contiguous().t() for each in (hidden, weight))
    hidden.requires_grad_()
    weight.requires_grad_()
    with CollectiveCounter() as counter:
        if operation == "divergence":
            teacher_weight = local_rows(inputs.teacher_weight, shard, rows)
            stats = linear_divergence(
                hidden,
                weight,
                inputs.teacher_hidden,
                teacher_weight,
                shard=shard,
                chunk_tokens=problem.chunk_tokens,
                impl=problem.impl,
            )
            value, entropy = stats.divergence, stats.student_entropy
        elif operation == "topk":
            value = topk_divergence(
                hidden, *teacher_top(problem, inputs), problem.kind, student_weight=weight, form=problem.form,
                shard=shard, temperature=problem.temperature, chunk_tokens=problem.chunk_tokens, impl=problem.impl,
            )  # fmt: skip
            entropy = value.detach()
        else:
            tokens = token_logprob(
                hidden, weight, inputs.token_ids,
                shard=shard, temperature=problem.temperature, chunk_tokens=problem.chunk_tokens, impl=problem.impl,
            )  # fmt: skip
            value, entropy = tokens.logprob, tokens.entropy
        forward = counter.calls
        hidden_grad, weight_grad = torch.autograd.grad(value, (hidden, weight), inputs.upstream)
    assert not entropy.requires_grad
    return Found(value.detach(), entropy, hidden_grad, weight_grad, (forward, counter.calls - forward))


def joined(found: list[Found], problem: Problem) -> Found:
    """Adds up dX, puts dW together. Values must be equal to the bit, the padding's gradient exactly zero."""
    first = found[0]
    for each in found:
        assert torch.equal(each.value, first.value)
        assert torch.equal(each.entropy, first.entropy)
        assert each.hidden_grad.dtype == each.weight_grad.dtype == problem.dtype
    weight_grad = torch.cat([each.weight_grad for each in found])
    assert not weight_grad[problem.vocab :].any()
    hidden_grad = torch.stack([each.hidden_grad.double() for each in found]).sum(0)
    return Found(first.value, first.entropy, hidden_grad, weight_grad[: problem.vocab], first.collectives)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Euclidean, in float64; 0 for two empty tensors."""
    assert got.shape == want.shape
    size = float(want.double().norm())
    error = float((got.double() - want.double()).norm())
    return error / size if size else error

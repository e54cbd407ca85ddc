"""The specification: plain differentiable torch on full logits. Slow on purpose; run it in float64."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kernels.objective import Objective

TopkForm = Literal["raw", "tail", "renormalised"]

LOWEST = -1e4
"""In place of -inf, below the row's maximum: 0 log 0 is 0, and to exclude what the other side likes costs much, not
inf. The gradient passes as if the logit were merely very small: that of the forward KL is p - q there too."""


class _Floored(torch.autograd.Function):
    """max(each, lowest [T, 1] or a number), gradient unchanged."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lowest: Tensor) -> Tensor:
        return values.maximum(lowest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def _log_softmax(logits: Tensor) -> Tensor:
    lowest = logits.detach().amax(-1, keepdim=True) + LOWEST
    return _Floored.apply(logits, lowest).log_softmax(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """[T, V] twice -> [T]: sum_j p_j (log p_j - log q_j), in nats."""
    return _kl(_log_softmax(student_logits), _log_softmax(teacher_logits))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_j p_j (log p_j - log q_j) with 0 log 0 = 0, also in the gradient."""
    impossible = log_p == -torch.inf
    difference = torch.where(impossible, 0.0, log_p) - torch.where(impossible, 0.0, log_q)
    return (log_p.exp() * difference).sum(-1)


def divergence(student_logits: Tensor, teacher_logits: Tensor, objective: Objective) -> Tensor:
    """[T, V] twice -> [T], in nats; `Objective` has the formulas."""
    log_p = _log_softmax(student_logits / objective.temperature)
    log_q = _log_softmax(teacher_logits / objective.temperature)
    if objective.kind == "jsd":
        beta = torch.tensor(objective.beta, dtype=log_p.dtype, device=log_p.device)
        mix = torch.logaddexp(beta.log() + log_q, (1 - beta).log() + log_p)
        return beta * _kl(log_q, mix) + (1 - beta) * _kl(log_p, mix)
    if objective.kind == "reverse_kl":
        return _kl(log_p, log_q)
    if objective.kind == "forward_kl":
        return _kl(log_q, log_p)
    return objective.alpha * _kl(log_q, log_p) + (1 - objective.alpha) * _kl(log_p, log_q)


def statistics(student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor | None, temperature: float) -> Tensor:
    """[6, T]: KL(p || q), entropies of p and q, log p and log q of the token (NaN without), 1 where top-1 agree."""
    z, t = student_logits / temperature, teacher_logits / temperature
    if token_ids is None:
        chosen = [torch.full_like(z[:, 0], torch.nan)] * 2
    else:
        chosen = [token_logprob(logits, token_ids) for logits in (z, t)]
    agreement = (z.argmax(-1) == t.argmax(-1)).to(z.dtype)
    return torch.stack((reverse_kl(z, t), entropy(z), entropy(t), *chosen, agreement))


def token_logprob(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """[T, V], [T] -> [T]: log softmax(logits / temperature) at the token."""
    return (logits / temperature).log_softmax(-1).gather(1, token_ids[:, None])[:, 0]


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """[T, V] -> [T]: -sum_j p_j log p_j, in nats."""
    log_p = (logits / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=LOWEST)).sum(-1)


def topk_divergence(log_p: Tensor, log_q: Tensor, kind: str, form: TopkForm, used: Tensor | None = None) -> Tensor:
    """[T, k] raw log-probs of student and teacher on a support S of each row -> [T]; `used` [T, k] marks S. A log-prob
    counts as at least `LOWEST`.

    With (a, b) = (p, q) for reverse_kl, (q, p) for forward_kl:
    raw           sum_S a log(a / b) - a + b     MOPD, arXiv 2606.30406 Eq. 5: every term >= 0, and 0 only at a = b
    tail          sum_S a log(a / b) + A log(A / B), A = 1 - sum_S a, B likewise: what is not in S is one more token
    renormalised  sum_S a' log(a' / b'), a' = a / sum_S a: blind to how much of the mass S holds
    """
    lowest = log_p.new_tensor(LOWEST)
    log_p, log_q = (_Floored.apply(each, lowest) for each in (log_p, log_q))
    if used is not None:
        log_p, log_q = (torch.where(used, each, -torch.inf) for each in (log_p, log_q))
    if form == "renormalised":
        log_p, log_q = (each - each.logsumexp(-1, keepdim=True) for each in (log_p, log_q))
    elif form == "tail":
        log_p, log_q = (torch.cat((each, _log_rest(each)), -1) for each in (log_p, log_q))
    a, b = (log_p, log_q) if kind == "reverse_kl" else (log_q, log_p)
    value = _kl(a, b)
    return value - a.exp().sum(-1) + b.exp().sum(-1) if form == "raw" else value


def _log_rest(log_p: Tensor) -> Tensor:
    """[T, 1] log(1 - sum_j p_j), at least log(1e-12): rounding may leave nothing."""
    return (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-12).log()

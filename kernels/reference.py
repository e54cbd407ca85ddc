"""The specification: plain differentiable torch on full logits. Slow on purpose; run it in float64."""

from __future__ import annotations

from torch import Tensor


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """[T, V] twice -> [T]: sum_j p_j (log p_j - log q_j), in nats."""
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_logprob(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """[T, V], [T] -> [T]: log softmax(logits / temperature) at the token."""
    return (logits / temperature).log_softmax(-1).gather(1, token_ids[:, None])[:, 0]


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """[T, V] -> [T]: -sum_j p_j log p_j, in nats."""
    log_p = (logits / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)

"""The objectives, as pure functions of per-token tensors.

Each returns the SUM over rows of weight * per-token loss; the denominator is the number of units in the global batch
(sequences or tokens, `MicroBatch.num_units`), and Megatron divides by it once (`calculate_per_token_loss=True`). So
the gradient depends neither on the layout nor on how rollouts were cut into micro-batches.

R rows, one per trained token; p student, q routed teacher, mu the policy that sampled; natural logarithms throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum to be differentiated, and what to report of each row (detached)."""

    total: Tensor
    """[] fp32, sum over rows of weight * loss."""
    rows: Mapping[str, Tensor]
    """name -> [R] fp32; averaged over the tokens of each domain."""


def cross_entropy(student_logprobs: Tensor, weights: Tensor) -> Loss:
    """-log p(y): supervised fine-tuning on reference answers."""
    loss = -student_logprobs
    return Loss((weights * loss).sum(), {"token_loss": loss.detach()})


def grpo(
    student_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = p / mu (GRPO, arXiv 2402.03300 Eq. 3).

    Clip-higher (high > low) is DAPO's, arXiv 2503.14476; as there, and for the MOPD paper's teachers, no KL term.
    """
    ratio = torch.exp(student_logprobs - rollout_logprobs)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    is_clipped = (clipped * advantages < ratio * advantages).float()
    return Loss(
        (weights * loss).sum(),
        {"token_loss": loss.detach(), "clip_share": is_clipped, "ratio": ratio.detach()},
    )


def sampled(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    outcome_advantages: Tensor,
    weights: Tensor,
    *,
    advantage_clip: float,
    outcome_weight: float,
) -> Loss:
    """-A log p(y), A = sg[clip(log q(y) - log p(y), +-A_max)] + alpha A_outcome.

    MOPD paper (arXiv 2606.30406) Eq. 4 with A_max = `advantage_clip`; MiMo-V2-Flash (arXiv 2601.02780) Eq. 9 adds
    the outcome term with alpha = `outcome_weight`, outside the clip.
    """
    gap = teacher_logprobs - student_logprobs.detach()
    clipped = gap.clamp(-advantage_clip, advantage_clip)
    advantages = clipped + outcome_weight * outcome_advantages
    loss = -advantages * student_logprobs
    return Loss(
        (weights * loss).sum(),
        {
            "token_loss": loss.detach(),
            "reverse_kl": -gap,  # the one-sample ("k1") estimate of it
            "advantage": advantages,
            "clip_share": (clipped != gap).float(),
        },
    )


def teacher_topk(
    divergence: Tensor, weights: Tensor, *, reverse_kl: Tensor, student_mass: Tensor, teacher_mass: Tensor
) -> Loss:
    """sum over the teacher's k most likely tokens of p log(p/q) - p + q, raw probabilities: MOPD Eq. 5.

    divergence [R]: that sum (`kernels.topk_divergence`). Only reported, [R] each: a reverse KL in which all other
    tokens are one, and what student and teacher have on the k tokens.
    """
    masses = {"student_mass": student_mass.detach(), "teacher_mass": teacher_mass.detach()}
    rows = {"token_loss": divergence.detach(), "reverse_kl": reverse_kl.detach(), **masses}
    return Loss((weights * divergence).sum(), rows)


def full_vocab(divergence: Tensor, weights: Tensor, *, reverse_kl: Tensor | None = None) -> Loss:
    """sum_v p(v) log(p(v) / q(v)): MOPD Eq. 1 without sampling the token, as in DeepSeek-V4 (arXiv 2606.19348).

    `divergence` [R] may be another one (`objective.divergence`); then `reverse_kl` [R] is only reported.
    """
    measured = divergence if reverse_kl is None else reverse_kl
    return Loss((weights * divergence).sum(), {"token_loss": divergence.detach(), "reverse_kl": measured.detach()})

"""Importance weights: how much a token counts that the rollout engine sampled a little differently than the trainer.

r_t = p_train(y_t) / mu(y_t) at the temperature that was sampled at; mu is what the engine reported. Differences come
from its kernels and dtype, from other experts (MoE) and from older weights. The weight is a constant of the loss
(stop-gradient) and multiplies the row's own weight: the denominator stays, so a token that is left out is a token that
counts nothing, and not a mean over fewer.

| kind | weight | source |
|---|---|---|
| icepop | r_t if low <= r_t <= high else 0 | IcePop, as in GLM-5 (arXiv 2602.15763) and Nemotron-Cascade 2 |
| tis | min(max(r_t, low), high) | truncated importance sampling, per token |
| sequence_tis | the same of prod_t r_t, for every token of the sequence | |
| sequence_mis | prod_t r_t if in [low, high] else 0 | masked importance sampling |
| geometric | 1 if (prod_t r_t)^(1/T) is in [low, high] else 0 | rejection of sequences, of any length alike |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mopd.method_config import ImportanceSpec

_MAX_LOG = 20.0
"""Log-ratios are cut here before exp: e^20 is beyond any bound, and finite in fp32."""


@dataclass(frozen=True, slots=True)
class Importance:
    """Of R rows; detached."""

    weights: Tensor
    """[R] fp32, what the loss of each row is multiplied by; 0: the row is left out."""
    ratio: Tensor
    """[R] fp32, r_t = p_train / mu of each token, whatever the kind."""

    def rows(self) -> dict[str, Tensor]:
        """name -> [R], to be averaged per domain: what share is kept, the mean weight, and two estimates of
        KL(mu || p_train) on what mu sampled: k1 = -log r, and k3 = r - 1 - log r, which is never negative."""
        log_ratio = self.ratio.log()
        return {
            "importance_kept": (self.weights > 0).float(),
            "importance_weight": self.weights,
            "rollout_kl": -log_ratio,
            "rollout_kl_k3": self.ratio - 1 - log_ratio,
        }


@torch.no_grad()
def importance_weights(
    spec: ImportanceSpec,
    student_logprobs: Tensor,
    rollout_logprobs: Tensor,
    sequence_index: Tensor,
    *,
    sequences: int,
    context: ProcessGroup | None = None,
) -> Importance:
    """The weights of R rows.

    student_logprobs, rollout_logprobs: [R] fp32, log p_train and log mu of the sampled tokens, both of
    softmax(logits / temperature). sequence_index: [R] which of the batch's `sequences` a row is of. A sequence has all
    its rows in one batch; the ranks of `context` (None: this one alone) each have some of them, and where the weight is
    the sequence's this is collective over them.
    """
    log_ratio = student_logprobs.detach() - rollout_logprobs
    ratio = log_ratio.clamp(-_MAX_LOG, _MAX_LOG).exp()
    low, high = spec.bounds
    if spec.kind == "none":
        return Importance(torch.ones_like(ratio), ratio)
    if spec.kind == "tis":
        return Importance(ratio.clamp(low, high), ratio)
    if spec.kind == "icepop":
        return Importance(_within(ratio, low, high) * ratio, ratio)
    sums = log_ratio.new_zeros(2, sequences)
    sums.index_add_(1, sequence_index, torch.stack([log_ratio, torch.ones_like(log_ratio)]))
    if context is not None:
        dist.all_reduce(sums, group=context)
    total, lengths = sums
    if spec.kind == "geometric":
        mean = (total / lengths.clamp(min=1)).clamp(-_MAX_LOG, _MAX_LOG).exp()
        return Importance(_within(mean, low, high)[sequence_index], ratio)
    product = total.clamp(-_MAX_LOG, _MAX_LOG).exp()
    weights = product.clamp(low, high) if spec.kind == "sequence_tis" else _within(product, low, high) * product
    return Importance(weights[sequence_index], ratio)


def _within(values: Tensor, low: float, high: float) -> Tensor:
    """1 inside [low, high], else 0."""
    return ((values >= low) & (values <= high)).float()

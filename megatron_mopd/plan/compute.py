"""FLOPs of a step, phase by phase, and the least seconds that they take by data-sheet ceilings.

One multiply-add is 2 FLOPs. Forward: 2 x parameters that a token meets, and 4 x Q x (tokens attended to) a layer for
attention; backward twice that (Kaplan et al., arXiv 2001.08361 sec. 2.1; Narayanan et al., arXiv 2104.04473 sec. 5).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mopd.plan.count import ModelCount
from megatron_mopd.plan.memory import Setting

LOSS_PRODUCTS = {"full_vocab": 6, "teacher_topk": 4, "sampled": 4, "grpo": 4, "cross_entropy": 4}
"""Matrix products of rows x V x H that the output layer costs in an update (kernels/README.md): the logits forward and
again backward (of the teacher too), and both gradients."""
SCORE_PRODUCTS = {"full_vocab": 0, "teacher_topk": 1, "sampled": 1}
"""Those of scoring with a teacher: its hidden states alone, or its logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFlops:
    """Of a whole step, over all GPUs."""

    rollout: float
    teacher: float
    update: float


def forward_flops(count: ModelCount, tokens: float, attended: float) -> float:
    """`tokens` through all layers, without the output layer. attended: sum of what each token attends to."""
    arch = count.arch
    attention = 4 * arch.num_heads * arch.head_dim * arch.num_layers * attended
    return 2 * count.body * tokens + attention


def product_flops(count: ModelCount, rows: float) -> float:
    """One product of `rows` with the output layer."""
    return 2 * rows * count.arch.vocab_size * count.arch.hidden_size


def step_flops(setting: Setting) -> PhaseFlops:
    """By mean lengths."""
    work, count, kind = setting.workload, setting.count, setting.config.objective.kind
    forward = forward_flops(count, work.tokens, work.attended)
    passes = 4 if setting.parallel.recompute else 3
    teacher = 0.0
    for name, model in zip(setting.config.teachers, setting.teachers, strict=True):
        own = [load for load in work.domains if load.teacher == name]
        tokens = sum(load.rollouts * load.mean for load in own)
        attended = sum(load.rollouts * load.mean**2 / 2 for load in own)
        rows = sum(load.rollouts * load.response for load in own)
        teacher += forward_flops(model, tokens, attended) + SCORE_PRODUCTS[kind] * product_flops(model, rows)
    generates = setting.config.generates
    return PhaseFlops(
        rollout=forward + product_flops(count, work.response_tokens) if generates else 0.0,
        teacher=teacher,
        update=passes * forward + LOSS_PRODUCTS[kind] * product_flops(count, work.response_tokens),
    )

"""The part of a run's file that says how weights are updated: the keys under `optim`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mopd.yaml_config import require


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """AdamW through Megatron's distributed optimizer."""

    lr: float
    """After the warm-up."""
    min_lr: float = 0.0
    """At the last step, where `schedule` is not constant."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """From `lr` after the warm-up to `min_lr` at the last step."""
    warmup_steps: int = 0
    """Update i of these, from 0, has the rate lr (i + 1) / warmup_steps."""
    clip_grad: float = 1.0
    """Global norm; 0 switches clipping off."""
    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Of the first and the second moment."""
    eps: float = 1.0e-8
    """Beside the root of the second moment."""
    updates_per_step: int = 1
    """Optimizer updates per batch of rollouts; 1 is strictly on-policy."""
    max_tokens_per_microbatch: int = 16384
    """Tokens that a data-parallel rank packs into one forward pass; a single longer rollout has a micro-batch of its
    own. Memory and speed only: the update does not depend on it."""
    freeze_router: bool = False
    """MoE: leave the routers' weights as they are."""
    offload: bool = False
    """Keep AdamW's two moments in host memory: 8 bytes a parameter (of the rank's share) less on a GPU; every update
    copies them over PCIe and back, while it computes."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr: must be > 0")
        require(0 <= self.min_lr <= self.lr, "min_lr: must be in [0, lr]")
        require(self.warmup_steps >= 0, "warmup_steps: must be >= 0")
        require(self.clip_grad >= 0, "clip_grad: must be >= 0 (0 is off)")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas: two numbers in [0, 1)")
        require(self.updates_per_step >= 1, "updates_per_step: must be >= 1")
        require(self.max_tokens_per_microbatch >= 1, "max_tokens_per_microbatch: must be >= 1")

"""Implementations of others that are installed and can run on the device. Imported only here, and only if there."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.objective import DivergenceKind

Rows = Callable[[Tensor, Tensor], Tensor]
"""Logits [T, V] of student and teacher -> loss, summed over the rows."""

MISSING = "liger-kernel: not installed (pip install --no-deps liger-kernel), so not measured"
CUDA_ONLY = "liger-kernel: its losses of logits are Triton kernels for a GPU, nothing to compare on a CPU"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _liger(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.{module}"), name)


def liger_divergences(device: torch.device) -> tuple[tuple[str, DivergenceKind, Rows], ...]:
    """(name, kind of divergence, loss). Both take log-probs: the log_softmax before them is part of the bill."""
    if not installed("liger_kernel"):
        print(MISSING)
        return ()
    if device.type != "cuda":
        print(CUDA_ONLY)
        return ()
    jsd = _liger("transformers.jsd", "LigerJSD")(beta=1.0)  # 1: KL(student || teacher)
    kl_div = _liger("transformers.kl_div", "LigerKLDIVLoss")(reduction="sum", log_target=True)

    def reverse(student: Tensor, teacher: Tensor) -> Tensor:
        mean: Tensor = jsd(student.float().log_softmax(-1), teacher.float().log_softmax(-1))
        return mean * len(student)

    def forward(student: Tensor, teacher: Tensor) -> Tensor:
        total: Tensor = kl_div(student.float().log_softmax(-1), teacher.float().log_softmax(-1))
        return total

    return (("liger JSD", "reverse_kl", reverse), ("liger KLDIV (forward KL)", "forward_kl", forward))


def liger_token_logprob(device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Logits, ids -> summed log-prob; it overwrites the logits with their gradient, as ours does."""
    if not installed("liger_kernel"):
        print(MISSING)
        return None
    if device.type != "cuda":
        print(CUDA_ONLY)
        return None
    loss = _liger("transformers.cross_entropy", "LigerCrossEntropyLoss")(reduction="sum")
    return lambda logits, ids: -loss(logits, ids)


Linear = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Hidden states and weight of the student, of the teacher -> loss, the mean over the rows."""


def liger_linear(device: torch.device, compiled: bool, chunk: int) -> tuple[tuple[str, Linear], ...]:
    """Its chunked loss, as it is and compiled; on a GPU its Triton loss too."""
    if not installed("liger_kernel"):
        print(MISSING)
        return ()
    kind = _liger("chunked_loss", "LigerFusedLinearJSDLoss")

    def chunked(compile_it: bool) -> Linear:
        # Soft loss only; beta = 1 is KL(student || teacher); its mean over the labels that are not -100.
        loss = kind(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compile_it, chunk_size=chunk)
        return lambda x, w, xt, wt: loss(x, w, xt, wt, torch.zeros(len(x), dtype=torch.long, device=x.device))

    found = [("liger chunked", chunked(False))]
    if compiled:
        found.append(("liger chunked, compiled", chunked(True)))
    if device.type == "cuda":
        fused = _liger("transformers.fused_linear_jsd", "LigerFusedLinearJSD")(jsd_beta=1.0)
        found.append(("liger fused_linear_jsd", lambda x, w, xt, wt: fused(x, w, xt, wt, None)))
    return tuple(found)

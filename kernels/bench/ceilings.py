"""What an operation must move or multiply at the least, and what this device can."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from kernels.bench.measure import Meter

# Times that each logit is read forward, read backward and written backward: kernels/README.md.
PASSES = {"divergence": (2, 2, 1), "token_logprob": (1, 1, 1), "topk_divergence": (1, 1, 1)}
PRODUCTS = 4
"""Of matrices in `linear_divergence`: both sets of logits, dX and dW. Those made again in backward do not count."""


@dataclass(frozen=True, slots=True)
class Work:
    """Of one forward and backward, by construction: the same for every contender, so GB/s are effective ones."""

    amount: float
    """Bytes, or floating-point operations."""
    unit: str
    scale: float
    ceiling: str

    def rate(self, seconds: float) -> float:
        """GB/s or TFLOP/s."""
        return self.amount / seconds / self.scale


def logits_work(operation: str, tokens: int, vocab: int, itemsize: int) -> Work:
    return Work(float(sum(PASSES[operation]) * tokens * vocab * itemsize), "GB/s", 1e9, "copy")


def linear_work(tokens: int, hidden: int, vocab: int) -> Work:
    return Work(2.0 * PRODUCTS * tokens * hidden * vocab, "TFLOP/s", 1e12, "GEMM")


def measured_ceiling(work: Work, meter: Meter, repeats: int = 5) -> float:
    """GB/s of a device copy (a read and a write), or TFLOP/s of a bf16 product of random matrices."""
    cuda = meter.device.type == "cuda"
    if work.ceiling == "copy":
        source = torch.ones((1 << 30 if cuda else 1 << 28) // 2, dtype=torch.bfloat16, device=meter.device)
        target = torch.empty_like(source)
        amount = 2.0 * source.numel() * source.itemsize
        times = [meter.time(lambda: target.copy_(source))[0] for _ in range(repeats + 1)]
    else:
        size = 8192 if cuda else 2048
        left, right = (torch.randn(size, size, device=meter.device).bfloat16() for _ in range(2))
        amount = 2.0 * size**3
        times = [meter.time(lambda: left @ right)[0] for _ in range(repeats + 1)]
    return amount / statistics.median(times[1:]) / work.scale

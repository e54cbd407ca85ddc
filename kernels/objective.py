"""Which divergence is meant, and the checks that all operations share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd", "mixed"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays what it is (tests); everything else accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Objective:
    """p student, q teacher, both at `temperature`.

    reverse_kl  KL(p || q)                                  sampled tokens judged by the teacher; MOPD, DeepSeek-V4
    forward_kl  KL(q || p)                                  classic distillation
    mixed       alpha KL(q || p) + (1 - alpha) KL(p || q)
    jsd         beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p       GKD, arXiv 2306.13649 Eq. 1
    """

    kind: DivergenceKind = "reverse_kl"
    alpha: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(DivergenceKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(DivergenceKind))}, got '{self.kind}'")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta must be in (0, 1), got {self.beta}: its limits are the kinds forward and reverse KL"
            )
        check_temperature(self.temperature)

    @property
    def both(self) -> bool:
        """Whether the teacher's expectations are needed beside the student's."""
        return self.kind in ("forward_kl", "mixed")


def check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_weights(weights: Tensor | None, tokens: int, device: torch.device) -> None:
    if weights is None:
        return
    if weights.shape != (tokens,) or not weights.is_floating_point() or weights.device != device:
        given = f"{tuple(weights.shape)} {weights.dtype} on {weights.device}"
        raise ValueError(f"weights are {given}: expected ({tokens},) floats on {device}, one for each row")
    if weights.requires_grad:
        raise ValueError("weights require a gradient, but are constants here: detach them")


def check_tokens(token_ids: Tensor, tokens: int, device: torch.device, vocab_size: int) -> None:
    """ValueError unless ids are [T] integers in [0, vocab_size) on the device."""
    if token_ids.shape != (tokens,) or token_ids.dtype not in (torch.int64, torch.int32):
        given = f"{tuple(token_ids.shape)} {token_ids.dtype}"
        raise ValueError(f"token_ids are {given}: expected ({tokens},) of torch.int64, one for each hidden state")
    if token_ids.device != device:
        raise ValueError(f"token_ids are on {token_ids.device}, hidden on {device}")
    check_ids(token_ids, vocab_size)


def check_ids(token_ids: Tensor, vocab_size: int, lowest: int = 0) -> None:
    """lowest: -1 where that marks an unused place."""
    if token_ids.numel():
        low, high = (int(bound) for bound in token_ids.aminmax())
        if low < lowest or high >= vocab_size:
            raise ValueError(f"token id {low if low < lowest else high} is outside the vocabulary of {vocab_size}")


def active_runs(weights: Tensor | None, tokens: int) -> list[slice]:
    """Stretches of rows with a weight other than zero: the others need no work. At least one, maybe empty.

    On a GPU looking at the weights would stall the queue, so there it is always all rows.
    """
    if weights is None or weights.is_cuda or tokens == 0:
        return [slice(0, tokens)]
    active = (weights != 0).to(torch.int8)
    edges = torch.diff(active, prepend=active.new_zeros(1), append=active.new_zeros(1)).nonzero()[:, 0].tolist()
    runs = [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return runs or [slice(0, 0)]


def split(runs: list[slice], size: int) -> tuple[slice, ...]:
    """Runs cut into pieces of at most `size` rows; empty runs stay."""
    return tuple(
        slice(start, min(start + size, run.stop))
        for run in runs
        for start in range(run.start, max(run.stop, run.start + 1), size)
    )

"""Which implementation of the row primitives runs. `rows_torch` documents them; all give the same numbers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor

from kernels import rows_torch

Implementation = Literal["auto", "reference", "torch", "cpp", "triton", "cuda"]

WORTH_COMPILING = 1 << 14
"""Logits from which `auto` on a CPU takes (and if need be builds) the C++ extension: below, torch is as fast."""

_LOG = logging.getLogger(__name__)


class RowKernels(Protocol):
    """See `rows_torch`, function by function."""

    def divergence_sums(self, student: Tensor, teacher: Tensor, *, both: bool) -> Tensor: ...
    def divergence_gradient(self, student: Tensor, teacher: Tensor, rows: Tensor, out: Tensor) -> Tensor: ...
    def jsd_sums(self, student: Tensor, teacher: Tensor, rows: Tensor, beta: float) -> Tensor: ...
    def jsd_gradient(self, student: Tensor, teacher: Tensor, rows: Tensor, beta: float, out: Tensor) -> Tensor: ...
    def token_sums(self, logits: Tensor, ids: Tensor, owned: Tensor) -> Tensor: ...
    def token_gradient(self, logits: Tensor, ids: Tensor, owned: Tensor, rows: Tensor, out: Tensor) -> Tensor: ...


def check_implementation(impl: str) -> None:
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {', '.join(get_args(Implementation))}, got '{impl}'")


def row_kernels(impl: Implementation, device: torch.device, dtype: torch.dtype, elements: int) -> RowKernels:
    """The row primitives for logits [T, rows] with `elements` elements in all.

    `auto`: Triton on CUDA, C++ on a CPU for large fp32 or bf16 logits, else torch; logs once what it chose.
    Raises ValueError for an unknown `impl`, RuntimeError when the one asked for by name cannot run here.
    """
    check_implementation(impl)
    if impl == "reference":
        raise ValueError("impl='reference' holds all logits: it exists for divergences of logits only")
    if impl == "cuda":
        raise ValueError("impl='cuda' exists for divergences of logits only")
    if impl == "auto":
        impl = _automatic(device, dtype, elements)
    if impl == "torch":
        return cast(RowKernels, rows_torch)
    reason = _why_not(impl, device.type)
    if reason is not None:
        raise RuntimeError(f"impl='{impl}' cannot run here: {reason}")
    return cast(RowKernels, importlib.import_module(f"kernels.rows_{impl}"))


def fused_layers(kernels: RowKernels) -> Any:
    """The module that goes with these and makes logits in registers, `layers_triton`; None if there is none."""
    if getattr(kernels, "__name__", "") != "kernels.rows_triton":
        return None
    return importlib.import_module("kernels.layers_triton")


def _automatic(device: torch.device, dtype: torch.dtype, elements: int) -> Implementation:
    small = device.type == "cpu" and elements < WORTH_COMPILING
    if small or dtype not in (torch.float32, torch.bfloat16) or device.type not in ("cpu", "cuda"):
        return "torch"
    best: Implementation = "triton" if device.type == "cuda" else "cpp"
    return _announce(best, device.type)


@functools.cache
def _announce(best: Implementation, device: str) -> Implementation:
    """Cached: the check may build an extension, and once is enough to say so."""
    reason = _why_not(best, device)
    if reason is not None:
        _LOG.warning("divergences on %s run in plain torch: %s unavailable (%s)", device, best, reason)
        return "torch"
    _LOG.info("divergences on %s run in %s", device, best)
    return best


def _why_not(impl: str, device: str) -> str | None:
    """Why the implementation cannot run on the device; None if it can."""
    if importlib.util.find_spec(f"kernels.rows_{impl}") is None:
        return f"kernels/rows_{impl}.py is not installed"
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs CUDA tensors, or TRITON_INTERPRET=1 in the environment; these are on {device}"
        return None
    if device != "cpu":
        return f"it needs tensors on the CPU, these are on {device}"
    module = importlib.import_module("kernels.rows_cpp")
    return None if module.available() else str(getattr(module, "reason", lambda: "it could not be built")())

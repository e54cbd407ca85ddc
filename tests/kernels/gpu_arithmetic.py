"""Where Triton's interpreter computes otherwise than a GPU."""

from __future__ import annotations

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _fused_multiply_add(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """One rounding, as on a GPU; the interpreter's own has two."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _larger_number(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle) -> TensorHandle:
    """Without `propagate_nan` the maximum of a NaN and a number is the number, as on a GPU."""
    return TensorHandle(np.fmax(x.data, y.data), x.dtype.scalar)


def install() -> None:
    InterpreterBuilder.create_fma = _fused_multiply_add
    InterpreterBuilder.create_maxnumf = _larger_number

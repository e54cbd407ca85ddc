"""Reverse KL and its gradient in one read of the logits: the CUDA C++ kernel of `csrc/reverse_kl_sm90.cu`.

6 bytes a logit of bf16 (2 + 2 read, 2 written) where sums and gradient apart take 10; for the whole vocabulary on
one rank, on sm_90. The gradient is there after forward, for the upstream gradient 1: backward only scales the rows
whose upstream gradient is another, which costs another read and write of those.

Not chosen by impl="auto": the machine code is checked against limits and its arithmetic on a CPU against float64,
but the launch has not been run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import build_cuda, sweep
from kernels.build_cpp import Unavailable
from kernels.objective import Objective
from kernels.partials import Joined
from kernels.shard import VocabShard

ALIGNMENT = 16
"""Bytes that are read at once: rows start at multiples of it."""

LARGEST_VOCABULARY = 226 * 1024 // (2 * ALIGNMENT) * 32
"""Columns of two rows that fit the shared memory of four blocks."""


def why_not(device: torch.device) -> str | None:
    """Why the kernel cannot run on the device; None if it can. Builds it if need be."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it is compiled for sm_90, {torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}"
    try:
        build_cuda.load()
    except Unavailable as error:
        return str(error)
    return None


def divergence(
    student_logits: Tensor, teacher: Tensor, objective: Objective, shard: VocabShard, weights: Tensor | None,
    *, inplace: bool,
) -> Tensor:  # fmt: skip
    """`kernels.divergence` with impl="cuda": student_logits [T, V or more] and teacher [T, V] -> [T] fp32.

    If a gradient is wanted, **forward** puts it where the logits were (`inplace`), or into a new tensor.
    Raises ValueError for anything but reverse_kl of aligned bf16 logits on one rank, RuntimeError where it cannot run.
    """
    if objective.kind != "reverse_kl" or shard.ranks > 1:
        raise ValueError(f"impl='cuda' is for reverse_kl on one rank, not {objective.kind} on {shard.ranks}")
    reason = why_not(student_logits.device)
    if reason is not None:
        raise RuntimeError(f"impl='cuda' cannot run here: {reason}")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher)):
        _check(name, logits, shard.rows)
    wanted = torch.is_grad_enabled() and student_logits.requires_grad
    value: Tensor = _OneRead.apply(student_logits, teacher, weights, objective.temperature, shard.rows, inplace, wanted)
    return value


def _check(name: str, logits: Tensor, columns: int) -> None:
    size = logits.element_size()
    aligned = logits.stride(1) == 1 and logits.stride(0) * size % ALIGNMENT == 0 and logits.data_ptr() % ALIGNMENT == 0
    if logits.dtype != torch.bfloat16 or columns * size % ALIGNMENT or not aligned or columns > LARGEST_VOCABULARY:
        given = f"{name} {tuple(logits.shape)} {logits.dtype} with strides {logits.stride()} and {columns} tokens"
        raise ValueError(
            f"{given}: impl='cuda' needs bf16, rows that start at multiples of {ALIGNMENT} bytes, and a vocabulary "
            f"that is a multiple of {ALIGNMENT // 2} up to {LARGEST_VOCABULARY}"
        )


class _OneRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor | None, temperature: float, columns: int,
        inplace: bool, wanted: bool,
    ) -> Tensor:  # fmt: skip
        out = None
        if wanted:
            out = student if inplace else torch.empty_like(student)
            out[:, columns:] = 0
        scale = torch.ones(len(student), device=student.device) if weights is None else weights.float()
        sums = _launch(student, teacher, out, scale.contiguous(), temperature, columns)
        if wanted and inplace:  # written without autograd's knowledge: what others have saved of it is gone
            torch.autograd.graph.increment_version(student)
        ctx.out, ctx.columns = out, columns
        return sweep.weigh(Joined(sums.double()).reverse_kl(), weights).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        out, ctx.out = ctx.out, None
        if out is None:
            raise ValueError("second backward through divergence(impl='cuda'): its one gradient has been given away")
        _scale(out, upstream.float().contiguous(), ctx.columns)
        return out, None, None, None, None, None, None


def _launch(
    student: Tensor, teacher: Tensor, out: Tensor | None, upstream: Tensor, temperature: float, columns: int
) -> Tensor:
    """-> [6, T] fp32, as `rows_torch.divergence_sums` of the logits over the temperature."""
    sums = upstream.new_empty(6, len(student))
    if len(student):
        target, stride = (None, 0) if out is None else (out.data_ptr(), out.stride(0))
        _call(
            "one_read_launch", student.device, student.data_ptr(), teacher.data_ptr(), target, upstream.data_ptr(),
            sums.data_ptr(), len(student), columns, student.stride(0), teacher.stride(0), stride,
            1.0 / (temperature * math.log(2.0)),
        )  # fmt: skip
    return sums


def _scale(rows: Tensor, factors: Tensor, columns: int) -> None:
    if len(rows):
        pointers = rows.data_ptr(), factors.data_ptr()
        _call("scale_rows_launch", rows.device, *pointers, len(rows), columns, rows.stride(0))


def _call(name: str, device: torch.device, *arguments: float | None) -> None:
    """On the current stream; RuntimeError with CUDA's message if the launch is refused."""
    library = build_cuda.load()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    status = getattr(library, name)(*arguments, device.index or 0, ctypes.c_void_p(stream))
    if status:
        raise RuntimeError(f"{name}: {library.error_text(status).decode()}")

"""Row primitives on a GPU (sm_90), in Triton. Same functions and numbers as `rows_torch` and `rows_cpp`.

One vocabulary shard, no collectives. Logits are [C, rows of the shard] in fp32, bf16 or fp16, read once, 16 bytes at
a time if rows start at multiples of that (Megatron's shards do). With `TRITON_INTERPRET=1` set before Triton is
imported the same kernels run on the CPU, slowly, for tests. What they compile to: `python -m kernels.aot`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.triton_divergence import divergence_gradient_kernel, divergence_sums_kernel, merge_splits_kernel
from kernels.triton_jsd import jsd_gradient_kernel, jsd_sums_kernel
from kernels.triton_token import token_gradient_kernel, token_sums_kernel

LANES = 128
"""Threads of a program, 4 warps: five programs' registers fit on a multiprocessor."""

LANE_COLUMNS = 32
"""Columns of a lane between two changes of centre, so that these cost one instruction per column."""

BLOCK, BLOCKS = 1024, 8
"""Columns that a program of the gradients does at once, and how often."""

PROGRAMS = 528
"""Fewer rows than this (4 on each of the 132 multiprocessors) are split, so that none is idle."""

MIN_SPLIT = 8192
"""Columns below which a split costs more than it brings."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and why not."""
    if triton.knobs.runtime.interpret:
        return True, "Triton's interpreter, on the CPU"
    if not torch.cuda.is_available():
        return False, "no CUDA device, and TRITON_INTERPRET is not set"
    return True, torch.cuda.get_device_name()


def divergence_sums(student: Tensor, teacher: Tensor, *, both: bool) -> Tensor:
    """[C, rows] twice -> [6 or 8, C] fp32: m, Z, n, F, D, A and with `both` E, B.

    x = z - m, y = t - n, m = max z, n = max t; Z = sum e^x, F = sum (e^y - e^x), D = sum e^x (x - y),
    A = sum e^x x, E = sum e^y (y - x), B = sum e^y y. A -inf of both is masked: it counts nowhere.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    student, teacher = _check(student), _check(teacher, student)
    count, columns = student.shape
    splits, width = _split(count, columns, student)
    parts = student.new_empty((splits, 8 if both else 6, count), dtype=torch.float32)
    if count == 0:
        return parts[0]
    divergence_sums_kernel[(count, splits)](
        student, teacher, parts, student.stride(0), teacher.stride(0), columns, width, count,
        BOTH=both, **_tile(student, teacher), num_warps=4,
    )  # fmt: skip
    if splits == 1:
        return parts[0]
    out = torch.empty_like(parts[0])
    merge_splits_kernel[(triton.cdiv(count, LANES),)](parts, out, count, splits, BOTH=both, BLOCK=LANES, num_warps=4)
    return out


def divergence_gradient(student: Tensor, teacher: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out_j = e^x (r0 (x - y) + r1) + r2 e^y with rows [5, C] fp32 = m, n, r0, r1, r2; returns `out`.

    `out` [C, rows of the shard], any float dtype, may be `student` itself. Rows with r2 = 0 are cheaper.
    """
    target = out
    student, teacher = _check(student), _check(teacher, student)
    count, columns = _check_gradient(student, rows, 5, out)
    if count and columns:
        divergence_gradient_kernel[_slabs(count, columns)](
            student, teacher, rows.contiguous(), out, student.stride(0), teacher.stride(0), out.stride(0), columns,
            count, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4,
        )  # fmt: skip
    return target


def jsd_sums(student: Tensor, teacher: Tensor, rows: Tensor, beta: float) -> Tensor:
    """rows [2, C] = log-sum-exps of the whole vocabulary -> [2, C]: this shard's share of K_P and K_Q.

    K_P = sum p (log p - log mix), K_Q = sum q (log q - log mix), mix = beta q + (1 - beta) p.
    """
    student, teacher = _check(student), _check(teacher, student)
    count, columns = student.shape
    _check_rows(student, rows, 2)
    splits, width = _split(count, columns, student)
    parts = student.new_empty((splits, 2, count), dtype=torch.float32)
    if count:
        jsd_sums_kernel[(count, splits)](
            student, teacher, rows.contiguous(), parts, student.stride(0), teacher.stride(0), columns, width, count,
            beta, **_tile(student, teacher), num_warps=4,
        )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)


def jsd_gradient(student: Tensor, teacher: Tensor, rows: Tensor, beta: float, out: Tensor) -> Tensor:
    """out_j = scale (1 - beta) p (log p - log mix - K_P), rows [4, C] = lse_s, lse_t, K_P, scale; returns `out`."""
    student, teacher = _check(student), _check(teacher, student)
    count, columns = _check_gradient(student, rows, 4, out)
    if count and columns:
        jsd_gradient_kernel[_slabs(count, columns)](
            student, teacher, rows.contiguous(), out, student.stride(0), teacher.stride(0), out.stride(0), columns,
            count, beta, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4,
        )  # fmt: skip
    return out


def token_sums(logits: Tensor, ids: Tensor, owned: Tensor) -> Tensor:
    """ids [C] local columns, valid where owned [C] -> [4, C] fp32: m, Z, A, logit of the token (0 if not owned)."""
    logits = _check(logits)
    count, columns = logits.shape
    out = logits.new_empty((4, count), dtype=torch.float32)
    if count:
        token_sums_kernel[(count,)](
            logits, ids.contiguous(), owned.to(torch.int8), out, logits.stride(0), columns, count,
            **_tile(logits), num_warps=4,
        )  # fmt: skip
    return out


def token_gradient(logits: Tensor, ids: Tensor, owned: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out_j = r0 e^x + r1 1[j = id and owned], rows [3, C] fp32 = m, r0, r1; returns `out`, which may be `logits`."""
    logits = _check(logits)
    count, columns = _check_gradient(logits, rows, 3, out)
    if count and columns:
        token_gradient_kernel[_slabs(count, columns)](
            logits, ids.contiguous(), owned.to(torch.int8), rows.contiguous(), out, logits.stride(0), out.stride(0),
            columns, count, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4,
        )  # fmt: skip
    return out


def _check(logits: Tensor, like: Tensor | None = None) -> Tensor:
    """The logits with columns next to one another; ValueError unless they can be read, and fit `like`."""
    if logits.ndim != 2 or logits.dtype not in _FLOATS:
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}: expected [C, rows] in fp32, bf16 or fp16")
    if like is not None and (logits.shape != like.shape or logits.device != like.device):
        one, other = (f"{tuple(each.shape)} on {each.device}" for each in (like, logits))
        raise ValueError(f"student's logits are {one}, teacher's {other}")
    possible, reason = available()
    if not possible or (logits.device.type == "cpu") != triton.knobs.runtime.interpret:
        raise ValueError(f"Triton kernels cannot run on logits on {logits.device}: {reason}")
    return logits if logits.stride(1) == 1 or logits.shape[1] <= 1 else logits.contiguous()


def _check_rows(logits: Tensor, rows: Tensor, count: int) -> None:
    if rows.shape != (count, logits.shape[0]) or rows.dtype != torch.float32:
        raise ValueError(
            f"rows are {tuple(rows.shape)} {rows.dtype}: expected {(count, logits.shape[0])} torch.float32"
        )


def _check_gradient(logits: Tensor, rows: Tensor, count: int, out: Tensor) -> tuple[int, int]:
    _check_rows(logits, rows, count)
    if out.shape != logits.shape or out.device != logits.device or out.dtype not in _FLOATS:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype} on {out.device}: it must fit {tuple(logits.shape)}")
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}: its columns must lie next to one another")
    return logits.shape[0], logits.shape[1]


def _tile(*logits: Tensor) -> dict[str, int]:
    """16 bytes of the widest dtype to a lane."""
    vec = 16 // max(each.element_size() for each in logits)
    return {"GROUPS": LANE_COLUMNS // vec, "LANES": LANES, "VEC": vec}


def _split(count: int, columns: int, logits: Tensor) -> tuple[int, int]:
    """How many programs share a row, and the columns of each: a multiple of every tile's."""
    wanted = max(1, min(triton.cdiv(PROGRAMS, max(count, 1)), columns // MIN_SPLIT))
    step = LANES * LANE_COLUMNS
    width = triton.cdiv(triton.cdiv(max(columns, 1), wanted), step) * step
    return triton.cdiv(max(columns, 1), width), width


def _slabs(count: int, columns: int) -> tuple[int, int]:
    return count, triton.cdiv(columns, BLOCK * BLOCKS)

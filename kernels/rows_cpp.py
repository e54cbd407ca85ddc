"""Row primitives in C++ for CPUs: what one vocabulary shard contributes, each logit read once, no temporary.

With z the student's logits, t the teacher's, m = max z, n = max t over the shard, x = z - m, y = t - n.
Logits are [C, rows] on the CPU in fp32 or bf16, one dtype for student and teacher, with any stride between rows;
sums and per-row numbers are fp32. `out` is fp32 or bf16, whatever the logits are. Same numbers as `rows_torch`: a
logit of -inf is a token of probability 0, one that is more than 1e4 below its maximum counts as 1e4 below.
No collectives. Rows are divided among `torch.get_num_threads()` threads; a row's sums do not depend on how many.

Every function raises `ValueError` for tensors that do not fit, and `Unavailable` where `available()` is False.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kernels.build_cpp import Unavailable, instruction_sets, load

__all__ = [
    "Unavailable",
    "available",
    "divergence_gradient",
    "divergence_sums",
    "jsd_gradient",
    "jsd_sums",
    "reason",
    "token_gradient",
    "token_sums",
]

DTYPES = (torch.float32, torch.bfloat16)


class Call(ctypes.Structure):
    """As in csrc/rows.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "out", "sums", "per_row", "ids", "owned")),
        *((n, ctypes.c_int64) for n in ("rows", "columns", "student_stride", "teacher_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("half", "out_half", "both", "threads")),
        ("beta", ctypes.c_float),
    )


@functools.cache
def reason() -> str | None:
    """None where the functions below work; builds the library if this is the first time on this machine."""
    try:
        load(instruction_sets()[0])
    except Unavailable as error:
        return str(error)
    return None


def available() -> bool:
    """Whether there is a library or a compiler to make it with."""
    return reason() is None


def divergence_sums(student: Tensor, teacher: Tensor, *, both: bool) -> Tensor:
    """[6 or 8, C]: m, Z = sum e^x, n, F = sum (e^y - e^x), D = sum e^x (x - y), A = sum e^x x, and with `both`
    E = sum e^y (y - x), B = sum e^y y. An empty shard has m = n = -1e30 and zeros."""
    sums = torch.empty(8 if both else 6, student.shape[0])
    _run("divergence_sums", student, teacher, sums=sums, both=both)
    return sums


def divergence_gradient(student: Tensor, teacher: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out_j = e^x (r0 (x - y) + r1) + r2 e^y with rows [5, C] = m, n, r0, r1, r2; `out` may be `student`."""
    _run("divergence_gradient", student, teacher, rows=_rows(rows, 5, student), out=out)
    return out


def jsd_sums(student: Tensor, teacher: Tensor, rows: Tensor, beta: float) -> Tensor:
    """[2, C]: sum p (log p - log mix), sum q (log q - log mix); mix = beta q + (1 - beta) p, 0 < beta < 1; rows [2, C]
    = log-sum-exp of student and teacher over the whole vocabulary."""
    sums = torch.empty(2, student.shape[0])
    _run("jsd_sums", student, teacher, rows=_rows(rows, 2, student), beta=beta, sums=sums)
    return sums


def jsd_gradient(student: Tensor, teacher: Tensor, rows: Tensor, beta: float, out: Tensor) -> Tensor:
    """out_j = scale (1 - beta) p (log p - log mix - K_P), rows [4, C] = lse student, lse teacher, K_P = KL(p || mix),
    scale; `out` may be `student`."""
    _run("jsd_gradient", student, teacher, rows=_rows(rows, 4, student), beta=beta, out=out)
    return out


def token_sums(logits: Tensor, ids: Tensor, owned: Tensor) -> Tensor:
    """[4, C]: m, Z, A, and z of the token `ids` [C] (local), 0 where another shard owns it (`owned` [C] is False)."""
    sums = torch.empty(4, logits.shape[0])
    _run("token_sums", logits, ids=ids, owned=owned, sums=sums)
    return sums


def token_gradient(logits: Tensor, ids: Tensor, owned: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out_j = r0 e^x + r1 1[owned and j = id] with rows [3, C] = m, r0, r1; `out` may be `logits`."""
    _run("token_gradient", logits, ids=ids, owned=owned, rows=_rows(rows, 3, logits), out=out)
    return out


def _run(
    name: str,
    student: Tensor,
    teacher: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    ids: Tensor | None = None,
    owned: Tensor | None = None,
    sums: Tensor | None = None,
    out: Tensor | None = None,
    both: bool = False,
    beta: float = 0.5,
) -> None:
    """Checks, and calls the library. What is made here lives until it returns."""
    _check(student, teacher, out, beta)
    count, columns = student.shape
    student = student if student.stride(1) == 1 else student.contiguous()
    call = Call(rows=count, columns=columns, both=both, beta=beta, half=student.dtype == torch.bfloat16)
    call.threads = max(1, min(torch.get_num_threads(), count))
    call.student, call.student_stride = student.data_ptr(), student.stride(0)
    if teacher is not None:
        teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
        call.teacher, call.teacher_stride = teacher.data_ptr(), teacher.stride(0)
    if ids is not None and owned is not None:
        ids, owned = _tokens(ids, owned, student)
    for field, tensor in (("per_row", rows), ("ids", ids), ("owned", owned), ("sums", sums)):
        if tensor is not None:
            setattr(call, field, tensor.data_ptr())
    result = out
    if out is not None:
        direct = out.stride(1) == 1 and (out.stride(0) >= columns or count < 2)
        result = out if direct else torch.empty_like(out, memory_format=torch.contiguous_format)
        call.out, call.out_stride, call.out_half = result.data_ptr(), result.stride(0), out.dtype == torch.bfloat16
    getattr(load(instruction_sets()[0]), name)(ctypes.byref(call))
    if out is not None and result is not None:
        if result is not out:
            out.copy_(result)
        elif not out.is_inference():  # a second backward through an overwritten tensor must be noticed
            torch.autograd.graph.increment_version(out)


def _check(student: Tensor, teacher: Tensor | None, out: Tensor | None, beta: float) -> None:
    logits = _describe(student)
    if student.ndim != 2 or student.dtype not in DTYPES or student.device.type != "cpu":
        raise ValueError(f"logits are {logits}: expected [C, rows] of float32 or bfloat16 on the CPU")
    if teacher is not None and _describe(teacher) != logits:
        raise ValueError(f"student logits are {logits}, teacher logits {_describe(teacher)}: expected the same")
    if out is not None and (out.shape != student.shape or out.dtype not in DTYPES or out.device != student.device):
        raise ValueError(f"logits are {logits}, out is {_describe(out)}: expected their shape, float32 or bfloat16")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _rows(rows: Tensor, count: int, logits: Tensor) -> Tensor:
    """[count, C] contiguous fp32."""
    if rows.shape != (count, logits.shape[0]) or rows.device.type != "cpu":
        raise ValueError(f"rows are {_describe(rows)}: expected ({count}, {logits.shape[0]}) on the CPU")
    return rows.float().contiguous()


def _tokens(ids: Tensor, owned: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """int64 and bool, contiguous. An owned id outside the shard would be read from, or written to, foreign memory."""
    count, columns = logits.shape
    if ids.shape != (count,) or owned.shape != (count,) or owned.dtype != torch.bool:
        raise ValueError(
            f"ids are {_describe(ids)}, owned {_describe(owned)}: expected ({count},), owned of torch.bool"
        )
    outside = owned & ((ids < 0) | (ids >= columns))
    if outside.any():
        raise ValueError(f"token {int(ids[outside][0])} is outside the shard of {columns}")
    return ids.long().contiguous(), owned.contiguous()

"""Products of bf16 matrices with fp32 results on a CPU: what the output layers of `linear_divergence` multiply with.

torch.mm on a CPU gives bf16 results for bf16 operands, and a logit rounded to bf16 spoils the gradient of a small
divergence; copies in fp32 cost twice the memory and three times the time. Here bf16 products are summed and returned
in fp32 by oneDNN's matrix kernel (AVX-512 or AMX), as torch carries it for its attention on CPUs. torch exports the
function but does not promise it, so it is tried on a small product first; without it `available()` is False.

No collectives. Columns or rows of the result are divided among `torch.get_num_threads()` threads.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels.build_cpp import Unavailable, instruction_sets, load

KERNEL = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
"""at::native::cpublas::brgemm for bf16 and brgemm_release, as libtorch_cpu names them."""


class Product(ctypes.Structure):
    """As in csrc/products.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "c")),
        *((name, ctypes.c_int64) for name in ("lda", "ldb", "ldc", "m", "n", "k")),
        *((name, ctypes.c_int32) for name in ("add", "threads")),
        *((name, ctypes.c_void_p) for name in ("kernel", "release")),
    )


@functools.cache
def reason() -> str | None:
    """None where the functions below work, else why they do not."""
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        return "the CPU does not multiply bf16 (AVX512_BF16)"
    try:
        load(instruction_sets()[0])
        _torch_functions()
    except (Unavailable, OSError, AttributeError) as error:
        return str(error)
    return _why_wrong()


def available() -> bool:
    return reason() is None


def nt(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [m, k] b [n, k]^T -> [m, n] fp32, written to `out` if given."""
    return _run("product_nt", a, b, (a.shape[0], b.shape[0], a.shape[1]), out, add=False)


def nn(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """a [m, k] b [k, n] -> [m, n] fp32, or added to `into`."""
    return _run("product_nn", a, b, (a.shape[0], b.shape[1], a.shape[1]), into, add=True)


def tn(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """a [k, m]^T b [k, n] -> [m, n] fp32, or added to `into`."""
    return _run("product_tn", a, b, (a.shape[1], b.shape[1], a.shape[0]), into, add=True)


@functools.cache
def _torch_functions() -> tuple[int | None, int | None]:
    """Addresses. Raises OSError or AttributeError if this torch has no such functions."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    kernel, release = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in (KERNEL, RELEASE))
    return kernel, release


def _why_wrong() -> str | None:
    """Small integers, whose products are exact: anything but equality means another function by the same name."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 8, shape, generator=draw).bfloat16() for shape in ((19, 70), (33, 70)))
    try:
        right = torch.equal(nt(a, b), a.float() @ b.float().t())
    except RuntimeError as error:
        return str(error)
    return None if right else "torch's bf16 matrix kernel does not compute what is expected of it"


def _run(name: str, a: Tensor, b: Tensor, size: tuple[int, int, int], into: Tensor | None, *, add: bool) -> Tensor:
    m, n, k = size
    for which, operand in (("a", a), ("b", b)):
        if operand.dtype != torch.bfloat16 or operand.device.type != "cpu" or operand.ndim != 2:
            given = f"{tuple(operand.shape)} {operand.dtype} on {operand.device}"
            raise ValueError(f"{which} is {given}: expected a matrix of torch.bfloat16 on the CPU")
    if (name == "product_nt" and b.shape[1] != k) or (name != "product_nt" and b.shape[0] != k):
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit {name}")
    if into is not None and (into.shape != (m, n) or into.dtype != torch.float32 or into.stride(1) != 1):
        raise ValueError(f"into is {tuple(into.shape)} {into.dtype}: expected [{m}, {n}] torch.float32 by rows")
    if min(m, n, k) == 0:
        return torch.zeros(m, n) if into is None else into if add else into.zero_()
    a, b = (operand if operand.stride(1) == 1 else operand.contiguous() for operand in (a, b))
    c = torch.empty(m, n) if into is None else into
    kernel, release = _torch_functions()
    product = Product(
        a.data_ptr(), b.data_ptr(), c.data_ptr(), a.stride(0), b.stride(0), c.stride(0), m, n, k,
        add and into is not None, torch.get_num_threads(), kernel, release,
    )  # fmt: skip
    if getattr(load(instruction_sets()[0]), name)(ctypes.byref(product)):
        raise RuntimeError("torch's bf16 matrix kernel refused to run on this CPU")
    return c

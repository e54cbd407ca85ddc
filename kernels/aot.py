"""`python -m kernels.aot`: compiles every GPU kernel to sm_90 without a GPU and holds it to limits.

A table of registers, spills, shared memory, 128-bit loads, and shuffles, barriers and instructions of a lane per
column: in the main loop of the kernels that have one, else on the path through the kernel, prologue included. The
exit status is 1 if a limit is exceeded. The CUDA C++ kernel joins the table where there is an nvcc.

Instructions decide whether a kernel can keep up with memory: at 3.35 TB/s an H100 has time for 35 of them while two
bf16 logits arrive (132 multiprocessors * 4 * 32 lanes * 1.755 GHz). An estimate; nothing here was timed on a GPU.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import layers_triton, rows_triton
from kernels.sass import Code, parse, parse_usage, shortest_and_longest_path
from kernels.triton_divergence import divergence_gradient_kernel, divergence_sums_kernel, merge_splits_kernel
from kernels.triton_jsd import jsd_gradient_kernel, jsd_sums_kernel
from kernels.triton_linear import linear_gradient_kernel, linear_sums_kernel
from kernels.triton_token import token_gradient_kernel, token_sums_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WARPS = 4
SIZES = {"bf16": 2, "fp32": 4}
HIDDEN_SIZES = ((2048, 2048), (2048, 4096), (1000, 1000))
"""Student's and teacher's; the last is no multiple of a tile and takes the masked loads."""

ONE_READ = Path(__file__).parent / "csrc" / "reverse_kl_sm90.cu"
ONE_READ_LIMIT = 35.0
"""Instructions per column, sums and gradient together; there is time for 53 while 6 bytes move."""

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory a block can have on sm_90."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """One kernel as it is launched."""

    name: str
    kernel: Any
    dtypes: dict[str, str]
    """Of the pointers that may be bf16; all others are fp32."""
    constants: dict[str, Any]
    limit: float
    """Instructions of a lane per column; infinite for a kernel that reads no logits."""
    longest: bool = False
    """Of the kernels without a loop: the longest path through them, not the shortest."""
    warps: int = WARPS
    stages: int = 3
    products: bool = False
    """Made of matrix products: instructions per column say nothing, those on tensor cores (HGMMA) must be there."""


@dataclass(frozen=True, slots=True)
class Report:
    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: str
    """128-bit loads of all loads of logits in the measured part."""
    shuffles: int
    barriers: int
    per_column: float
    """Instructions of a lane; 0 for a kernel that reads no logits."""
    limit: float
    faults: tuple[str, ...]


def _tile(dtype: str) -> dict[str, int]:
    vec = 16 // SIZES[dtype]
    return {"GROUPS": rows_triton.LANE_COLUMNS // vec, "LANES": rows_triton.LANES, "VEC": vec}


def configurations() -> list[Configuration]:
    """Everything that `rows_triton` launches for bf16 and fp32 logits."""
    slab = {"BLOCK": rows_triton.BLOCK, "BLOCKS": rows_triton.BLOCKS}
    found = []
    for dtype in ("bf16", "fp32"):
        logits = {"S": dtype, "T": dtype}
        for both, limit in ((False, 20.0), (True, 23.0)):
            name = f"divergence_sums {dtype}{' both' if both else ''}"
            constants = {"BOTH": both, **_tile(dtype)}
            found.append(Configuration(name, divergence_sums_kernel, logits, constants, limit))
        found.append(Configuration(f"jsd_sums {dtype}", jsd_sums_kernel, logits, _tile(dtype), 80.0))
        found.append(Configuration(f"token_sums {dtype}", token_sums_kernel, {"S": dtype}, _tile(dtype), 12.0))
    for dtype, out in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")):
        logits, name = {"S": dtype, "T": dtype, "OUT": out}, f"{dtype} -> {out}"
        for title, limit, longest in (("reverse KL", 15.0, False), ("with e^y", 18.5, True)):
            full = f"divergence_gradient {name}, {title}"
            found.append(Configuration(full, divergence_gradient_kernel, logits, slab, limit, longest))
        found.append(Configuration(f"jsd_gradient {name}", jsd_gradient_kernel, logits, slab, 60.0, True))
        single = {"S": dtype, "OUT": out}
        found.append(Configuration(f"token_gradient {name}", token_gradient_kernel, single, slab, 11.0, True))
    for both in (False, True):
        constants = {"BOTH": both, "BLOCK": rows_triton.LANES}
        name = f"merge_splits{' both' if both else ''}"
        found.append(Configuration(name, merge_splits_kernel, {}, constants, math.inf))
    return found + [each for sizes in HIDDEN_SIZES for each in _linear(*sizes)]


def _linear(hidden: int, teacher_hidden: int) -> list[Configuration]:
    """What `layers_triton` launches for bf16 layers of these hidden sizes."""
    sizes = f"bf16 H={hidden}" + (f"/{teacher_hidden}" if teacher_hidden != hidden else "")
    layers = dict.fromkeys(("X", "W", "XT", "WT"), "bf16")
    shape = {"H": hidden, "HT": teacher_hidden, **layers_triton.TILE}
    found = []
    for both in (False, True):
        for kernel, name, dtypes, constants in (
            (linear_sums_kernel, f"linear_sums {sizes}{' both' if both else ''}", layers,
             {"BOTH": both, "PARTS": layers_triton.PARTS}),
            (linear_gradient_kernel, f"linear_gradient {sizes}{' with e^y' if both else ''}", {**layers, "OUT": "bf16"},
             {"TEACHER": both}),
        ):  # fmt: skip
            found.append(Configuration(name, kernel, dtypes, {**constants, **shape}, math.inf, products=True,
                                       warps=layers_triton.WARPS, stages=layers_triton.STAGES))  # fmt: skip
    return found


def compile_kernel(configuration: Configuration) -> tuple[str, str, int]:
    """-> SASS, resource usage as text, bytes of shared memory. Pointers, strides and widths divide by 16."""
    kernel = configuration.kernel
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in configuration.constants:
            signature[name] = "constexpr"
            continue
        integer = "i64" if name.startswith("stride") else "i32"
        pointer = "*" + {"IDS": "i64", "OWNED": "i8"}.get(name, configuration.dtypes.get(name, "fp32"))
        signature[name] = pointer if name.isupper() else "fp32" if name in ("beta", "scale") else integer
        if name not in ("rows", "tokens", "splits", "beta", "scale"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=configuration.constants, attrs=aligned)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return *disassemble(compiled.asm["cubin"]), compiled.metadata.shared


def disassemble(cubin: bytes) -> tuple[str, str]:
    """-> SASS, resource usage, by the tools that come with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass, usage = (
            subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True)
            for option in ("-sass", "-res-usage")
        )
    return sass.stdout, usage.stdout + usage.stderr


def report(configuration: Configuration) -> Report:
    """Compiles one configuration and looks for what exceeds a limit."""
    sass, usage, shared = compile_kernel(configuration)
    registers, stack = parse_usage(usage)
    whole, loops = parse(sass)
    if configuration.products:
        return judge_products(configuration, registers, stack, shared, whole)
    constants, bytes_per_column = configuration.constants, sum(SIZES[d] for d in _inputs(configuration))
    if not bytes_per_column:
        part, columns = whole, math.inf
    elif loops:
        part = max(loops, key=lambda loop: loop.loaded_bytes())
        columns = part.loaded_bytes() / bytes_per_column
    else:
        part = shortest_and_longest_path(sass)[configuration.longest]
        columns = constants["BLOCK"] * constants["BLOCKS"] / (WARPS * 32)
    return judge(configuration, registers, stack, shared, whole, part, columns)


def _inputs(configuration: Configuration) -> list[str]:
    return [dtype for name, dtype in configuration.dtypes.items() if name in ("S", "T")]


def judge(
    configuration: Configuration, registers: int, stack: int, shared: int, whole: Code, part: Code, columns: float
) -> Report:
    """Numbers against limits."""
    spills = max(stack, 4 * whole.count("STL", "LDL"))
    shuffles, barriers = part.count("SHFL"), part.count("BAR")
    inputs = _inputs(configuration)
    needed = round(columns * sum(SIZES[dtype] for dtype in inputs) / 16) if inputs else 0
    wide, per_column = part.count("LDG.E.128"), len(part) / columns
    faults = []
    if spills:
        faults.append(f"{spills} bytes spilled")
    if wide < needed:
        faults.append(f"{wide} of {needed} loads of logits are 128 bits wide")
    if shuffles or barriers:
        faults.append(f"{shuffles} shuffles and {barriers} barriers where lanes are to work alone")
    if per_column > configuration.limit:
        faults.append(f"{per_column:.1f} instructions per column, the limit is {configuration.limit:g}")
    loads = f"{wide}/{needed}"
    return Report(
        configuration.name, registers, spills, shared, loads, shuffles, barriers, per_column, configuration.limit,
        tuple(faults),
    )  # fmt: skip


def judge_products(configuration: Configuration, registers: int, stack: int, shared: int, whole: Code) -> Report:
    """No spills, all copies of operands 16 bytes wide, products on tensor cores, and a block fits a multiprocessor."""
    spills = max(stack, 4 * whole.count("STL", "LDL"))
    copies = {name: number for name, number in whole.counts.items() if name.startswith("LDGSTS")}
    wide = sum(number for name, number in copies.items() if "128" in name)
    faults = []
    if spills:
        faults.append(f"{spills} bytes spilled")
    if not whole.count("HGMMA"):
        faults.append("no product on tensor cores (HGMMA)")
    if wide < sum(copies.values()) or not copies:
        faults.append(f"{wide} of {sum(copies.values())} copies to shared memory are 128 bits wide")
    if shared > SHARED_LIMIT:
        faults.append(f"{shared} bytes of shared memory, a block can have {SHARED_LIMIT}")
    shuffles, barriers = whole.count("SHFL"), whole.count("BAR")
    return Report(
        configuration.name, registers, spills, shared, f"{wide}/{sum(copies.values())}", shuffles, barriers,
        0.0, configuration.limit, tuple(faults),
    )  # fmt: skip


def report_one_read(nvcc: str) -> Report:
    """The CUDA C++ kernel by `nvcc`: both loops over shared memory together, sums and gradient."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        target = ("-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-o", path, ONE_READ)
        built = subprocess.run([nvcc, "-std=c++17", "-O3", *target], capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"{nvcc} cannot compile {ONE_READ.name}: {built.stderr[-2000:]}")
        sass, usage = (text[text.rindex(f"Function {colon}reverse_kl_one_read") :]
                       for text, colon in zip(disassemble(path.read_bytes()), (": ", ""), strict=True))  # fmt: skip
    registers, stack = parse_usage(usage)
    whole, loops = parse(sass)
    # A thread takes 8 columns of student and teacher at once: two loads of 16 bytes from shared memory.
    working = [loop for loop in loops if loop.count("MUFU.EX2")]
    per_column = sum(2 * len(loop) / loop.count("LDS.128") for loop in working) / 8
    spills = max(stack, 4 * whole.count("STL", "LDL"))
    shuffles, barriers = (sum(loop.count(name) for loop in working) for name in ("SHFL", "BAR"))
    copies = [loop.counts[name] for loop in loops for name in loop.counts if name.startswith("LDGSTS")]
    wide = [loop.counts[name] for loop in loops for name in loop.counts if name.startswith("LDGSTS") and "128" in name]
    faults = []
    if len(working) != 2:
        faults.append(f"{len(working)} loops over columns instead of 2")
    if spills:
        faults.append(f"{spills} bytes spilled")
    if sum(wide) < sum(copies) or not copies:
        faults.append(f"{sum(wide)} of {sum(copies)} copies to shared memory are 128 bits wide")
    if shuffles or barriers:
        faults.append(f"{shuffles} shuffles and {barriers} barriers where lanes are to work alone")
    if per_column > ONE_READ_LIMIT:
        faults.append(f"{per_column:.1f} instructions per column, the limit is {ONE_READ_LIMIT:g}")
    shared = 2 * 16 * math.ceil(151936 / 32)
    return Report(
        "reverse_kl_one_read (CUDA)", registers, spills, shared, f"{sum(wide)}/{sum(copies)}", shuffles, barriers,
        per_column, ONE_READ_LIMIT, tuple(faults),
    )  # fmt: skip


def table(reports: Sequence[Report]) -> str:
    head = ("kernel, sm_90", "regs", "spill B", "smem B", "LDG.128", "SHFL", "BAR", "instr/column", "limit", "")
    lines = [
        (r.name, r.registers, r.spill_bytes, r.shared_bytes, r.wide_loads, r.shuffles, r.barriers,
         f"{r.per_column:.1f}", f"{r.limit:g}", "; ".join(r.faults) or "ok")
        for r in reports
    ]  # fmt: skip
    rows = [tuple(map(str, line)) for line in (head, *lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    aligned = []
    for name, *numbers, verdict in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)), verdict]
        aligned.append("  ".join(cells).rstrip())
    return "\n".join(aligned)


def main() -> int:
    reports = [report(configuration) for configuration in configurations()]
    nvcc = shutil.which("nvcc")
    if nvcc:
        reports.append(report_one_read(nvcc))
    else:
        print(f"no nvcc: {ONE_READ.name} is left out")
    print(table(reports))
    failed = sum(bool(each.faults) for each in reports)
    print(f"{len(reports)} configurations, {failed} over a limit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

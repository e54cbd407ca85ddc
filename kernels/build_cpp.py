"""Builds the C++ of kernels/csrc once for each machine, compiler and source, and loads them.

A plain shared library without a header of torch: three seconds of any C++ compiler, and no need for ninja. It is kept
in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`) under a hash of everything that went into it; ranks
that start together wait for the one that builds. One library for each instruction set, the best of the CPU's is used.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

UNITS = ("rows.cpp", "products.cpp")
HEADERS = ("divergence.h", "jsd_token.h", "columns.h", "simd.h")
FLAGS = ("-std=gnu++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-w")
INSTRUCTION_SETS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
    "portable": (),
}
"""From the widest to the one that every CPU has."""

OPENMP = (("-fopenmp",), ())
"""Tried in this order: a compiler without OpenMP still makes a library that uses one thread."""


class Unavailable(RuntimeError):
    """There is no library, and why, in one line."""


def instruction_sets() -> tuple[str, ...]:
    """Those that this CPU can run, the best first; as torch finds them (`ATEN_CPU_CAPABILITY` lowers it)."""
    names = tuple(INSTRUCTION_SETS)
    best = torch.backends.cpu.get_cpu_capability()
    first = next((i for i, name in enumerate(names) if best.startswith(name)), len(names) - 1)
    return names[first:]


@functools.cache
def load(instruction_set: str) -> ctypes.CDLL:
    """The library for one of `instruction_sets()`, built if need be. Raises `Unavailable`."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    path = compiler and shutil.which(compiler)
    if not path:
        raise Unavailable(f"no C++ compiler: {compiler or 'c++, g++, clang++'} not found")
    return cached(f"kernels-{instruction_set}-{_fingerprint(path, instruction_set)}.so",
                  lambda library: _build(path, instruction_set, library))  # fmt: skip


def cached(name: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    """The library of this name in the cache, first put there by `build` if need be: by one process of many."""
    library = _cache_folder() / name
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with open(library.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():
                    build(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(f"{library}: {error}") from error


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopd-kernels"
    except RuntimeError as error:
        raise Unavailable("no folder to keep the library in: set XDG_CACHE_HOME") from error


def source_folder() -> Path:
    return Path(__file__).parent / "csrc"


def _fingerprint(compiler: str, instruction_set: str) -> str:
    return fingerprint(compiler, FLAGS + INSTRUCTION_SETS[instruction_set], UNITS + HEADERS)


def fingerprint(compiler: str, flags: tuple[str, ...], sources: tuple[str, ...]) -> str:
    """Of everything that goes into a library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [compiler.encode(), version, *(flag.encode() for flag in flags)]
    parts += [(source_folder() / name).read_bytes() for name in sources]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _build(compiler: str, instruction_set: str, library: Path) -> None:
    flags = FLAGS + INSTRUCTION_SETS[instruction_set]
    compile_library(compiler, [flags + openmp for openmp in OPENMP], UNITS, library)


def compile_library(compiler: str, flags: Sequence[tuple[str, ...]], units: Sequence[str], library: Path) -> None:
    """With the first flags that work. Another process sees either the whole library or none."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        for each in flags:
            command = [compiler, *each, *(str(source_folder() / unit) for unit in units), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(built, library)
                return
    first = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
    raise Unavailable(f"{compiler} could not build {units[0]}: {first}")

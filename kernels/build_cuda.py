"""Builds the CUDA C++ kernel with nvcc once, as `build_cpp` does the C++ ones, and loads it. Launched by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from pathlib import Path

from kernels.build_cpp import Unavailable, cached, compile_library, fingerprint

SOURCES = ("reverse_kl_sm90.cu", "one_read.h")
FLAGS = ("-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC", "-shared")


def compiler() -> str | None:
    """nvcc of $CUDA_HOME, or of the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built if need be. Raises `Unavailable`."""
    path = compiler()
    if path is None:
        raise Unavailable("no nvcc: neither in CUDA_HOME/bin nor on the path")
    name = f"one-read-{fingerprint(path, FLAGS, SOURCES)}.so"
    return declared(cached(name, lambda library: compile_library(path, [FLAGS], SOURCES[:1], library)))


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions."""
    pointer, number, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    library.one_read_launch.argtypes = [*[pointer] * 5, number, number, *[stride] * 3, ctypes.c_float, number, pointer]
    library.scale_rows_launch.argtypes = [pointer, pointer, number, number, stride, number, pointer]
    library.error_text.argtypes, library.error_text.restype = [number], ctypes.c_char_p
    return library

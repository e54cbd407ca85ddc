"""Transformer Engine's Python code without its compiled module, without CUDA: modules can be made, nothing can be run.

The 1.2 MB wheel `transformer-engine` holds all the Python code. What it imports besides is stood in for here: the
compiled `transformer_engine_torch`, and `onnx`, `onnxscript` and `einops`, which only its ONNX export and its inference
code use. Names, shapes and checkpoint keys of the modules came out the same as with the compiled module on 2026-11-22
(Transformer Engine 2.20.2, Megatron-Core 0.19.2); nothing is said about numbers.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


class _MadeUp(type):
    """A class whose every attribute exists and is a number of its own."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Value()
        setattr(cls, name, value)
        return value


class _Value(int, metaclass=_MadeUp):
    count = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> _Value:
        _Value.count += 1
        return int.__new__(cls, _Value.count)

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Value()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # As a decorator (onnxscript.script()(function)) it leaves the function alone.
        return args[0] if args and callable(args[0]) else _Value()


class _Module(types.ModuleType):
    """A module that has whatever is asked of it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made_up = _MadeUp(name, (_Value,), {})
        setattr(self, name, made_up)
        return made_up


def install(folder: Path) -> None:
    """Make `import transformer_engine.pytorch` work from the wheel unpacked in `folder`. For this process, for good."""
    import torch

    compiled = _Module("transformer_engine_torch")
    for enumeration in (DType, NVTE_Fused_Attn_Backend, FP8FwdTensors, FP8BwdTensors):
        setattr(compiled, enumeration.__name__, enumeration)
    compiled.get_cudnn_version = lambda: 91200  # type: ignore[attr-defined]
    sys.modules["transformer_engine_torch"] = compiled
    for name in ("onnx", "onnxscript", "onnxscript.onnx_types", "einops"):
        with contextlib.suppress(ImportError):
            __import__(name)
        sys.modules.setdefault(name, _Module(name))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine's own: then it loads no CUDA library
    sys.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the compiled module is missing
        import transformer_engine.common

        transformer_engine.common.load_framework_extension = lambda framework: None
        import transformer_engine.pytorch
        import transformer_engine.pytorch.module.base as base
    transformer_engine.pytorch = sys.modules["transformer_engine.pytorch"]
    base.torch = _TorchWithCuda(torch)  # its modules refuse to be made where CUDA is not there


class _TorchWithCuda(types.ModuleType):
    """`torch`, except that CUDA is there when asked."""

    def __init__(self, torch: Any):
        super().__init__("torch")
        self._torch = torch
        self.cuda = _Cuda(torch.cuda)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


class _Cuda(types.ModuleType):
    def __init__(self, cuda: Any):
        super().__init__("cuda")
        self._cuda = cuda

    def is_available(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)

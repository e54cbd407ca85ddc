"""Everything that lets the unchanged Megatron-Core run on a machine without CUDA. Does nothing where CUDA is there.

Megatron-Core 0.19 names the device "cuda" in a few places. Three small remedies, none of them on the hot path:
stand-ins for the functions of `torch.cuda` that it calls, a view of `torch` whose tensor factories read "cuda"
as "cpu" for the modules that spell the device out, and five functions replaced by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_MODULES_THAT_SAY_CUDA = (
    "megatron.core.utils",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "autocast")


def install() -> None:
    """Make Megatron-Core usable over gloo; idempotent. Call before the first import of `megatron`."""
    if torch.cuda.is_available() or isinstance(torch.cuda.current_stream, _StandIn):
        return
    _stand_in_for_torch_cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Transformer Engine and Apex are not installed": known here
        for name in _MODULES_THAT_SAY_CUDA:
            importlib.import_module(name).torch = _TorchOnCpu()  # type: ignore[attr-defined]
        _replace_functions()


class _StandIn:
    """A function of `torch.cuda` that has nothing to do on a CPU; a class so that `install` knows its own work."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Stream:
    """Everything on the CPU is already in order: streams and events have nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any): ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


def _stand_in_for_torch_cuda() -> None:
    cpu = torch.device("cpu")
    functions: dict[str, Callable[..., Any]] = {
        "current_device": lambda: cpu,
        "current_stream": lambda *args: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda *args: None,
        "set_device": lambda *args: None,
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, _StandIn(function))
    torch.cuda.Stream = _Stream  # type: ignore[misc, assignment]
    torch.cuda.Event = _Stream  # type: ignore[misc, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


class _TorchOnCpu(types.ModuleType):
    """`torch`, except that factories asked for the device "cuda" build on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        if factory is torch.autocast and args[:1] == ("cuda",):
            args = ("cpu", *args[1:])
        return factory(*args, **kwargs)

    return build


def _replace_functions() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer import optimizer as optimizer_module
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_mopd.parallel.adamw import AdamW

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    token_dispatcher.maybe_move_tensor_to_cpu = _split_sizes_to_host
    optimizer_module.clip_grad_by_total_norm_fp32 = _clip_by_total_norm
    optimizer.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False  # or Megatron would take torch.optim.AdamW without looking at `Adam`
    # Where `step` is looked for when saving and loading: in the param group, as with Transformer Engine's.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def _split_sizes_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """gloo takes the split sizes of an all-to-all as integers, which Megatron only makes from CUDA tensors."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _clip_by_total_norm(
    parameters: list[Tensor], max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Megatron's own, without its assertion that gradients are CUDA tensors."""
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], coefficient)


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While Megatron builds an optimizer: it tells parameter dtypes apart by 'torch.cuda.*Tensor' strings."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def type_name(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]

"""The platform: device "cpu", every layer in its native PyTorch form, attention by torch's own kernel."""

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


def _allocate(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None) -> torch.Tensor:
    """A host table in plain memory. SGLang would register it with CUDA for fast copies; there is nothing to copy to."""
    return torch.empty(dims, dtype=dtype, device=device)


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def is_pin_memory_available(self, device=None) -> bool:
        return False

    def init_backend(self) -> None:
        """`--enable-return-routed-experts` allocates through this table, which has no entry for the CPU."""
        from sglang.srt.mem_cache.pool_host import common

        common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate

    def apply_server_args_defaults(self, server_args) -> None:
        """`--enable-deterministic-inference` (seeds of single requests) refuses attention that is not in this list."""
        from sglang.srt.server_args import DETERMINISTIC_ATTENTION_BACKEND_CHOICES

        if "torch_native" not in DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
            DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")

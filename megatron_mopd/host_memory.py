"""Large pieces of host memory that a GPU copies from and to by itself."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from megatron_mopd.yaml_config import ConfigError


def host_arena(num_bytes: int, *, pin: bool, remedy: str) -> Tensor:
    """[num_bytes] uint8 of zeros, given back with its last view. Not from torch's pinned memory, which rounds every
    allocation up to a power of two.

    pin: needs CUDA. Raises ConfigError, with `remedy`, where the memory cannot be pinned.
    """
    arena = torch.frombuffer(mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    if not pin:
        return arena
    error = torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.nbytes, 0)
    if int(error) != 0:
        raise ConfigError(
            f"{arena.nbytes / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {int(error)}); "
            f"set `ulimit -l unlimited`, or {remedy}"
        )
    return arena

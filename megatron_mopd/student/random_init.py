"""Initial weights for a run without a checkpoint, the same for every parallel layout."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.architecture import Architecture, read_architecture
from megatron_mopd.student.hf_files import TensorSpec, write_model
from megatron_mopd.student.weight_stream import copy_side_files
from megatron_mopd.student.weight_table import model_tensors, split
from megatron_mopd.student.weights import find_parts


@torch.no_grad()
def init_random(model: torch.nn.Module, arch: Architecture, world: World, seed: int) -> None:
    """Norms are 1, all else normal with `initializer_range`; a tensor's values depend on (seed, its name) only."""
    for own in find_parts(model, arch, world).all():
        whole = [_tensor(tensor.name, tensor.shape, arch.init_std, seed) for tensor in own.hf(arch)]
        own.parameter.copy_(split(own.row.layout, whole, arch, own.shard(world)))


def _tensor(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.randn(shape, generator=generator) * std


def write_random_model(folder: Path, source: Path, seed: int) -> None:
    """A Hugging Face folder with the initial weights that `init_random` gives, for the model described in `source`."""
    arch = read_architecture(source)
    specs = [TensorSpec(name=t.name, shape=t.shape, dtype=torch.float32) for t in model_tensors(arch)]
    write_model(folder, specs, ((t.name, _tensor(t.name, t.shape, arch.init_std, seed)) for t in specs))
    copy_side_files(source, folder, torch.float32)

"""Where teachers wait: each distinct shard of a rank once, in pinned host memory or in a mapped file."""

from __future__ import annotations

import hashlib
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.config import TeacherMemorySpec
from megatron_mopd.host_memory import host_arena
from megatron_mopd.student.hf_files import SINGLE, TensorSpec, read_header, write_model
from megatron_mopd.yaml_config import ConfigError

_ALIGNMENT = 64
"""Bytes; where a shard starts in an arena."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor outside the device's memory."""

    tensor: Tensor
    """[n] flat and contiguous; its shape is that of the parameter that it is copied into."""
    file: mmap.mmap | None = None
    """The mapping that `tensor` is a view of; None in host memory."""
    offset: int = 0
    """Of the first byte, in `file`."""

    def forget(self, begin: int, end: int) -> None:
        """Give the memory of the elements [begin, end) back, which were read from the file and are there still."""
        if self.file is not None:
            size = self.tensor.element_size()
            first = (self.offset + begin * size) // mmap.PAGESIZE * mmap.PAGESIZE
            self.file.madvise(mmap.MADV_DONTNEED, first, self.offset + end * size - first)


class ShardStore:
    """Shards by the digest of their contents: those that several teachers share are stored once.

    Host memory is filled first, in the order of arrival, up to `host_gb`; what comes after it goes to disk.
    """

    def __init__(self, spec: TeacherMemorySpec, rank: int, *, pin: bool):
        self._spec = spec
        self._rank = rank
        self._pin = pin
        self._shards: dict[str, Shard] = {}
        self.host_bytes = 0
        self.disk_bytes = 0

    def __getitem__(self, digest: str) -> Shard:
        return self._shards[digest]

    def keep(self, teacher: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Store copies of `tensors`. Returns name -> digest. ConfigError when memory or disk do not suffice."""
        digests = {name: digest(tensor) for name, tensor in tensors.items()}
        new = {key: tensors[name] for name, key in digests.items() if key not in self._shards}
        host: dict[str, Tensor] = {}
        disk: dict[str, Tensor] = {}
        room = None if self._spec.host_gb is None else int(self._spec.host_gb * 1e9) - self.host_bytes
        for key, tensor in new.items():
            fits = room is None or tensor.nbytes <= room
            (host if fits else disk)[key] = tensor
            room = room - tensor.nbytes if fits and room is not None else room
        self._shards |= self._in_memory(host) | self._on_disk(teacher, disk)
        self.host_bytes += sum(tensor.nbytes for tensor in host.values())
        self.disk_bytes += sum(tensor.nbytes for tensor in disk.values())
        return digests

    def _in_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Shard]:
        """One arena for all of them."""
        offsets, size = dict[str, int](), 0
        for key, tensor in tensors.items():
            offsets[key], size = size, size + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if not size:
            return {}
        arena = host_arena(size, pin=self._pin, remedy="teacher_memory.host_gb and teacher_memory.folder")
        shards = {}
        for key, tensor in tensors.items():
            place = arena[offsets[key] : offsets[key] + tensor.nbytes].view(tensor.dtype)
            shards[key] = Shard(place.copy_(tensor.detach().flatten()))
        return shards

    def _on_disk(self, teacher: str, tensors: Mapping[str, Tensor]) -> dict[str, Shard]:
        if not tensors:
            return {}
        assert self._spec.folder is not None
        folder = Path(self._spec.folder) / f"mopd-teachers-rank-{self._rank:05d}" / teacher
        specs = [TensorSpec(name=key, shape=tuple(t.shape), dtype=t.dtype) for key, t in tensors.items()]
        path = folder / SINGLE
        try:
            write_model(folder, specs, tensors.items(), max_shard_bytes=sum(spec.num_bytes for spec in specs))
            stored = read_header(path)
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            path.unlink()  # the mapping holds the bytes; nothing is left behind, not even after kill -9
            folder.rmdir()
            folder.parent.rmdir()
        except OSError as error:
            needed = sum(spec.num_bytes for spec in specs)
            raise ConfigError(
                f"teacher_memory.folder: {folder}: {error.strerror or error}; teacher '{teacher}' needs {needed} bytes "
                f"there on rank {self._rank}: choose another folder or raise teacher_memory.host_gb"
            ) from None
        return {key: _mapped(mapped, stored[key].begin, tensor) for key, tensor in tensors.items()}


def _mapped(file: mmap.mmap, offset: int, like: Tensor) -> Shard:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mapping cannot be written to, which nobody does
        return Shard(torch.frombuffer(file, dtype=like.dtype, count=like.numel(), offset=offset), file, offset)


def digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype} ".encode() + data.tobytes()).hexdigest()

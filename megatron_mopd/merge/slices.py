"""One tensor of all models at once, slice by slice, in float64.

Read with pread and not mapped: pages of a mapped file count as this process's memory until it is unmapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megatron_mopd.student.hf_files import DTYPES, StoredTensor
from megatron_mopd.yaml_config import ConfigError

SLICE_VALUES = 1 << 18
"""Numbers of all models together in one slice: 2 MiB in float64, which a processor's cache holds."""


class ValueReader:
    """Numbers of stored tensors by their position; every file is opened once. Use as a context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, tensor: StoredTensor, begin: int, end: int) -> Tensor:
        """Elements `begin` to `end` of the flattened tensor, [end - begin], float64."""
        dtype = DTYPES[tensor.dtype]
        buffer = bytearray((end - begin) * dtype.itemsize)
        self._fill(tensor, memoryview(buffer), tensor.begin + begin * dtype.itemsize)
        return torch.frombuffer(buffer, dtype=dtype).to(torch.float64)

    def _fill(self, tensor: StoredTensor, view: memoryview, offset: int) -> None:
        try:
            if tensor.file not in self._files:
                self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
            while view:
                count = os.preadv(self._files[tensor.file], [view], offset)
                if count == 0:
                    raise ConfigError(f"{tensor.file}: became shorter while it was read; restore it and merge again")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise ConfigError(f"{tensor.file}: cannot be read: {error.strerror}; check the disk") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    begin: int
    end: int
    base: Tensor
    """[n]; zeros where there is no base."""
    tau: Tensor
    """[m, n]: the models minus the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlices:
    """One tensor of the base and of all models, in slices, as often as wanted."""

    name: str
    base: StoredTensor | None
    models: Sequence[StoredTensor]
    reader: ValueReader
    slice_values: int = SLICE_VALUES

    @property
    def size(self) -> int:
        return torch.Size(self.models[0].shape).numel()

    def __iter__(self) -> Iterator[Slice]:
        for begin, end in self._ranges(len(self.models) + 1):
            base = self._base(begin, end)
            tau = torch.stack([self.reader.read(model, begin, end) for model in self.models])
            tau -= base
            yield Slice(begin=begin, end=end, base=base, tau=tau)

    def task_vector(self, model: int) -> Iterator[Tensor]:
        """That of one model, [n] per slice; reads no other model."""
        for begin, end in self._ranges(2):
            yield self.reader.read(self.models[model], begin, end) - self._base(begin, end)

    def _base(self, begin: int, end: int) -> Tensor:
        if self.base is None:
            return torch.zeros(end - begin, dtype=torch.float64)
        return self.reader.read(self.base, begin, end)

    def _ranges(self, together: int) -> Iterator[tuple[int, int]]:
        step = max(1, self.slice_values // together)
        for begin in range(0, self.size, step):
            yield begin, min(begin + step, self.size)


def tensor_slices(
    name: str,
    base: Mapping[str, StoredTensor] | None,
    models: Sequence[Mapping[str, StoredTensor]],
    reader: ValueReader,
    slice_values: int = SLICE_VALUES,
) -> TensorSlices:
    return TensorSlices(
        name=name,
        base=base[name] if base is not None else None,
        models=[model[name] for model in models],
        reader=reader,
        slice_values=slice_values,
    )

"""A stream of whole tensors as byte buckets of bounded size: never more of a model than one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Iterable[tuple[str, Tensor]]
"""(Hugging Face name, whole tensor), as `student.weight_stream.iter_hf` yields them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor in a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    """First byte in the bucket."""
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Tensors of one dtype, back to back without a gap: SGLang's `flattened_bucket`."""

    entries: tuple[Entry, ...]
    data: Tensor
    """[bytes] uint8, on the tensors' device. Overwritten by the next bucket."""


def iter_buckets(weights: Weights, max_bytes: int) -> Iterator[Bucket]:
    """Fill one buffer again and again: be done with a bucket before asking for the next.

    Tensors keep their order. One with more than `max_bytes` is a bucket of its own and is not copied. The receiver of a
    broadcast computes the offsets from the shapes alone, so a bucket has no padding and one dtype only.
    """
    buffer: Tensor | None = None
    entries: list[Entry] = []
    used = 0
    for name, tensor in weights:
        data = flat_bytes(tensor)
        if entries and (used + data.numel() > max_bytes or entries[-1].dtype is not tensor.dtype):
            assert buffer is not None
            yield Bucket(entries=tuple(entries), data=buffer[:used])
            entries, used = [], 0
        begin, used = used, used + data.numel()
        entry = Entry(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, begin=begin, end=used)
        if data.numel() > max_bytes:
            yield Bucket(entries=(entry,), data=data)
            used = 0
            continue
        if buffer is None:
            buffer = torch.empty(max_bytes, dtype=torch.uint8, device=data.device)
        # Copied at once: a kept view would keep the whole layer that it is a part of.
        buffer[begin:used].copy_(data)
        entries.append(entry)
    if entries and buffer is not None:
        yield Bucket(entries=tuple(entries), data=buffer[:used])


def flat_bytes(tensor: Tensor) -> Tensor:
    """[bytes] uint8: a view where the tensor is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)

"""Folders of safetensors files as Hugging Face writes them: strict headers, and a writer that streams.

A file is an 8-byte little-endian length, a JSON header of that length with dtype, shape and byte range of
every tensor, then the bytes (https://huggingface.co/docs/safetensors). A model is one `model.safetensors`, or
several files that `model.safetensors.index.json` lists. Nothing else is read: a pickle could run code.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_mopd.yaml_config import ConfigError, read_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_AGAIN = "download or export the model again"
_DAMAGED = f"the file is damaged or was not written to its end; {_AGAIN}"
_MIXED = f"files of two models are mixed; empty the folder and {_AGAIN}"
_HASH_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a file, as its header describes it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder by name; reads headers only. ConfigError names file and remedy."""
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise ConfigError(f"{folder}: neither {SINGLE} nor {INDEX} in it; {_AGAIN}")
    weight_map = _read_index(folder / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / INDEX}: names {file}, which is not there; {_AGAIN}")
        for name, tensor in read_header(folder / file).items():
            if weight_map.get(name) != file:
                where = weight_map.get(name, "no file")
                raise ConfigError(f"{folder / file}: holds '{name}', which {INDEX} places in {where}; {_MIXED}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise ConfigError(f"{folder / INDEX}: places tensor '{name}' in {file}, which lacks it; {_MIXED}")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(read_text(path, "index of the weights"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); {_AGAIN}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path}: has no 'weight_map'; {_AGAIN}")
    for name, file in weight_map.items():
        # A name with a folder in it could make us read any file of the machine.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{path}: tensor '{name}' is in {file!r}, not in a .safetensors file beside it")
    return weight_map


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. A file that is too short, too long or not safetensors is a ConfigError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= size else b""
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if size < 8 or not text:
        raise ConfigError(f"{path}: {size} bytes, too short for its header; {_DAMAGED}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a safetensors header ({error}); {_DAMAGED}") from None
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != position:
            raise ConfigError(f"{path}: the bytes of '{tensor.name}' overlap or leave a gap; {_DAMAGED}")
        position = tensor.end
    if position != size:
        raise ConfigError(f"{path}: {size} bytes, but its header describes {position}; {_DAMAGED}")
    return tensors


def _stored(path: Path, name: str, entry: Any, offset: int) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
    if dtype not in DTYPES:
        floats = ", ".join(DTYPES)
        raise ConfigError(f"{path}: '{name}' is {dtype}, only {floats} are read; use the unquantised model")
    expected = torch.Size(shape).numel() * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise ConfigError(f"{path}: '{name}' has {end - begin} bytes, its shape needs {expected}; {_DAMAGED}")
    return StoredTensor(name=name, file=path, dtype=dtype, shape=shape, begin=offset + begin, end=offset + end)


class TensorReader:
    """Slices of stored tensors, read on demand; each file is mapped once. Use as a context manager."""

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self._files: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()  # a mapping ends with the last slice that is being read

    def __getitem__(self, name: str) -> StoredSlices:
        """An object with `get_shape()` that is indexed like a tensor and reads only what is asked for."""
        stored = self._tensors[name]
        if stored.file not in self._files:
            with stored.file.open("rb") as file:
                self._files[stored.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return StoredSlices(stored, self._files[stored.file])


@dataclass(frozen=True, slots=True)
class StoredSlices:
    """Copies of parts of one stored tensor, by slices of it."""

    stored: StoredTensor
    file: mmap.mmap

    def get_shape(self) -> list[int]:
        return list(self.stored.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        """A copy: what is mapped would count as this process's memory, so its pages are given back at once."""
        shape, dtype = self.stored.shape, DTYPES[self.stored.dtype]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)[index]
        count = torch.Size(shape).numel()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mapping cannot be written to, which nobody does
            whole = torch.frombuffer(self.file, dtype=dtype, count=count, offset=self.stored.begin).view(shape)
        part = whole[index].clone(memory_format=torch.contiguous_format)
        first = self.stored.begin // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.madvise(mmap.MADV_DONTNEED, first, self.stored.end - first)
        return part


def content_hash(folder: Path, look: Callable[[StoredTensor, memoryview], None] | None = None) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor: equal for equal weights, however sharded.

    `look` is shown every tensor's bytes, chunk by chunk, for a check that would otherwise read them once more.
    """
    digest = hashlib.sha256()
    tensors = read_headers(folder)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for chunk in _chunks(tensor):
            digest.update(chunk)
            if look is not None:
                look(tensor, chunk)
    return digest.hexdigest()


def _chunks(tensor: StoredTensor) -> Iterator[memoryview]:
    """The bytes of a tensor; a chunk is overwritten by the next one, and holds whole numbers."""
    # Not mapped: what is mapped counts as this process's memory until all of it is unmapped.
    buffer = memoryview(bytearray(min(_HASH_CHUNK, tensor.end - tensor.begin)))
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        for begin in range(tensor.begin, tensor.end, _HASH_CHUNK):
            chunk = buffer[: min(_HASH_CHUNK, tensor.end - begin)]
            if file.readinto(chunk) != len(chunk):
                raise ConfigError(f"{tensor.file}: {_DAMAGED}")
            yield chunk


def write_model(
    folder: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor | Iterable[Tensor]]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `tensors`, which come in the order of `specs`, one at a time; a failure leaves old files alone.

    One that is too large for the memory may come as 1-D pieces, in the order of its flattened values.
    Every file is written under a temporary name. Only when all are complete do they take their names, the
    index last: a folder without it is visibly incomplete. Raises OSError (disk full) and ValueError (other
    tensors than `specs`).
    """
    shards = _shards(specs, max_shard_bytes)
    single = len(shards) == 1
    names = [SINGLE if single else f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    stream = iter(tensors)
    try:
        for name, shard in zip(names, shards, strict=True):
            with _partial(folder, name).open("wb") as file:
                _write_shard(file, shard, stream)
        if (left := next(stream, None)) is not None:
            raise ValueError(f"tensor '{left[0]}' comes after the last one expected")
        if not single:
            total = sum(spec.num_bytes for spec in specs)
            where = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            _partial(folder, INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        for name in (*names, INDEX):
            _partial(folder, name).unlink(missing_ok=True)
        raise
    for old in (folder / INDEX, folder / SINGLE, *folder.glob("model-?????-of-?????.safetensors")):
        old.unlink(missing_ok=True)
    for name in names if single else (*names, INDEX):
        os.replace(_partial(folder, name), folder / name)


def _partial(folder: Path, name: str) -> Path:
    return folder / f".{name}.partial"


def _shards(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.num_bytes
    return shards


def _write_shard(
    file: BinaryIO, shard: Sequence[TensorSpec], tensors: Iterator[tuple[str, Tensor | Iterable[Tensor]]]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in shard:
        offsets = [position, position + spec.num_bytes]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the bytes aligned to 8
    file.write(len(text).to_bytes(8, "little") + text)
    for spec in shard:
        name, tensor = next(tensors, ("nothing", torch.empty(0)))
        if name != spec.name or (isinstance(tensor, Tensor) and tuple(tensor.shape) != spec.shape):
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else "in pieces"
            raise ValueError(f"got {name} {found}, expected {spec.name} {spec.shape}")
        begin = file.tell()
        for piece in [tensor] if isinstance(tensor, Tensor) else tensor:
            host = piece.detach().to(device="cpu", dtype=spec.dtype).contiguous()
            file.write(host.flatten().view(torch.uint8).numpy())
        if file.tell() - begin != spec.num_bytes:
            raise ValueError(f"the pieces of {name} have {file.tell() - begin} bytes, expected {spec.num_bytes}")
    file.flush()
    os.fsync(file.fileno())

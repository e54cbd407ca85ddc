"""Weights from Hugging Face's safetensors into this rank's part of a Megatron model.

What lies where is said in `weight_table.py` alone; the way back is `weight_stream.py`. Each rank reads only
what it owns, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.hf_files import StoredTensor, TensorReader, read_headers
from megatron_mopd.student.weight_table import (
    HFTensor,
    Layout,
    Row,
    Shard,
    hf_tensors,
    model_tensors,
    split,
    table_of,
)
from megatron_mopd.yaml_config import ConfigError

_TIED_TWIN = "lm_head.weight"
"""Some published models with tied embeddings store the output layer nevertheless."""


@dataclass(frozen=True, slots=True)
class Owned:
    """A parameter of this rank, found by its row."""

    row: Row
    parameter: Tensor
    layer: int
    """Global index; 0 outside the layers."""
    expert: int
    """Global index; 0 outside the experts."""

    def hf(self, arch: Architecture) -> tuple[HFTensor, ...]:
        return hf_tensors(self.row, arch, self.layer, self.expert)

    def shard(self, world: World) -> Shard:
        rank, size = (0, 1) if self.row.is_expert else (world.tensor.rank, world.tensor.size)
        return Shard(rank, size, self.parameter.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """This rank's parameters, by the part of the model that is gathered at once."""

    first: list[Owned]
    layers: dict[int, list[Owned]]
    experts: dict[int, list[Owned]]
    last: list[Owned]
    dtype: torch.dtype
    device: torch.device

    def all(self) -> Iterator[Owned]:
        yield from self.first
        for layer, owned in self.layers.items():
            yield from owned
            yield from self.experts[layer]
        yield from self.last


def find_parts(model: torch.nn.Module, arch: Architecture, world: World) -> Parts:
    """Match every parameter with its row. ValueError when model and table disagree, a defect of ours."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner  # out of DistributedDataParallel and the like
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    device = next(iter(parameters.values())).device
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) != 1:
        raise ValueError(f"the parameters have the dtypes {dtypes}; weights travel in one")
    table = table_of(arch)
    num_layers = arch.num_layers // world.pipeline.size
    num_experts = arch.num_experts // world.expert.size
    layer_offset, expert_offset = world.pipeline.rank * num_layers, world.expert.rank * num_experts
    layers: dict[int, list[Owned]] = {}
    experts: dict[int, list[Owned]] = {}
    for n in range(num_layers):
        layer = n + layer_offset
        layers[layer] = [Owned(r, p, layer, 0) for r, p in _take(parameters, table.layer, n)]
        experts[layer] = [
            Owned(row, parameter, layer, e + expert_offset)
            for e in range(num_experts)
            for row, parameter in _take(parameters, table.expert, n, e)
        ]
    first = _take(parameters, table.first) if world.is_first_stage else []
    last = _take(parameters, table.last) if world.is_last_stage else []
    if parameters:
        raise ValueError(f"parameters that no row of the table names: {', '.join(parameters)}")
    return Parts(
        first=[Owned(row, parameter, 0, 0) for row, parameter in first],
        layers=layers,
        experts=experts,
        last=[Owned(row, parameter, 0, 0) for row, parameter in last],
        dtype=dtypes.pop(),
        device=device,
    )


def _take(
    parameters: dict[str, Tensor], rows: Iterable[Row], layer: int = 0, expert: int = 0
) -> list[tuple[Row, Tensor]]:
    """Remove and return the parameters of `rows`, in whichever spelling; the indices are local."""
    taken = []
    for row in rows:
        names = [name.format(layer=layer, expert=expert) for name in row.megatron]
        found = next((name for name in names if name in parameters), None)
        if found is not None:
            taken.append((row, parameters.pop(found)))
        elif not row.copy:
            raise ValueError(f"the model has no parameter {' or '.join(names)}")
    return taken


def check_hf(arch: Architecture, folder: Path, key: str) -> None:
    """Raise ConfigError unless `folder` holds exactly the weights of `arch`; reads headers only.

    `key` is the configuration key that names the folder; the message starts with it.
    """
    try:
        _check(arch, folder)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _check(arch: Architecture, folder: Path) -> dict[str, StoredTensor]:
    stored = read_headers(folder)
    expected = {tensor.name: tensor.shape for tensor in model_tensors(arch)}
    optional = {_TIED_TWIN: (arch.vocab_size, arch.hidden_size)} if arch.tie_embeddings else {}
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected and name not in optional]
    remedy = f"use config.json and weights of one complete {arch.family} model"
    if missing:
        extra = f"; '{unknown[0]}' is there ({len(unknown)} unknown in all)" if unknown else ""
        raise ConfigError(f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} in all){extra}; {remedy}")
    if unknown:
        name = unknown[0]
        raise ConfigError(
            f"{stored[name].file}: tensor '{name}' is not part of the model ({len(unknown)} in all); {remedy}"
        )
    for name, shape in (expected | optional).items():
        if name in stored and stored[name].shape != shape:
            raise ConfigError(
                f"{stored[name].file}: tensor '{name}' has shape {list(stored[name].shape)}, "
                f"config.json says {list(shape)}; {remedy}"
            )
    return stored


@torch.no_grad()
def load_hf(model: torch.nn.Module, arch: Architecture, folder: Path, world: World) -> None:
    """Fill every parameter of this rank from the safetensors in `folder`, cast to the parameter's dtype.

    All headers are checked before the first copy. No collective. ConfigError names file, tensor and remedy.
    """
    stored = _check(arch, folder)
    with TensorReader(stored) as reader:
        for own in find_parts(model, arch, world).all():
            shard = own.shard(world)
            part = split(own.row.layout, [reader[tensor.name] for tensor in own.hf(arch)], arch, shard)
            if part.shape != own.parameter.shape:
                raise ValueError(f"{own.row.megatron[0]}: {part.shape} for {own.parameter.shape}")
            own.parameter.copy_(part)
            if own.row.layout is Layout.VOCAB and arch.tie_embeddings and _TIED_TWIN in stored:
                twin = split(Layout.VOCAB, [reader[_TIED_TWIN]], arch, shard)
                _check_twin(part, twin, stored[_TIED_TWIN])


def _check_twin(embedding: Tensor, twin: Tensor, stored: StoredTensor) -> None:
    if not torch.equal(embedding, twin.to(embedding.dtype)):
        raise ConfigError(
            f"{stored.file}: '{stored.name}' differs from the embedding, but config.json ties them; "
            "set tie_word_embeddings to false in config.json"
        )

"""Weights from a Megatron model back to whole Hugging Face tensors: for rollout engines, and into files."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.parallel.runtime import Axis, World
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.hf_files import MAX_SHARD_BYTES, TensorSpec, write_model
from megatron_mopd.student.weight_table import (
    HFTensor,
    Layout,
    first_tensors,
    hf_tensors,
    join,
    last_tensors,
    layer_tensors,
    model_tensors,
    table_of,
)
from megatron_mopd.student.weights import Owned, Parts, find_parts
from megatron_mopd.yaml_config import ConfigError, read_text

BLOCK_BYTES = 128 << 20
"""Of experts that are whole at a time, on every rank, while the weights are streamed."""
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True, slots=True)
class HFWeights:
    """The stream of `iter_hf`, as often as it is iterated; each time is a collective of its own."""

    model: torch.nn.Module
    arch: Architecture
    world: World

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter_hf(self.model, self.arch, self.world)


@torch.no_grad()
def iter_hf(model: torch.nn.Module, arch: Architecture, world: World) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors, on every rank, in the order of `model_tensors`, on the parameters' device.

    Collective: every rank must exhaust it. Per layer one all-gather over the tensor ranks and a broadcast over the
    expert ranks for each block of experts; each of them is followed by a broadcast over the pipeline; nothing on one
    rank. The tensors may be views of the parameters: read them before the next update, never write into them. Whole
    at a time is the embedding, a layer without its experts, or a block of experts (`BLOCK_BYTES`).
    """
    parts = find_parts(model, arch, world)
    section = functools.partial(_section, parts=parts, world=world)
    yield from section(list(first_tensors(arch)), 0, lambda: _join_dense(parts.first, arch, world.tensor))
    for layer in range(arch.num_layers):
        stage = layer // (arch.num_layers // world.pipeline.size)
        dense, experts = parts.layers.get(layer, []), parts.experts.get(layer, [])
        names = list(layer_tensors(arch, layer))
        per_expert = sum(len(row.hf) for row in table_of(arch).expert)
        shared = names[: len(names) - arch.num_experts * per_expert]
        yield from section(shared, stage, functools.partial(_join_dense, dense, arch, world.tensor))
        for block in _expert_blocks(arch, parts.dtype, world.expert.size):
            begin = len(shared) + block.start * per_expert
            own = functools.partial(_join_experts, experts, block, layer, arch, parts, world.expert)
            yield from section(names[begin : begin + len(block) * per_expert], stage, own)
    last = [own for own in parts.last if not own.row.copy]
    end = world.pipeline.size - 1
    yield from section(list(last_tensors(arch)), end, lambda: _join_dense(last, arch, world.tensor))


def _section(
    tensors: Sequence[HFTensor], stage: int, join_here: Callable[[], dict[str, Tensor]], *, parts: Parts, world: World
) -> Iterator[tuple[str, Tensor]]:
    """The whole `tensors` of one part of the model; `join_here` makes them on the ranks of their pipeline stage."""
    whole = join_here() if stage == world.pipeline.rank else {}
    if world.pipeline.size > 1:
        sizes = [torch.Size(tensor.shape).numel() for tensor in tensors]
        if whole:
            flat = torch.cat([whole.pop(tensor.name).flatten() for tensor in tensors])
        else:
            flat = torch.empty(sum(sizes), dtype=parts.dtype, device=parts.device)
        group = world.pipeline.group
        dist.broadcast(flat, src=dist.get_global_rank(group, stage), group=group)
        pieces = flat.split(sizes)
        whole = {tensor.name: piece.view(tensor.shape) for tensor, piece in zip(tensors, pieces, strict=True)}
    for tensor in tensors:
        yield tensor.name, whole.pop(tensor.name)


def _join_dense(owned: Sequence[Owned], arch: Architecture, axis: Axis) -> dict[str, Tensor]:
    cut = [own for own in owned if own.row.layout is not Layout.REPLICATED]
    by_parameter = iter(list(zip(*_gather([own.parameter for own in cut], axis), strict=True)))
    whole: dict[str, Tensor] = {}
    for own in owned:
        shards = (own.parameter,) if own.row.layout is Layout.REPLICATED else next(by_parameter)
        whole |= _named(own.hf(arch), join(own.row.layout, shards, arch))
    return whole


def _expert_blocks(arch: Architecture, dtype: torch.dtype, expert_ranks: int) -> Iterator[range]:
    """Experts, by their global indices, that travel together: never of two ranks, at most `BLOCK_BYTES`."""
    if not arch.num_experts:
        return
    per_rank = arch.num_experts // expert_ranks
    one = 3 * arch.expert_ffn_size * arch.hidden_size * dtype.itemsize
    step = min(per_rank, max(1, BLOCK_BYTES // one))
    for first in range(0, arch.num_experts, per_rank):
        for begin in range(first, first + per_rank, step):
            yield range(begin, min(begin + step, first + per_rank))


def _join_experts(
    owned: Sequence[Owned], block: range, layer: int, arch: Architecture, parts: Parts, axis: Axis
) -> dict[str, Tensor]:
    """The whole tensors of the experts in `block`, of which one rank of the axis has all."""
    rows = table_of(arch).expert
    owner = block.start // (arch.num_experts // axis.size)
    here = [own.parameter for own in owned if own.expert in block]
    if axis.size > 1:
        shapes = [own.parameter.shape for own in owned[: len(rows)]] * len(block)
        sizes = [shape.numel() for shape in shapes]
        if here:
            flat = torch.cat([parameter.flatten() for parameter in here])
        else:
            flat = torch.empty(sum(sizes), dtype=parts.dtype, device=parts.device)
        dist.broadcast(flat, src=dist.get_global_rank(axis.group, owner), group=axis.group)
        here = [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
    whole: dict[str, Tensor] = {}
    parameters = iter(here)
    for expert in block:
        for row in rows:
            names = hf_tensors(row, arch, layer, expert)
            whole |= _named(names, join(row.layout, (next(parameters),), arch))
    return whole


def _named(names: Sequence[HFTensor], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name.name: tensor for name, tensor in zip(names, tensors, strict=True)}


def _gather(parameters: Sequence[Tensor], axis: Axis) -> list[list[Tensor]]:
    """[rank of the axis][parameter]: the same parameters of every rank, in one all-gather if there are several."""
    if axis.size == 1 or not parameters:
        return [list(parameters)] * axis.size
    if len(parameters) == 1:
        return [[part] for part in _gather_large(parameters[0], axis)]
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    gathered = flat.new_empty(axis.size * flat.numel())
    dist.all_gather_into_tensor(gathered, flat, group=axis.group)
    sizes = [parameter.numel() for parameter in parameters]
    return [
        [piece.view(parameter.shape) for piece, parameter in zip(rank.split(sizes), parameters, strict=True)]
        for rank in gathered.view(axis.size, -1)
    ]


def _gather_large(parameter: Tensor, axis: Axis) -> list[Tensor]:
    """The same parameter of every rank, as parts of one buffer: the embedding, whole, is 0.6 GB of Qwen3-30B-A3B.

    Each rank broadcasts its own part into its place: gloo's all-gather would need as much memory once more.
    """
    parts = list(parameter.new_empty(axis.size, *parameter.shape).unbind())
    parts[axis.rank].copy_(parameter)
    for rank, part in enumerate(parts):
        dist.broadcast(part, src=dist.get_global_rank(axis.group, rank), group=axis.group)
    return parts


def export_hf(
    model: torch.nn.Module,
    arch: Architecture,
    world: World,
    out: Path,
    source: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model to `out` as transformers loads it, with config and tokenizer copied from `source`.

    Collective over all ranks; rank 0 writes. `dtype` defaults to the parameters'. A failure (full disk) is
    the same ConfigError on every rank, and the weights that were in `out` before survive it.
    """
    stream = iter_hf(model, arch, world)
    stored_as = dtype or next(model.parameters()).dtype
    error: str | None = None
    if world.is_main:
        specs = [TensorSpec(name=t.name, shape=t.shape, dtype=stored_as) for t in model_tensors(arch)]
        try:
            write_model(out, specs, stream, max_shard_bytes)
            copy_side_files(source, out, stored_as)
        except OSError as failure:
            reason = failure.strerror or failure
            error = f"{out}: cannot write the model: {reason}; make room or choose another folder"
        except ConfigError as failure:
            error = str(failure)
    for _ in stream:
        pass  # the other ranks' part in the collectives, and rank 0's when it could not write
    error = world.all_gather_objects(error)[0]
    if error:
        raise ConfigError(error)


def copy_side_files(source: Path, out: Path, dtype: torch.dtype) -> None:
    if source.resolve() != out.resolve():
        for name in _SIDE_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, out / name)
    config = json.loads(read_text(source / "config.json", "model configuration"))
    # transformers loads in the dtype that config.json names, not in that of the files.
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    partial = out / ".config.json.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / "config.json")

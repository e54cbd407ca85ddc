"""What a merge's configuration stands for on this machine, and everything that can be found wrong with it first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_mopd.hub import resolve_folder
from megatron_mopd.merge.config import MergeConfig, Recipe
from megatron_mopd.merge.slices import TensorSlices, ValueReader
from megatron_mopd.student.architecture import Architecture, read_architecture
from megatron_mopd.student.hf_files import DTYPES, StoredTensor, TensorSpec, content_hash, read_headers
from megatron_mopd.student.weight_table import model_tensors
from megatron_mopd.student.weights import check_hf
from megatron_mopd.tokenizer import Tokenizer, TokenizerFingerprint, difference
from megatron_mopd.yaml_config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One of the inputs."""

    key: str
    """Configuration key, for messages."""
    name: str
    """As the configuration gives it."""
    folder: Path
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    recipe: Recipe
    out: Path
    base: Checkpoint | None
    models: Mapping[str, Checkpoint]
    specs: tuple[TensorSpec, ...]
    """Of the merged tensors, in the order of the architecture."""
    dtype: str
    """For config.json: that of most of the merged bytes."""
    fingerprint: TokenizerFingerprint

    @property
    def reference(self) -> Checkpoint:
        """Gives config.json and the tokenizer: the base, or without one the first model."""
        return self.base or next(iter(self.models.values()))

    @property
    def inputs(self) -> list[Checkpoint]:
        return [*([self.base] if self.base else []), *self.models.values()]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)


def make_plan(config: MergeConfig) -> Plan:
    """Find the checkpoints and compare what their small files and headers say; reads no weights. Raises ConfigError."""
    base = _find(config.base, "base") if config.base is not None else None
    models = {name: _find(checkpoint, f"models.{name}") for name, checkpoint in config.models.items()}
    _check_distinct([*([base] if base else []), *models.values()])
    reference = base or next(iter(models.values()))
    arch = read_architecture(reference.folder)
    tokenizer = Tokenizer.load(reference.folder)
    for checkpoint in [reference, *models.values()]:
        _check_architecture(checkpoint, arch, reference)
        check_hf(arch, checkpoint.folder, checkpoint.key)
        if arch.tie_embeddings:
            _check_twin(checkpoint)
        told_apart = difference(tokenizer, Tokenizer.load(checkpoint.folder), (reference.key, checkpoint.key))
        if told_apart:
            raise ConfigError(f"{checkpoint.key}: {told_apart}; merge models trained from one base")
    specs = _specs(config, arch, reference)
    return Plan(
        recipe=config.recipe(),
        out=Path(config.out),
        base=base,
        models=models,
        specs=specs,
        dtype=_main_dtype(specs),
        fingerprint=tokenizer.fingerprint,
    )


def _find(name: str, key: str) -> Checkpoint:
    folder = resolve_folder(name, key)
    try:
        return Checkpoint(key=key, name=name, folder=folder, tensors=read_headers(folder))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_distinct(checkpoints: list[Checkpoint]) -> None:
    seen: dict[Path, str] = {}
    for checkpoint in checkpoints:
        other = seen.setdefault(checkpoint.folder.resolve(), checkpoint.key)
        if other != checkpoint.key:
            raise ConfigError(f"{checkpoint.key}: {checkpoint.name} is the same folder as {other}; keep one of them")


def _check_architecture(checkpoint: Checkpoint, arch: Architecture, reference: Checkpoint) -> None:
    own = read_architecture(checkpoint.folder)
    for field in dataclasses.fields(arch):
        ours, theirs = getattr(arch, field.name), getattr(own, field.name)
        if ours != theirs and field.name != "init_std":
            raise ConfigError(
                f"{checkpoint.key}: its {field.name} is {theirs}, that of {reference.key} {ours}; "
                "merge models trained from one base"
            )


def _check_twin(checkpoint: Checkpoint) -> None:
    """Some tied checkpoints store the embedding twice. Only the first is merged, so they have to be equal."""
    twin, embedding = (checkpoint.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if twin is None or embedding is None:
        return
    with ValueReader() as reader:
        pair = TensorSlices(name=twin.name, base=embedding, models=[twin], reader=reader)
        if any(tau.any() for tau in pair.task_vector(0)):
            raise ConfigError(
                f"{checkpoint.key}: {twin.file}: '{twin.name}' differs from the embedding, but config.json ties them; "
                "set tie_word_embeddings to false in config.json"
            )


def _specs(config: MergeConfig, arch: Architecture, reference: Checkpoint) -> tuple[TensorSpec, ...]:
    chosen = getattr(torch, config.dtype) if config.dtype else None
    return tuple(
        TensorSpec(name=tensor.name, shape=tensor.shape, dtype=chosen or DTYPES[reference.tensors[tensor.name].dtype])
        for tensor in model_tensors(arch)
    )


def _main_dtype(specs: tuple[TensorSpec, ...]) -> str:
    sizes: dict[str, int] = {}
    for spec in specs:
        name = str(spec.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + spec.num_bytes
    return max(sizes, key=lambda name: sizes[name])


def check_finite(tensor: StoredTensor, chunk: memoryview) -> None:
    """Raise ConfigError when there is a NaN or an infinity among the bytes of `tensor`."""
    values = torch.frombuffer(chunk, dtype=DTYPES[tensor.dtype])
    low, high = torch.aminmax(values)  # NaN if there is one; ten times faster than isfinite
    if not (low.isfinite() and high.isfinite()):
        kind = "NaN" if low.isnan() else "an infinity"
        raise ConfigError(f"{tensor.file}: tensor '{tensor.name}' has {kind} in it; use an earlier checkpoint")


def read_hashes(plan: Plan) -> dict[str, str]:
    """Configuration key -> content hash of that input; reads all weights. ConfigError on NaN and on equal weights."""
    hashes: dict[str, str] = {}
    for checkpoint in plan.inputs:
        try:
            digest = content_hash(checkpoint.folder, check_finite)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint.key}: {error}") from None
        same = next((key for key, other in hashes.items() if other == digest), None)
        if same is not None:
            raise ConfigError(f"{checkpoint.key}: has the same weights as {same}; remove one of them")
        hashes[checkpoint.key] = digest
    return hashes

"""Small sharded checkpoints for the tests of merging, and each method once more: whole tensors, plain numpy float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.merge.config import MergeConfig
from megatron_mopd.merge.formulas import random_mask
from megatron_mopd.student.architecture import read_architecture
from megatron_mopd.student.hf_files import TensorReader, TensorSpec, read_headers, write_model
from megatron_mopd.student.weight_table import model_tensors

SOURCE = Path(__file__).parents[2] / "configs" / "tiny" / "model"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24}


def write_checkpoint(
    folder: Path,
    seed: int,
    *,
    base: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 1 << 20,
    **change: object,
) -> Path:
    """Random weights; with `base`, its weights with half of the elements changed a little, as RL leaves them."""
    folder.mkdir(parents=True)
    for file in SOURCE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((SOURCE / "config.json").read_text()) | SMALL | change
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    start = load(base) if base is not None else {}
    tensors = {}
    for tensor in model_tensors(read_architecture(folder)):
        values = torch.randn(tensor.shape, generator=generator)
        if base is None:
            tensors[tensor.name] = (0.1 * values).to(dtype)
        else:
            changed = torch.rand(tensor.shape, generator=generator) < 0.5
            tensors[tensor.name] = (start[tensor.name].float() + 0.003 * values * changed).to(dtype)
    write_tensors(folder, tensors, shard_bytes)
    return folder


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = 1 << 20) -> None:
    specs = [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]
    write_model(folder, specs, tensors.items(), shard_bytes)


def load(folder: Path) -> dict[str, Tensor]:
    stored = read_headers(folder)
    with TensorReader(stored) as reader:
        return {name: reader[name][:] for name in stored}


def plain_merge(config: MergeConfig) -> dict[str, Tensor]:
    """The merged tensors in the dtype of the base: each whole, in numpy and float64."""
    models = {name: load(Path(folder)) for name, folder in config.models.items()}
    base = load(Path(config.base)) if config.base else next(iter(models.values()))
    weights = [(config.weights or dict.fromkeys(models, 1.0))[name] for name in models]
    merged = {}
    for name, tensor in base.items():
        start = tensor.double().numpy()
        values = {model: tensors[name].double().numpy() for model, tensors in models.items()}
        result = _plain(config, name, start, values, weights)
        merged[name] = torch.from_numpy(np.asarray(result)).to(tensor.dtype)
    return merged


def _plain(
    config: MergeConfig, name: str, base: np.ndarray, values: dict[str, np.ndarray], weights: list[float]
) -> np.ndarray:
    if config.method == "average":
        return sum(w * v for w, v in zip(weights, values.values(), strict=True)) / sum(weights)
    tau = {model: value - base for model, value in values.items()}
    scaling = 1.0 if config.scaling is None else config.scaling
    if config.method == "ties":
        tau = {model: _trimmed(t, config.density) for model, t in tau.items()}
    if config.method in ("dare", "dare_ties"):
        masks = {m: random_mask(config.seed, m, name, 0, t.size, config.density).numpy() for m, t in tau.items()}
        tau = {model: t * masks[model].reshape(t.shape) / config.density for model, t in tau.items()}
    if config.method in ("task_arithmetic", "dare"):
        return base + scaling * sum(w * t for w, t in zip(weights, tau.values(), strict=True))
    stacked = np.stack(list(tau.values()))
    elected = weights
    if config.method == "sce":
        stacked = _selected(stacked, config.density)
        energies = [float((t**2).sum()) for t in stacked]
        weights, elected = [e / sum(energies) for e in energies], [1.0] * len(energies)
    return base + scaling * _elected_mean(stacked, elected, weights)


def _trimmed(tau: np.ndarray, density: float) -> np.ndarray:
    smallest = np.sort(np.abs(tau).ravel())[::-1][max(1, round(density * tau.size)) - 1]
    return np.where(np.abs(tau) >= smallest, tau, 0.0)


def _selected(stacked: np.ndarray, density: float) -> np.ndarray:
    mean = sum(stacked) / len(stacked)
    spread = sum((t - mean) ** 2 for t in stacked) / len(stacked)
    varying = np.sort(spread[spread > 0])[::-1]
    if not varying.size:
        return np.zeros_like(stacked)
    return np.where(spread >= varying[max(1, round(density * varying.size)) - 1], stacked, 0.0)


def _elected_mean(stacked: np.ndarray, elected: list[float], weights: list[float]) -> np.ndarray:
    sign = np.sign(sum(w * t for w, t in zip(elected, stacked, strict=True)))
    result = np.zeros_like(sign)
    for index in np.ndindex(sign.shape):
        chosen = [(w, t[index]) for w, t in zip(weights, stacked, strict=True) if sign[index] * t[index] > 0]
        if chosen:
            result[index] = sum(w * t for w, t in chosen) / sum(w for w, _ in chosen)
    return result

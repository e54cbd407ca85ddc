"""One YAML file is one merge: the checkpoints, the method, its parameters. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_mopd.yaml_config import ConfigError, apply_overrides, build, load_yaml, read_text, require

Method = Literal["average", "task_arithmetic", "ties", "dare", "dare_ties", "sce"]
RANDOM = ("dare", "dare_ties")
"""Methods that drop parameters at random."""
_DENSITY = {"ties": 0.2, "sce": 0.1}
"""Published values: TIES keeps the top 20 % (arXiv 2306.01708), FuseChat selects the top 10 %. DARE states none."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    out: str
    """Folder to write; it appears when it is complete, and never half."""
    models: dict[str, str]
    """Name -> folder or Hub name with safetensors, or a checkpoint of this program. `dare` draws by these names."""
    method: Method
    """average: of the weights · the others add task vectors (model - base) to the base: task_arithmetic (arXiv
    2212.04089), ties (2306.01708), dare and dare_ties (2311.03099), sce (2408.07990)."""
    base: str | None = None
    """What the models were trained from; gives config.json and the tokenizer. Only `average` can do without."""
    weights: dict[str, float] | None = None
    """Model -> its weight; default: 1 for each. `average`, `ties` and `dare_ties` use the ratios only."""
    scaling: float | None = None
    """Lambda, the factor of the merged task vector; default 1. Not for `average`."""
    density: float | None = None
    """Share of every tensor's elements that stay: `ties` (default 0.2), `sce` (0.1), `dare` and `dare_ties`."""
    seed: int = 0
    """Of what `dare` and `dare_ties` drop; the other methods draw nothing."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the merged weights; default: as the base stores them, tensor by tensor."""

    def __post_init__(self) -> None:
        least = 2 if self.method in ("average", "sce") else 1
        require(
            len(self.models) >= least,
            f"models: {len(self.models)} given, method '{self.method}' needs at least {least}; name the checkpoints",
        )
        require(
            self.method == "average" or self.base is not None,
            f"base: missing; method '{self.method}' needs the checkpoint that the models were trained from",
        )
        self._check_density()
        self._check_scaling()
        self._check_weights()

    def _check_density(self) -> None:
        if self.method in ("average", "task_arithmetic"):
            require(self.density is None, f"density: method '{self.method}' keeps every element; remove it")
        elif self.density is None:
            require(self.method in _DENSITY, f"density: missing; method '{self.method}' needs the share to keep")
        else:
            require(0 < self.density <= 1, f"density: must be in (0, 1], got {self.density}")

    def _check_scaling(self) -> None:
        if self.method == "average":
            require(self.scaling is None, "scaling: method 'average' has no task vector to scale; remove it")
        elif self.scaling is not None:
            require(
                math.isfinite(self.scaling) and self.scaling > 0,
                f"scaling: must be a number > 0, got {self.scaling}; 0 would give back the base",
            )

    def _check_weights(self) -> None:
        if self.weights is None:
            return
        require(self.method != "sce", "weights: method 'sce' calculates its own; remove them")
        for name in self.weights:
            require(name in self.models, f"weights.{name}: is not in models ({', '.join(self.models)})")
        for name in self.models:
            require(name in self.weights, f"weights.{name}: missing; give every model a weight, or none")
        for name, weight in self.weights.items():
            require(
                math.isfinite(weight) and weight > 0,
                f"weights.{name}: must be a number > 0, got {weight}; remove the model to leave it out",
            )

    def recipe(self) -> Recipe:
        """What is computed, every default filled in; values that the method does not use are set to neutral ones."""
        weights = self.weights or dict.fromkeys(self.models, 1.0)
        density = _DENSITY.get(self.method, 1.0) if self.density is None else self.density
        return Recipe(
            method=self.method,
            weights={name: weights[name] for name in self.models},
            scaling=1.0 if self.scaling is None else self.scaling,
            density=density,
            seed=self.seed if self.method in RANDOM else 0,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The arithmetic of a merge."""

    method: Method
    weights: dict[str, float] = field(default_factory=dict)
    """Model -> weight, in the order in which the models are stacked."""
    scaling: float = 1.0
    density: float = 1.0
    seed: int = 0

    @property
    def is_sparse(self) -> bool:
        """Whether a part of every task vector is left out."""
        return self.method not in ("average", "task_arithmetic")


def load_merge_config(path: str | Path, overrides: Sequence[str] = ()) -> MergeConfig:
    """Read a merge's file, apply `key.path=value` overrides, and check it. Raises ConfigError."""
    tree = apply_overrides(load_yaml(read_text(path, "config file"), str(path)), overrides)
    try:
        return build(MergeConfig, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

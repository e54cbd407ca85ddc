"""What each of the compared models says about the same tokens. Index t of an array describes token t itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mopd.parallel.runtime import World
from megatron_mopd.types import ExpertArray, FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Of one model; every list has an entry per sequence of T tokens."""

    logprobs: list[FloatArray]
    """[T] in nats; NaN where the model did not say: the first token always."""
    experts: list[ExpertArray] | None = None
    """[T, layers, k] chosen where token t was the input; -1: not known. None: nothing is known."""
    margins: list[FloatArray] | None = None
    """[T, layers] probability of the last expert that was chosen, less that of the first one that was not."""
    hidden: list[FloatArray] | None = None
    """[T, layers + 1, H] after each layer, and after the final norm."""


def padded(values: Sequence[float] | FloatArray, length: int) -> FloatArray:
    """[length] with `values` at the end and NaN before."""
    result = np.full(length, np.nan, dtype=np.float32)
    result[length - len(values) :] = values
    return result


def merged[T](own: dict[int, T], world: World) -> list[T]:
    """[sequences] from the parts of all ranks, by index; equal on every rank. Collective."""
    parts = world.all_gather_objects(own)
    found = {index: value for part in parts for index, value in part.items()}
    return [found[index] for index in range(len(found))]

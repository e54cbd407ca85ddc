"""Where the student's hidden states part from the reference's: per layer and token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_mopd.types import FloatArray

PARTS_AT = {"float32": 1e-4, "bfloat16": 5e-2}
"""Relative error from which a layer's output counts as another one, by the student's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Of the relative error |h_student - h_reference| / |h_reference| (L2) after one layer."""

    name: str
    mean: float
    largest: float
    sequence: int
    """Where the largest is."""
    token: int
    parted: int
    """Tokens beyond `PARTS_AT`, in this layer for the first time."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_layers(student: Sequence[FloatArray], reference: Sequence[FloatArray], dtype: str) -> list[Layer]:
    """Hidden states [T, layers + 1, H] of each sequence, the final norm's last."""
    errors = [
        np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
        for ours, theirs in zip(student, reference, strict=True)
    ]
    table = np.concatenate(errors)
    beyond = table > PARTS_AT[dtype]
    before = np.zeros(len(table), dtype=bool)
    ends = np.cumsum([len(part) for part in errors])
    found = []
    for layer in range(table.shape[1]):
        worst = int(table[:, layer].argmax())
        sequence = int(np.searchsorted(ends, worst, side="right"))
        found.append(
            Layer(
                name=f"layer {layer}" if layer < table.shape[1] - 1 else "final norm",
                mean=float(table[:, layer].mean()),
                largest=float(table[worst, layer]),
                sequence=sequence,
                token=worst - int(ends[sequence] - len(errors[sequence])),
                parted=int((beyond[:, layer] & ~before).sum()),
            )
        )
        before |= beyond[:, layer]
    return found

"""A number and how it was obtained: nothing in a plan is printed without saying so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

How = Literal["counted", "formula", "measured", "assumed", "ceiling", "given"]
"""counted: from the real Megatron model on the meta device, or from the packing that a step does ·
formula: by arithmetic from counted numbers · measured: read from a run's own log ·
assumed: a guess that an option replaces · ceiling: at best, from a data sheet; nothing ran at that speed ·
given: the configuration or an option says so."""

GB = 1e9
"""Bytes. Decimal, as data sheets count."""


@dataclass(frozen=True, slots=True)
class Figure:
    key: str
    """Name in `--json`."""
    label: str
    value: float
    unit: str
    how: How
    source: str
    """The formula, the file or the document behind it."""


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> float:
        """The value of the figure `key`. Raises KeyError."""
        for figure in self.figures:
            if figure.key == key:
                return figure.value
        raise KeyError(key)

"""Whether two models send tokens to the same experts, and where they first do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mopd.audit.numbers import differences
from megatron_mopd.audit.views import View
from megatron_mopd.types import ExpertArray, FloatArray

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """The tokens whose routing differs in one layer though it is the same in all layers below, there and before."""

    layer: int
    tokens: int
    margin: float
    """Median of the right model's gate margin there: near 0 for a flip between two experts that are nearly as good."""
    expert: int
    """The one that most of them have on one side only, and their share."""
    expert_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """|Difference| of log-probs by whether anything that a token sees was routed differently."""

    same_tokens: int
    same_mean: float
    same_largest: float
    differing_tokens: int
    differing_mean: float
    differing_largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    left: str
    right: str
    same: float
    """Share of (token, layer) with the same set of experts."""
    per_layer: tuple[float, ...]
    tokens_differing: int
    """In at least one layer."""
    tokens: int
    partings: tuple[Parting, ...]
    """By layer."""
    split: Split

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_routing(left: tuple[str, View], right: tuple[str, View], logprobs: Sequence[FloatArray]) -> Routing | None:
    """logprobs: the right one's, at the temperature of the left one's. None where one side does not tell."""
    (left_name, one), (right_name, other) = left, right
    if one.experts is None or other.experts is None:
        return None
    pairs = list(zip(one.experts, other.experts, strict=True))
    same = [_same_sets(a, b) for a, b in pairs]
    known = [(a >= 0).all((1, 2)) & (b >= 0).all((1, 2)) for a, b in pairs]
    rows = np.concatenate([s[k] for s, k in zip(same, known, strict=True)])
    return Routing(
        left=left_name,
        right=right_name,
        same=float(rows.mean()),
        per_layer=tuple(float(share) for share in rows.mean(0)),
        tokens=len(rows),
        tokens_differing=int((~rows.all(1)).sum()),
        partings=tuple(_partings(pairs, same, other.margins)),
        split=_split(differences(one.logprobs, logprobs), [contexts_same(s) for s in same]),
    )


def _same_sets(a: ExpertArray, b: ExpertArray) -> BoolArray:
    """[T, layers]; what is not known counts as the same."""
    return (np.sort(a, -1) == np.sort(b, -1)).all(-1) | (a < 0).any(-1) | (b < 0).any(-1)


def contexts_same(same: BoolArray) -> BoolArray:
    """[T] from [T, layers]: whether everything that decides token t's log-prob was routed alike.

    That is the token before it in every layer, and the earlier ones below the last layer, whose output no other token
    attends to.
    """
    alike = np.logical_and.accumulate(same[:, :-1].all(1)) & same[:, -1]
    return np.concatenate([[True], alike[:-1]])


def _partings(
    pairs: Sequence[tuple[ExpertArray, ExpertArray]], same: Sequence[BoolArray], margins: Sequence[FloatArray] | None
) -> list[Parting]:
    """Only first causes: a token's input to layer l depends on layers below l of the tokens up to it."""
    found = []
    for layer in range(same[0].shape[1]):
        gaps, lonely = [], list[int]()
        for index, alike in enumerate(same):
            below = np.logical_and.accumulate(alike[:, :layer].all(1))
            for token in np.flatnonzero(below & ~alike[:, layer]):
                a, b = (set(side[token, layer].tolist()) for side in pairs[index])
                lonely += a ^ b
                gaps.append(float(margins[index][token, layer]) if margins is not None else np.nan)
        if gaps:
            expert, count = max(((e, lonely.count(e)) for e in sorted(set(lonely))), key=lambda pair: pair[1])
            found.append(
                Parting(
                    layer=layer,
                    tokens=len(gaps),
                    margin=float(np.median(gaps)),
                    expert=expert,
                    expert_share=count / len(gaps),
                )
            )
    return found


def _split(apart: Sequence[NDArray[np.float64]], clean: Sequence[BoolArray]) -> Split:
    values, same = np.abs(np.concatenate(apart)), np.concatenate(clean)
    known = ~np.isnan(values)
    agreeing, differing = values[known & same], values[known & ~same]
    return Split(
        same_tokens=len(agreeing),
        same_mean=float(agreeing.mean()) if len(agreeing) else 0.0,
        same_largest=float(agreeing.max()) if len(agreeing) else 0.0,
        differing_tokens=len(differing),
        differing_mean=float(differing.mean()) if len(differing) else 0.0,
        differing_largest=float(differing.max()) if len(differing) else 0.0,
    )

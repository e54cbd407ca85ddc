"""The outcome of one check, and the table of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    figure: float | None = None
    """The largest error that was found."""
    limit: float | None = None
    reason: str = ""
    """Why it was skipped, or what it failed with."""

    @property
    def verdict(self) -> Verdict:
        if self.figure is None or self.limit is None:
            return "skipped" if self.limit is None else "failed"
        return "ok" if self.figure <= self.limit else "failed"  # NaN is no pass


def skipped(name: str, reason: str) -> Result:
    return Result(name, reason=reason)


def attempt(name: str, limit: float, measure: Callable[[], float]) -> Result:
    """What `measure` finds. Whatever it raises is this check's failure: the others still run."""
    try:
        return Result(name, measure(), limit)
    except Exception as error:  # a GPU path that never ran may raise anything
        text = " ".join(str(error).split())
        return Result(name, None, limit, f"{type(error).__name__}: {text}"[-200:])


def table(results: Sequence[Result]) -> str:
    """One line a check: name, figure, limit, verdict and reason."""
    rows = [("check", "figure", "limit", "")]
    for each in results:
        figure = "-" if each.figure is None else f"{each.figure:.1e}"
        limit = "-" if each.limit is None else f"{each.limit:.0e}"
        rows.append((each.name, figure, limit, f"{each.verdict}{': ' if each.reason else ''}{each.reason}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    )  # fmt: skip

"""One line that says how a run is doing: live on a terminal, now and then in a log."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Task, TextColumn
from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 5.0
"""Least time between two lines where there is no terminal."""
_PER_DOMAIN = {"reverse_kl": "kl", "reward": "reward"}
"""Metric shown per domain -> its short name; the first one that a step reports."""
_RECENT = 10


class Progress:
    """Progress of `total` steps, of which `start` are done; a context manager. Only rank 0 shows anything.

    with Progress("mopd run1", total=60, rank=0) as progress:
        progress.update(1, {"loss": 0.16, "reverse_kl/math": 0.2})
    """

    def __init__(self, title: str, total: int, rank: int, *, start: int = 0, console: Console | None = None) -> None:
        self._title, self._total, self._start = title, total, start
        self._shown = rank == 0
        self._console = console or Console(file=sys.stdout)
        self._live: RichProgress | None = None
        self._ends: deque[float] = deque(maxlen=_RECENT + 1)
        self._printed = 0.0

    def __enter__(self) -> Self:
        self._ends.append(time.monotonic())
        if self._shown and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                TextColumn("{task.fields[line]}"),
            )
            # Drawn on each update and never from a thread: this process may have to fork.
            self._live = RichProgress(*columns, console=self._console, auto_refresh=False)
            self._live.start()
            self._live.add_task(self._title, total=self._total, completed=self._start, line="starting")
            self._live.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that `done` steps are done, with metrics of the last ('loss', 'reverse_kl/<domain>', ...)."""
        now = time.monotonic()
        self._ends.append(now)
        if not self._shown:
            return
        line = self._line(done, metrics)
        if self._live is not None:
            task: Task = self._live.tasks[0]
            self._live.update(task.id, completed=done, line=line, refresh=True)
        elif now - self._printed >= PLAIN_SECONDS or done >= self._total:
            self._printed = now
            self._console.print(f"{self._title}  {line}", markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self._shown:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, done: int, metrics: Mapping[str, float]) -> str:
        parts = [f"{done}/{self._total}"]
        if "loss" in metrics:
            parts.append(f"loss {metrics['loss']:.4f}")
        domains = _per_domain(metrics)
        if domains:
            parts.append(domains)
        if len(self._ends) > 1:
            pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            parts += [f"{pace:.2f} s/step", f"ETA {_clock(pace * max(0, self._total - done))}"]
        return "  ".join(parts)


def _per_domain(metrics: Mapping[str, float]) -> str:
    for metric, short in _PER_DOMAIN.items():
        values = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{metric}/")}
        if any(values.values()):  # all zero: this stage does not measure it
            return f"{short} " + " ".join(f"{domain} {value:.3f}" for domain, value in values.items())
    return ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

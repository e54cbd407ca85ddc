"""A request to stop, seen between two steps rather than in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""USR1 is what batch systems send some minutes before a job's time is up."""


class StopFlag:
    """While entered, SIGTERM, SIGINT and SIGUSR1 set `requested` instead of ending the process.

        with StopFlag() as stop:
            while not world.any(stop.requested): ...

    Signals reach the ranks at different steps: reduce the flag over all ranks before anyone acts on it. A
    second signal changes nothing: the launcher, torchrun or srun kills. Main thread only (ValueError).
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS) -> None:
        self._signals = tuple(signals)
        self._previous: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self._received is not None

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that came."""
        return self._received

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._receive) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number)

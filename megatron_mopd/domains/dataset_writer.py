"""Writes a dataset a step at a time, so that an interrupted `mopd sample` goes on where it was.

    OUT.partial         the lines so far
    OUT.progress.json   how many of its bytes are whole steps, what they cost and what they were sampled for

`finish` adds the footer and moves the lines to OUT, which is complete or not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_mopd.domains.dataset import Cost, Origin, StoredAnswer
from megatron_mopd.yaml_config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SoFar:
    """The steps that are in the file, of all teachers one after another."""

    steps: int = 0
    size: int = 0
    """Bytes of the file that these steps fill, the header among them."""
    sampled: dict[str, int] = field(default_factory=dict)
    """domain -> answers."""
    left_out: dict[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    seconds: float = 0.0


class DatasetWriter:
    """One dataset from its first line, or from where an interrupted one of the same settings stopped, to its last."""

    def __init__(self, path: Path, origin: Origin, settings: Mapping[str, Any]):
        """settings: plain values for JSON; with others than these nothing is continued.

        Raises ConfigError when the file cannot be written, here and in every method.
        """
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._record = path.with_name(path.name + ".progress.json")
        self._made_of = json.loads(json.dumps({"origin": asdict(origin), "settings": dict(settings)}))
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.so_far = self._read_record()
            self._file = self._partial.open("r+b" if self.so_far.steps else "wb")
            self._file.truncate(self.so_far.size)
            self._file.seek(self.so_far.size)
            if not self.so_far.steps:
                self._file.write(json.dumps({"origin": asdict(origin)}).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._file.closed:
            with self._explained():
                self._file.close()

    def write(self, answer: StoredAnswer) -> None:
        with self._explained():
            self._file.write(json.dumps(asdict(answer), separators=(",", ":")).encode() + b"\n")

    def end_step(self, *, sampled: Mapping[str, int], left_out: Mapping[str, int], tokens: int, seconds: float) -> None:
        """What was written since the last call is a whole step; the figures are of all steps so far."""
        with self._explained():
            self._file.flush()
            self.so_far = SoFar(
                steps=self.so_far.steps + 1,
                size=self._file.tell(),
                sampled=dict(sampled),
                left_out=dict(left_out),
                generated_tokens=tokens,
                seconds=seconds,
            )
            fresh = self._record.with_name(self._record.name + ".tmp")
            fresh.write_text(json.dumps({"made_of": self._made_of, "so_far": asdict(self.so_far)}), encoding="utf-8")
            os.replace(fresh, self._record)

    def finish(self, cost: Cost) -> None:
        """Add the footer; the dataset is there when this returns."""
        with self._explained():
            self._file.write(json.dumps({"cost": asdict(cost)}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self._path)
            self._record.unlink(missing_ok=True)

    def discard(self) -> None:
        """Leave nothing: all steps are there, and are no dataset."""
        with self._explained():
            self._file.close()
            self._partial.unlink(missing_ok=True)
            self._record.unlink(missing_ok=True)

    def _read_record(self) -> SoFar:
        """Of an interrupted dataset of the same settings; nothing if there is none or it is damaged."""
        try:
            tree = json.loads(self._record.read_text(encoding="utf-8"))
            known = SoFar(**tree["so_far"])
            whole = self._partial.stat().st_size >= known.size
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return SoFar()
        return known if whole and tree["made_of"] == self._made_of else SoFar()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self._path}: cannot be written: {error.strerror}; free some space and give the same command again, "
                "which goes on from here, or choose another file"
            ) from None

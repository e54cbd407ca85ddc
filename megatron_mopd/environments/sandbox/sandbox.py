"""Runs one snippet at a time in a fresh sandbox, from any thread, and says how it ended."""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from megatron_mopd.environments.sandbox.isolation import (
    ISOLATIONS,
    Isolation,
    Place,
    command,
    environment,
    missing,
    readable,
    user_of,
)

Ending = Literal["ok", "error", "timeout", "output", "killed"]
"""ok · error: an exception or another exit code · timeout: by the clock · output: too much of it · killed: a limit."""

SETUP_SECONDS = 30.0
"""For making the sandbox, beside the snippet's own time: this machine may be busy."""
_PROBE = "print(6 * 7)"


class SandboxError(Exception):
    """The sandbox itself could not be made or did not work; the snippet has not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Of one snippet. It is one process, with threads."""

    seconds: float
    """By the clock, and of CPU time."""
    memory_bytes: int
    """Address space."""
    scratch_bytes: int
    """Files that it may write, in memory."""
    output_bytes: int
    """Standard output and error together; it is ended when it writes more."""
    open_files: int = 64
    threads: int = 64
    """Where the snippet is a user of its own; elsewhere they would be counted with all of ours. Memory limits them."""

    def as_rlimits(self, alone: bool) -> dict[str, int]:
        """name of RLIMIT_* in lower case -> value. alone: whether the snippet is a user of its own."""
        return {
            **({"nproc": self.threads} if alone else {}),
            "cpu": int(self.seconds) + 2,  # later than the clock, which says more
            "as": self.memory_bytes,
            "fsize": self.scratch_bytes,
            "nofile": self.open_files,
            "core": 0,
            "memlock": 0,
            "msgqueue": 0,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxResult:
    output: str
    """Standard output and error in the order written, cut at `output_bytes`."""
    ending: Ending
    seconds: float


class Sandbox:
    """One way of isolation on this machine. Holds nothing: every snippet has a process and files of its own."""

    def __init__(self, isolation: Isolation, place: Place) -> None:
        self.isolation = isolation
        self._place = place

    @classmethod
    def open(cls, isolation: Isolation | Literal["auto"] = "auto") -> Sandbox:
        """The strongest that works here, or the one that is asked for. Runs a snippet to see that it does.

        Raises SandboxError saying of each way why it does not; `auto` never ends up with `none`.
        """
        reasons = []
        for kind in ISOLATIONS if isolation == "auto" else (isolation,):
            sandbox = cls(kind, Place.here())
            reason = missing(kind) or sandbox._try()
            if reason is None:
                return sandbox
            reasons.append(f"{kind}: {reason}")
        raise SandboxError("; ".join(reasons))

    def run(self, source: str, limits: SandboxLimits) -> SandboxResult:
        """Run `source` as a Python program of its own. Blocks for at most `limits.seconds` and the set-up.

        Nothing of it is left when this returns: no process, no file. Raises SandboxError.
        """
        ready_end, ready = os.pipe()
        own_root = self.isolation in ("bubblewrap", "namespaces")
        settings = {
            "limits": limits.as_rlimits(alone=own_root),
            "own_files": own_root,
            "user": user_of(self.isolation, 1_000_000 + secrets.randbelow(1_000_000_000)),
            "readable": readable(self._place) if self.isolation == "landlock" else None,
            "packages": self._place.packages,
        }
        line = command(self.isolation, self._place, scratch_bytes=limits.scratch_bytes, settings=settings, ready=ready)
        try:
            process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(ready,),
                env=environment(self.isolation),
                cwd="/",
                umask=0o022,
                start_new_session=True,
            )
        except OSError as error:
            os.close(ready_end)
            raise SandboxError(f"{line[0]}: {error.strerror}") from None
        finally:
            os.close(ready)
        try:
            return _Watch(process, ready_end, limits).until_the_end(source)
        finally:
            _end(process)
            os.close(ready_end)

    def _try(self) -> str | None:
        """Why it does not work here; None when it does."""
        megabyte = 1 << 20
        limits = SandboxLimits(
            seconds=SETUP_SECONDS, memory_bytes=1024 * megabyte, scratch_bytes=megabyte, output_bytes=1024
        )
        try:
            result = self.run(_PROBE, limits)
        except SandboxError as error:
            return str(error)
        return None if result.output.strip() == "42" else f"a first snippet ended with {result.ending}: {result.output}"


class _Watch:
    """Waits for a snippet's set-up, output and end, with a limit on each."""

    def __init__(self, process: subprocess.Popen[bytes], ready: int, limits: SandboxLimits) -> None:
        self._process, self._ready, self._limits = process, ready, limits
        self._output = b""

    def until_the_end(self, source: str) -> SandboxResult:
        self._give(source.encode("utf-8", "replace"))
        self._await_ready()
        started = time.monotonic()
        ending = self._collect(started + self._limits.seconds)
        text = self._output[: self._limits.output_bytes].decode("utf-8", "replace")
        return SandboxResult(output=text, ending=ending, seconds=time.monotonic() - started)

    def _give(self, source: bytes) -> None:
        """Write the snippet in the background of its start: a pipe holds less than a long one."""
        assert self._process.stdin is not None
        stdin = self._process.stdin.fileno()
        os.set_blocking(stdin, False)
        deadline, rest = time.monotonic() + SETUP_SECONDS, memoryview(source)
        with selectors.DefaultSelector() as selector, suppress(BrokenPipeError):
            selector.register(stdin, selectors.EVENT_WRITE)
            while rest and selector.select(max(0.0, deadline - time.monotonic())):
                rest = rest[os.write(stdin, rest) :]
        self._process.stdin.close()

    def _await_ready(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._ready, selectors.EVENT_READ)
            if not selector.select(SETUP_SECONDS):
                raise SandboxError(f"not ready after {SETUP_SECONDS:g} s")
        if os.read(self._ready, 1) != b"1":
            self._collect(time.monotonic() + SETUP_SECONDS)
            words = self._output.decode("utf-8", "replace").strip().splitlines()
            raise SandboxError(words[-1] if words else f"ended with code {self._process.wait()} before it was ready")

    def _collect(self, deadline: float) -> Ending:
        """Read until the snippet has ended, or is not to go on."""
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return "timeout"
                part = os.read(stdout, 1 << 16)
                self._output += part
                if len(self._output) > self._limits.output_bytes:
                    return "output"
                if not part:
                    break
        try:  # it may have closed its output and run on
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "timeout"
        if code == 0:
            return "ok"
        return "killed" if code < 0 or code > 128 else "error"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left. Process 1 of a sandbox is in its starter's group, and all others end with it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()

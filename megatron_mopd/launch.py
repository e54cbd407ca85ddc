"""Starts the ranks of a run on this machine, watches them, and ends them together.

Ranks are forked from a parent that has imported torch and Megatron once (seconds, and memory that all
share). A fork copies one thread and no CUDA context, so the parent computes nothing. Where the machine has
GPUs it does not even import: packages for CUDA may touch the device while they load. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_mopd.config import RunConfig
from megatron_mopd.environment import gpu_count, joined_world, world_size
from megatron_mopd.rank_process import EXIT_CONFIG, EXIT_FAILED, RankJob, RankMessage, run_rank
from megatron_mopd.signals import STOP_SIGNALS
from megatron_mopd.yaml_config import ConfigError

GRACE_SECONDS = 5.0
"""How long the other ranks have between SIGTERM and SIGKILL once one has failed."""
_POLL_SECONDS = 0.2
PRELOAD = ("megatron_mopd.train",)
"""What `launch` imports before it forks: torch, Megatron and all of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a set of ranks ended."""

    exit_code: int
    """0: all well · 2: ConfigError · 128 + n: stopped by signal n, or a rank died of it · 1: the rest."""
    result: Any = None
    """What `function` returned on rank 0 (in a joined world: on this rank)."""
    stopped_by: signal.Signals | None = None
    """The signal after which the ranks saved and left, if there was one."""


def run_ranks(
    function: Callable[..., Any],
    arguments: tuple[Any, ...] = (),
    *,
    ranks: int,
    port: int | None = None,
    log_dir: Path | None = None,
    preload: Sequence[str] = (),
    grace: float = GRACE_SECONDS,
) -> Outcome:
    """Call `function(*arguments)` on `ranks` forked ranks and wait; or, if started as a rank, call it here.

    Args:
        function: may be a closure, as ranks are forked. Finds its place in RANK, WORLD_SIZE, MASTER_ADDR, ...
        port: rendezvous port, default a free one. ConfigError if it is taken.
        log_dir: stdout and stderr of ranks 1, 2, ... go to `rank<r>.log` in here; rank 0 keeps the terminal.
        preload: modules that the parent imports before it forks, on a machine without GPUs.
        grace: seconds between SIGTERM and SIGKILL for the other ranks when one has failed.

    A failure is reported here, on stderr: the traceback of the rank that failed first, then one line. SIGINT,
    SIGTERM, SIGUSR1 and a hang-up are forwarded once as SIGTERM; a second one kills. In a joined world
    exceptions pass through to the caller.
    """
    if joined_world() is not None:
        return Outcome(exit_code=0, result=function(*arguments))
    with _reserved_port(port) as chosen:
        if not gpu_count():
            for module in preload:
                importlib.import_module(module)
        if log_dir is not None:
            try:
                log_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"run_dir: {log_dir} cannot be written: {error.strerror}") from None
        jobs = [
            RankJob(
                function=function,
                arguments=arguments,
                rank=rank,
                ranks=ranks,
                port=chosen,
                log_file=log_dir / f"rank{rank}.log" if log_dir is not None and rank else None,
                parent=os.getpid(),
            )
            for rank in range(ranks)
        ]
        return _Ranks(jobs, grace).run()


def launch(config: RunConfig, function: Callable[..., Any], *arguments: object) -> Outcome:
    """Call `function(config, *arguments)` on the ranks of `config`, here or in the world that was joined."""
    return run_ranks(
        function,
        (config, *arguments),
        ranks=world_size(config.parallel),
        port=config.parallel.port,
        log_dir=Path(config.run_dir) / "logs",
        preload=PRELOAD,
    )


@contextlib.contextmanager
def _reserved_port(port: int | None) -> Iterator[int]:
    """A rendezvous port that stays ours until rank 0 listens on it, or ConfigError.

    A bound socket that does not listen keeps the port from being given away, and SO_REUSEADDR on both sides
    lets rank 0 listen all the same.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("", port or 0))
        except OSError as error:
            reason = "is in use by another process" if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(
                f"parallel.port: {port} {reason}; choose another one, or remove the key to get a free one"
            ) from None
        yield holder.getsockname()[1]


@dataclass
class _Rank:
    process: ForkProcess
    messages: Connection
    message: RankMessage | None = None
    sent: set[int] = field(default_factory=set)
    """Signals that the launcher sent: death by another one is the rank's own misfortune."""

    def kill(self, number: int) -> None:
        if self.process.exitcode is None and self.process.pid is not None:
            self.sent.add(number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def receive(self) -> None:
        """Take the rank's message if it is there; a rank that died while it wrote one has none."""
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            if self.message is None and self.messages.poll():
                self.message = self.messages.recv()

    @property
    def died_of(self) -> signal.Signals | None:
        code = self.process.exitcode
        return signal.Signals(-code) if code is not None and code < 0 and -code not in self.sent else None

    @property
    def failed(self) -> bool:
        code = self.process.exitcode
        return bool(self.message and self.message.error) or (code is not None and code > 0) or bool(self.died_of)


class _Ranks:
    """The processes of one `run_ranks` call, from fork to the last one's end."""

    def __init__(self, jobs: Sequence[RankJob], grace: float) -> None:
        self.jobs, self.grace = jobs, grace
        self.ranks: list[_Rank] = []
        self.stopped_by: signal.Signals | None = None
        self.deadline: float | None = None

    def run(self) -> Outcome:
        guarded = [*STOP_SIGNALS]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it, and should keep doing so
            guarded.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._forward) for number in guarded}
        try:
            self._start(guarded)
            self._watch()
        finally:
            self._end_all()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._outcome()

    def _start(self, guarded: Sequence[signal.Signals]) -> None:
        context = multiprocessing.get_context("fork")
        sys.stdout.flush()
        sys.stderr.flush()
        for job in self.jobs:
            receiver, sender = context.Pipe(duplex=False)
            # A signal between fork and the rank's own handlers would get lost in a copy of ours.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, guarded)
            try:
                process = context.Process(target=run_rank, args=(job, sender), name=f"rank{job.rank}")
                process.start()
                sender.close()
                self.ranks.append(_Rank(process, receiver))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if self.stopped_by:
                self.ranks[-1].kill(signal.SIGTERM)

    def _watch(self) -> None:
        while running := [rank for rank in self.ranks if rank.process.exitcode is None]:
            # Short waits: a helper process of a dead rank may hold the pipe that would tell of its death.
            open_pipes = [rank.messages for rank in running if rank.message is None]
            wait([*open_pipes, *(rank.process.sentinel for rank in running)], timeout=_POLL_SECONDS)
            for rank in self.ranks:
                rank.receive()
            if self.deadline is None and any(rank.failed for rank in self.ranks):
                self.deadline = time.monotonic() + self.grace
                for rank in running:
                    rank.kill(signal.SIGTERM)
            if self.deadline is not None and time.monotonic() > self.deadline:
                for rank in running:
                    rank.kill(signal.SIGKILL)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        again = self.stopped_by is not None
        self.stopped_by = self.stopped_by or signal.Signals(number)
        if not again:
            print(f"mopd: {self.stopped_by.name}: saving and leaving; again to kill", file=sys.stderr)
        for rank in self.ranks:
            rank.kill(signal.SIGKILL if again else signal.SIGTERM)

    def _end_all(self) -> None:
        for rank in self.ranks:
            rank.kill(signal.SIGKILL)
            rank.process.join()
            rank.receive()
            rank.messages.close()
            # What a rank has started itself (checkpoint writers) is in its group and goes with it.
            if rank.process.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(rank.process.pid, signal.SIGKILL)

    def _outcome(self) -> Outcome:
        # Stopped so early that a rank had no StopFlag yet: what its peers then say about it is no failure.
        abandoned = self.stopped_by and any(r.process.exitcode == -signal.SIGTERM for r in self.ranks)
        code = 0 if abandoned else _report_failure(self.jobs, self.ranks)
        if code:
            return Outcome(exit_code=code, stopped_by=self.stopped_by)
        message = self.ranks[0].message
        result = pickle.loads(message.result) if message and message.result else None
        code = 128 + self.stopped_by if self.stopped_by else 0
        return Outcome(exit_code=code, result=result, stopped_by=self.stopped_by)


def _report_failure(jobs: Sequence[RankJob], ranks: Sequence[_Rank]) -> int:
    """Print the first failure, its traceback and then one line; return the exit code, 0 without failure."""
    failed = [index for index, rank in enumerate(ranks) if rank.failed]
    if not failed:
        return 0
    killed = [index for index in failed if ranks[index].died_of]
    errors = [(message.time, index) for index in failed if (message := ranks[index].message)]
    # A rank that was killed cannot say so, and its peers' complaints about it come first.
    first = killed[0] if killed else min(errors)[1] if errors else failed[0]
    message, number, log_file = ranks[first].message, ranks[first].died_of, jobs[first].log_file
    others = "; the other ranks were stopped" if len(ranks) > 1 else ""
    if number:
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        where = f"; see {log_file}" if log_file else ""
        line, code = f"rank {first} was killed by {number.name}{hint}{others}{where}", 128 + number
    elif message and message.trace:
        line, code = f"rank {first} failed: {message.error}{others}", EXIT_FAILED
        print(message.trace, file=sys.stderr, end="")
    elif message:
        line, code = f"error: {message.error}", EXIT_CONFIG
    else:
        line, code = f"rank {first} ended with exit code {ranks[first].process.exitcode}{others}", EXIT_FAILED
    print(f"mopd: {line}", file=sys.stderr, flush=True)
    return code

"""The inside of one rank that `launch.run_ranks` forked: its environment, its end, and its last message."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_mopd.signals import STOP_SIGNALS
from megatron_mopd.yaml_config import ConfigError

EXIT_FAILED = 1
EXIT_CONFIG = 2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMessage:
    """What a rank says at its end: its result, or what went wrong."""

    rank: int
    time: float
    """Monotonic seconds, comparable between ranks of one machine: tells the first failure from its echoes."""
    result: bytes = b""
    """Pickled; only rank 0 sends one."""
    error: str | None = None
    """One line."""
    trace: str | None = None
    """None for a ConfigError, whose one line says it all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankJob:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    rank: int
    ranks: int
    port: int
    log_file: Path | None
    """Where stdout and stderr of this rank go; None leaves them on the terminal."""
    parent: int
    """Process id of the launcher."""


def run_rank(job: RankJob, messages: Connection) -> None:
    """Body of a forked rank. Leaves through SystemExit with a code, or returns when all went well."""
    _follow_parent(job.parent)
    _own_signals()
    _set_environment(job)
    if job.log_file is not None:
        _redirect(job.log_file)
    faulthandler.enable(file=2)
    try:
        result = job.function(*job.arguments)
        payload = pickle.dumps(result) if job.rank == 0 else b""
    except ConfigError as error:
        _fail(job, messages, EXIT_CONFIG, str(error), None)
    except (Exception, KeyboardInterrupt) as error:
        last = "".join(traceback.format_exception_only(error)).strip()
        _fail(job, messages, EXIT_FAILED, last, traceback.format_exc())
    else:
        messages.send(RankMessage(rank=job.rank, time=time.monotonic(), result=payload))


def _fail(job: RankJob, messages: Connection, code: int, error: str, trace: str | None) -> None:
    line = " ".join(error.split())
    messages.send(RankMessage(rank=job.rank, time=time.monotonic(), error=line, trace=trace))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: its clean-up would wait for helpers and for peers that will never answer.
    os._exit(code)


def _follow_parent(parent: int) -> None:
    """Die when the launcher dies, also of kill -9. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_FAILED)


def _own_signals() -> None:
    """Own process group: the terminal's Ctrl-C reaches the launcher only, which forwards it once."""
    os.setpgid(0, 0)
    for number in (*STOP_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, signal.SIGHUP))


def _set_environment(job: RankJob) -> None:
    os.environ |= {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.rank),
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_WORLD_SIZE": str(job.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.port),
    }
    if sys.platform == "linux":
        # Otherwise gloo looks the machine's own name up, which need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _redirect(log_file: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    # Line by line, so that the log of a rank that gets killed is complete.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)

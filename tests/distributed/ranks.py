"""Run one function on several real ranks: forked processes, gloo over the loopback interface, a bounded wait.

    results = run_ranks(work, 4, "argument")          # [work("argument") of rank 0, of rank 1, ...]

Ranks are forked, so a parent that has imported torch and Megatron starts them in milliseconds, and `function`
may be a closure. Results travel as plain pickles: return tensors, arrays, numbers, not modules or groups.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

GRACE_SECONDS = 2.0
"""How long the other ranks may go on after the first has failed: their errors often tell more."""
PR_SET_PDEATHSIG = 1


class RankError(AssertionError):
    """One or more ranks raised, died or hung. The message holds each one's traceback."""


@dataclass
class _Rank:
    index: int
    pid: int
    pipe: Connection
    stacks: Path
    """Where the rank writes its stack on SIGUSR1, for the report of a hang."""
    result: Any = None
    error: str | None = None
    done: bool = False


def run_ranks[R](
    function: Callable[..., R], world_size: int, *args: Any, init: bool = True, timeout: float = 120.0
) -> list[R]:
    """Call `function(*args)` on `world_size` ranks and return their results in rank order.

    Args:
        init: create the default gloo process group before the call and destroy it after. With False,
            `function` does it (`start_world`). torchrun's variables (RANK, MASTER_PORT, ...) are always set.
        timeout: seconds until ranks that have not answered are killed and their stacks shown.

    Raises:
        RankError: with the traceback of every rank that failed.
    """
    host, port = _host_store()
    environment = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        try:
            for index in range(world_size):
                own = environment | {"RANK": str(index), "LOCAL_RANK": str(index)}
                ranks.append(_start(function, args, init, timeout, own, Path(folder) / f"{index}.txt"))
            _collect(ranks, timeout)
        finally:
            _stop(ranks)
            _kill(host)
    errors = [f"rank {rank.index} of {world_size}: {rank.error}" for rank in ranks if rank.error]
    if errors:
        raise RankError("\n" + "\n".join(errors))
    return [rank.result for rank in ranks]


def _host_store() -> tuple[int, int]:
    """(pid, port) of a process that serves the rendezvous on a port that the system chose.

    A process of its own: in a rank it would end with that rank, and with a server thread in the parent the
    forks that follow deadlock now and then.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listener.getsockname()[1]
    parent = os.getpid()
    pid = _fork()
    if pid == 0:
        try:
            _die_with(parent)
            store = dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno()
            )
            signal.pause()
            del store
        finally:
            os._exit(1)
    listener.close()
    return pid, port


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns of a fork beside other threads; those that are here are idle.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _die_with(parent: int) -> None:
    """A child must not outlive a test run that was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _start(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    init: bool,
    timeout: float,
    environment: dict[str, str],
    stacks: Path,
) -> _Rank:
    receiver, sender = Pipe(duplex=False)
    parent = os.getpid()
    pid = _fork()
    if pid == 0:
        receiver.close()
        _child(function, args, init, timeout, environment, stacks, sender, parent)
    sender.close()
    return _Rank(index=int(environment["RANK"]), pid=pid, pipe=receiver, stacks=stacks)


def _child(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    init: bool,
    timeout: float,
    environment: dict[str, str],
    stacks: Path,
    pipe: Connection,
    parent: int,
) -> NoReturn:
    status = 1
    try:
        _die_with(parent)
        faulthandler.register(signal.SIGUSR1, file=stacks.open("w"), all_threads=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(environment)
        # One thread: the parent's OpenMP pool did not survive the fork, and ranks share the cores anyway.
        torch.set_num_threads(1)
        if init:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        answer = (True, function(*args))
        if init:
            dist.destroy_process_group()
        status = 0
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        pipe.send_bytes(_pickle(answer))
    finally:
        # No exit handlers, no destructors: those of the parent's objects must not run twice.
        os._exit(status)


def _pickle(answer: tuple[bool, Any]) -> bytes:
    try:
        buffer = io.BytesIO()
        # Plain pickle: multiprocessing's own passes tensors in shared memory that dies with the rank.
        pickle.Pickler(buffer, protocol=5).dump(answer)
        return buffer.getvalue()
    except Exception:
        return pickle.dumps((False, f"the result cannot be pickled\n{traceback.format_exc()}"))


def _collect(ranks: list[_Rank], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while waiting := [rank for rank in ranks if not rank.done]:
        left = deadline - time.monotonic()
        ready = wait([rank.pipe for rank in waiting], timeout=max(0.0, left))
        if not ready:
            for rank in waiting:
                if not any(other.error for other in ranks if other.done):
                    rank.error = f"no answer after {timeout:g} s; it was at\n{_stack(rank)}"
            return
        for rank in waiting:
            if rank.pipe in ready:
                _receive(rank)
                if rank.error:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


def _receive(rank: _Rank) -> None:
    rank.done = True
    try:
        succeeded, value = pickle.loads(rank.pipe.recv_bytes())
    except EOFError:
        rank.error = "died without an answer (killed, out of memory, or crashed in native code)"
        return
    if succeeded:
        rank.result = value
    else:
        rank.error = str(value)


def _stack(rank: _Rank) -> str:
    os.kill(rank.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and not rank.stacks.read_text():
        time.sleep(0.02)
    return rank.stacks.read_text() or "(no stack was written)"


def _stop(ranks: list[_Rank]) -> None:
    for rank in ranks:
        _kill(rank.pid)
        rank.pipe.close()


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)  # not yet waited for, so the pid is still its own
    os.waitpid(pid, 0)

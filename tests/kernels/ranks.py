"""Real gloo ranks for the kernel tests: started once, then fed with functions. Every wait is bounded.

They come from a fork server that has imported torch and done nothing, so that a rank starts in milliseconds
and inherits neither threads nor autograd state from the test process.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MAX_RANKS = 8
COLLECTIVE_SECONDS = 20
RUN_SECONDS = 60


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=MAX_RANKS,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4, 8)}
    while True:
        request = pickle.loads(pipe.recv_bytes())
        if request is None:
            return
        size, function, arguments = request
        try:
            reply = (True, function(groups[size], *arguments))
        except Exception:
            reply = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))


class Ranks:
    """Up to `MAX_RANKS` processes; `run` calls a function on the first `size` of them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "pytest"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(MAX_RANKS):
            here, there = context.Pipe()
            store = str(Path(self.folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, store, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """[function(group, *arguments) of rank 0, 1, ...]; AssertionError with a failed rank's trace.

        TimeoutError when a rank does not answer; all are killed then, and further calls fail at once.
        """
        for pipe in self.pipes[:size]:
            pipe.send_bytes(pickle.dumps((size, function, arguments)))
        replies = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(RUN_SECONDS):
                self.kill()
                raise TimeoutError(f"rank {rank} of {size} did not answer within {RUN_SECONDS} s")
            replies.append(pickle.loads(pipe.recv_bytes()))
        failures = [f"rank {rank}:\n{value}" for rank, (good, value) in enumerate(replies) if not good]
        if failures:
            raise AssertionError("\n".join(failures))
        return [value for _, value in replies]

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(10)
        self.kill()
        self.folder.cleanup()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

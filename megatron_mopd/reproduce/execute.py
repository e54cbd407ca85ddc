"""Makes nodes: each by the command a user would type, in a process of its own, `workers` of them side by side.

The processes are forked from this one, which has imported torch and Megatron once and computes nothing: a command
then starts in a fraction of a second instead of ten. A node that was interrupted is given the same command again: a
run goes on from its newest checkpoint, the others start anew.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_mopd.environment import gpu_count
from megatron_mopd.launch import PRELOAD
from megatron_mopd.reproduce.beforehand import check_all
from megatron_mopd.reproduce.store import RECORD, StoredNode, write_json
from megatron_mopd.yaml_config import ConfigError, dump_yaml

Say = Callable[[str], None]
STOPPED = (130, 143)
"""Exit codes of a command that was stopped by a signal after it had saved."""
_PR_SET_PDEATHSIG = 1


def command_of(item: StoredNode, stored: Mapping[str, StoredNode]) -> list[str]:
    """The arguments of `mopd` that make the node."""
    file = str(item.folder / "node.yaml")
    arguments = list(item.node.arguments)
    if item.node.kind == "eval":
        arguments = ["--checkpoint", str(stored[item.node.inputs["--checkpoint"]].output), *arguments]
    elif item.node.kind == "sample":
        arguments = ["--out", str(item.output), *arguments]
    return [item.node.kind, file, *arguments]


def file_of(item: StoredNode, stored: Mapping[str, StoredNode]) -> dict[str, Any]:
    """The command's file: the node's, with the paths of its inputs and of its own folder."""
    paths = {key: str(stored[name].output) for key, name in item.node.inputs.items() if not key.startswith("--")}
    place = {"out": str(item.output)} if item.node.kind == "merge" else {"run_dir": str(item.folder)}
    tree: dict[str, Any] = _with_paths(item.node.tree, paths, "")
    return tree | place


def _with_paths(tree: Any, paths: Mapping[str, str], key: str) -> Any:
    if isinstance(tree, Mapping):
        return {name: _with_paths(value, paths, f"{key}.{name}" if key else name) for name, value in tree.items()}
    return paths.get(key, tree)


@dataclass
class _Running:
    item: StoredNode
    process: ForkProcess
    started: float


def execute(stored: Mapping[str, StoredNode], wanted: Sequence[str], workers: int, say: Say) -> int:
    """Make the nodes `wanted`, which are in order. Returns 0, or the exit code of the first that failed or stopped.

    SIGINT and SIGTERM are passed on once: runs save and leave. A second one kills. The first failure stops the
    others, which save what they have.
    """
    if not wanted:
        return 0
    if not gpu_count():  # as `launch` does: packages for CUDA may touch the device while they load
        for module in PRELOAD:
            importlib.import_module(module)
    check_all({name: item.node for name, item in stored.items()}, wanted)
    return _Workers(stored, wanted, workers, say).run()


class _Workers:
    def __init__(self, stored: Mapping[str, StoredNode], wanted: Sequence[str], workers: int, say: Say):
        self.stored, self.workers, self.say = stored, workers, say
        self.waiting = list(wanted)
        self.total, self.finished = len(wanted), 0
        self.running: list[_Running] = []
        self.exit_code = 0
        self.signals = 0

    def run(self) -> int:
        with self._signals_passed_on():
            while self.running or (self.waiting and not self.exit_code):
                self._start_ready()
                wait([running.process.sentinel for running in self.running], timeout=0.5)
                for running in [running for running in self.running if running.process.exitcode is not None]:
                    self.running.remove(running)
                    self._ended(running)
        return self.exit_code

    def _start_ready(self) -> None:
        for name in list(self.waiting):
            if len(self.running) >= self.workers or self.exit_code:
                return
            item = self.stored[name]
            if all(self.stored[needed].is_done for needed in item.node.inputs.values()):
                self.waiting.remove(name)
                self.running.append(_start(item, self.stored))

    def _ended(self, running: _Running) -> None:
        item, code = running.item, running.process.exitcode or 0
        seconds = time.monotonic() - running.started
        if code == 0:
            try:
                _finish(item, seconds)
            except ConfigError as error:
                self.say(f"mopd: {item.node.name}: {error}; log: {item.folder / 'log.txt'}")
                code = 1
        if code == 0:
            self.finished += 1
            self.say(f"[{self.finished}/{self.total}] {item.node.name} {seconds:.0f} s")
            return
        if self.exit_code == 0:
            self.exit_code = code if code > 0 else 128 - code
            stopped = self.signals or self.exit_code in STOPPED
            verb = "stopped" if stopped else f"failed with exit code {self.exit_code}{_last_line(item)}"
            self.say(f"mopd: {item.node.name} {verb}; log: {item.folder / 'log.txt'}")
        self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        for running in self.running:
            with suppress(ProcessLookupError):
                os.kill(running.process.pid or 0, number)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def forward(number: int, frame: FrameType | None) -> None:
            self.signals += 1
            self.exit_code = self.exit_code or 128 + number
            if self.signals == 1:
                self.say("mopd: saving and leaving; again to kill")
            self._pass_on(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

        previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._pass_on(signal.SIGKILL)


def _start(item: StoredNode, stored: Mapping[str, StoredNode]) -> _Running:
    item.folder.mkdir(parents=True, exist_ok=True)
    if item.node.kind == "sample":  # complete, but killed before node.json was: the command overwrites nothing
        item.output.unlink(missing_ok=True)
    (item.folder / "node.yaml").write_text(dump_yaml(file_of(item, stored)), encoding="utf-8")
    arguments = command_of(item, stored)
    with (item.folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"$ mopd {shlex.join(arguments)}\n")
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal between the fork and the child's own handlers would run a copy of ours.
    signals = (signal.SIGINT, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        process = context.Process(target=_command, args=(arguments, item.folder, item.node.kind, os.getpid()))
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _Running(item=item, process=process, started=time.monotonic())


def _command(arguments: list[str], folder: Path, kind: str, parent: int) -> None:
    """Body of the forked process: becomes `mopd` with these arguments. Dies with its parent, also of kill -9."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND)
    result = log if kind != "eval" else os.open(folder / "result.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(result, 1)
    os.dup2(log, 2)
    from megatron_mopd.cli import main

    sys.exit(main(arguments))


def _finish(item: StoredNode, seconds: float) -> None:
    """Check the output and write node.json. Raises ConfigError when the command did not leave what it should."""
    if item.node.kind == "eval":
        (item.folder / "result.tmp").replace(item.output)
    if not item.output.exists():
        raise ConfigError(f"{item.output}: was not written")
    record = {
        "name": item.node.name,
        "hash": item.made_of.hash,
        "made_of": item.made_of.as_json(),
        "seconds": round(seconds, 3),
        "compute": _compute(item, seconds),
    }
    write_json(item.folder / RECORD, record)


def _compute(item: StoredNode, seconds: float) -> dict[str, float]:
    from megatron_mopd.compute import Compute, read_compute  # imports torch, as this process has by now

    if item.node.kind in ("run", "sample"):
        return read_compute(item.folder if item.node.kind == "run" else item.output).as_json()
    return Compute(seconds=seconds if item.node.kind == "merge" else 0.0).as_json()


def _last_line(item: StoredNode) -> str:
    lines = (item.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f": {lines[-1].removeprefix('mopd: ')}" if lines else ""

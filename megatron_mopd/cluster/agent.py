"""torchrun for a batch job: `python -m megatron_mopd.cluster.agent --attempt DIR -- TORCHRUN ARGUMENTS...`.

torchrun ends its workers 30 seconds after SIGTERM and dies of SIGUSR1 itself. A rank that was asked to stop must finish
its step and write a checkpoint, which takes as long as it takes: Slurm sets the limit. So this asks the workers to
stop, and waits. Two ways lead to a stop: a signal, and the file `stop` in the attempt's folder, which also reaches
ranks that were still starting when the signal came.

At its end it leaves the file `no-restart` there when a worker's exit code says that trying again is useless.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_mopd.rank_process import EXIT_CONFIG

EXIT_NO_RESTART = 93
"""Of a rank or a job: do not start it again. The number that NVIDIA's fault-tolerance launcher uses."""
STOP, NO_RESTART = "stop", "no-restart"
_POLL_SECONDS = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with the arguments after `--`. Returns the exit code of the worker that failed first, or 0."""
    parser = argparse.ArgumentParser(prog="agent", description=__doc__.splitlines()[0])
    parser.add_argument("--attempt", type=Path, required=True, help="folder of this attempt, on shared storage")
    parser.add_argument("torchrun", nargs="+", metavar="ARGUMENT")
    arguments = parser.parse_args(argv)
    # Before torch is imported, which takes seconds: Slurm may signal at once.
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: _request(stopping, number, frame))
    threading.Thread(target=_stop_workers, args=(stopping, arguments.attempt / STOP), daemon=True).start()

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments.torchrun]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _report(rank, failure.exitcode, arguments.attempt)
    return 0


def _request(stopping: threading.Event, number: int, frame: FrameType | None) -> None:
    stopping.set()


def _report(rank: int, code: int, attempt: Path) -> int:
    """Say how the worker ended and return an exit code for it."""
    where = f"rank {rank} on {socket.gethostname()}"
    log = attempt / f"rank{rank}.log"
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        print(f"mopd: {where} was killed by {signal.Signals(-code).name}{hint}; see {log}", file=sys.stderr)
        return 128 - code
    print(f"mopd: {where} ended with exit code {code}; see {log}", file=sys.stderr)
    if code in (EXIT_CONFIG, EXIT_NO_RESTART):
        (attempt / NO_RESTART).write_text(f"{where} ended with exit code {code}; see {log}\n", encoding="utf-8")
        return EXIT_NO_RESTART
    return code


def _stop_workers(stopping: threading.Event, file: Path) -> None:
    """Once a stop is asked for, send every worker SIGUSR1, each as soon as it has a handler for it."""
    told: set[int] = set()
    while not stopping.wait(_POLL_SECONDS) and not file.exists():
        pass
    pause = threading.Event()
    while not pause.wait(_POLL_SECONDS):
        for pid in _children():
            if pid not in told and _catches(pid, signal.SIGUSR1):
                told.add(pid)
                os.kill(pid, signal.SIGUSR1)


def _children() -> list[int]:
    # Workers are started by the main thread.
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether process `pid` has installed a handler: without one the signal would kill it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line for line in lines if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


if __name__ == "__main__":
    sys.exit(main())

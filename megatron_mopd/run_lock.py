"""One process at a time in a run folder. Imports no torch: the launcher of many runs locks its folder too."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from megatron_mopd.yaml_config import ConfigError


def lock_run_folder(folder: Path) -> TextIO:
    """Hold `folder` for as long as the returned file is open. Raises ConfigError when another run does.

    Two runs in one folder would delete each other's unfinished checkpoints.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir: {folder} cannot be written: {error.strerror}; choose another folder") from None
    take_lock(file, f"run_dir: {folder}", "is in use by")
    return file


def take_lock(file: TextIO, what: str, verb: str) -> None:
    """Lock `file`, and write into it who has it. Raises ConfigError, '<what> <verb> <process>', when another does.

    The kernel drops the lock with the process, however it ends. The file is closed where it cannot be locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "an unknown process"
        file.close()
        raise ConfigError(f"{what} {verb} {holder}; wait for it, or choose another folder") from None
    except OSError as error:
        file.close()
        raise ConfigError(f"{what} cannot be locked: {error.strerror}; use another file system") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()

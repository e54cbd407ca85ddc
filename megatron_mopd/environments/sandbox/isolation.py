"""The ways to shut a process in, strongest first, each as the command that does it. Pure: nothing is started here."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Isolation = Literal["bubblewrap", "namespaces", "landlock", "none"]

ISOLATIONS: tuple[Isolation, ...] = ("bubblewrap", "namespaces", "landlock")
"""In the order in which they are tried; `none` is only ever used when it is asked for.

bubblewrap: the program bwrap · namespaces: the same from the standard library (`namespaces.py`) · landlock: for
containers that may make no namespaces; the snippet can write no file at all."""

_HERE = Path(__file__).parent
_INSIDE = _HERE / "inside"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32")
_LOADER = ("/etc/ld.so.cache",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What of this machine a snippet can see: an interpreter with its packages and the system's libraries."""

    interpreter: str
    packages: tuple[str, ...]
    """Folders for sys.path: the site-packages of the environment that this program runs in."""
    folders: tuple[str, ...]
    files: tuple[str, ...]
    links: Mapping[str, str]
    """Symbolic links at the root: /bin -> usr/bin, where the machine has merged them."""

    @classmethod
    def here(cls) -> Place:
        """Of the running interpreter."""
        packages = tuple(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
        system = [path for path in _SYSTEM if os.path.isdir(path)]
        folders = [path for path in system if not os.path.islink(path)]
        for path in (sys.base_prefix, *packages):
            if not any(Path(path).is_relative_to(folder) for folder in folders):
                folders.append(path)
        return cls(
            interpreter=os.path.realpath(sys.executable),
            packages=packages,
            folders=tuple(folders),
            files=tuple(path for path in _LOADER if os.path.isfile(path)),
            links={path: os.readlink(path) for path in system if os.path.islink(path)},
        )


def command(
    isolation: Isolation, place: Place, *, scratch_bytes: int, settings: Mapping[str, object], ready: int
) -> list[str]:
    """The command line that runs standard input as a snippet. ready: the descriptor that inside/run.py writes to."""
    alone = isolation in ("landlock", "none")
    script = str(_INSIDE / "run.py") if alone else "/sandbox/run.py"
    inner = [place.interpreter, "-I", "-S", script, json.dumps(settings), str(ready)]
    if isolation == "bubblewrap":
        return [*_bubblewrap(place, scratch_bytes), *inner]
    if isolation == "namespaces":
        tree = {
            "folders": place.folders,
            "files": place.files,
            "links": place.links,
            "inside": str(_INSIDE),
            "scratch_bytes": scratch_bytes,
        }
        return [sys.executable, "-I", "-S", str(_HERE / "namespaces.py"), json.dumps(tree), *inner]
    return inner


def readable(place: Place) -> list[str]:
    """What Landlock leaves to a snippet."""
    folders = [*place.folders, *(path for path in place.links if os.path.isdir(path))]
    return [*folders, *place.files, str(_INSIDE), *_DEVICES]


def _bubblewrap(place: Place, scratch_bytes: int) -> list[str]:
    program = shutil.which("bwrap") or "bwrap"
    arguments = [program, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        # Without a user namespace: in one, root could only be mapped to root, which no process limit binds.
        kinds = ("pid", "net", "ipc", "uts", "cgroup-try")
        arguments[1:2] = [f"--unshare-{kind}" for kind in kinds]
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments += ["--uid", "65534", "--gid", "65534"]
    # Made here, as bwrap would make them for its own user alone.
    parents = {str(parent): None for path in place.folders for parent in reversed(Path(path).parents)}
    for path in (*parents, "/etc", "/dev"):
        arguments += ["--perms", "0755", "--dir", path]
    for path in (*place.folders, *place.files):
        arguments += ["--ro-bind", path, path]
    for path, target in place.links.items():
        arguments += ["--symlink", target, path]
    for path in _DEVICES:
        arguments += ["--dev-bind", path, path]
    arguments += ["--ro-bind", str(_INSIDE), "/sandbox", "--proc", "/proc"]
    arguments += ["--perms", "1777", "--size", str(scratch_bytes), "--tmpfs", "/scratch", "--chdir", "/scratch"]
    return [*arguments, "--remount-ro", "/", "--"]


def missing(isolation: Isolation) -> str | None:
    """In words, what this machine visibly lacks for it; None where only a trial can tell."""
    if isolation == "bubblewrap" and shutil.which("bwrap") is None:
        return "no program bwrap on PATH"
    return None


def user_of(isolation: Isolation, free_user: int) -> int | None:
    """The user that a sandbox made by root is to become; None: it stays what it is."""
    return free_user if isolation in ("bubblewrap", "namespaces") and os.getuid() == 0 else None


def environment(isolation: Isolation) -> dict[str, str]:
    """All that a snippet finds in os.environ: nothing of this process's."""
    home = "/scratch" if isolation in ("bubblewrap", "namespaces") else "/nonexistent"
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }

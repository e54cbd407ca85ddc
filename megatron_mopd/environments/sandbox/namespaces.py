"""A sandbox from Linux namespaces with the standard library alone, for machines without bubblewrap.

    python -I -S namespaces.py '{"folders": [...], "files": [...], "inside": ..., "scratch_bytes": ...}' COMMAND...

Started by `Sandbox`, never imported by it. Runs COMMAND in namespaces of its own (processes, mounts, network, IPC, host
name, control groups; users too, where not started by root), in a root that holds `folders` and `files` of the machine,
read-only at their own paths, `inside` at /sandbox, and an empty /scratch in memory. Ends with COMMAND's exit code
(128 + the signal that ended it), and everything in there ends with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress

# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
MS_NOATIME, MS_NODIRATIME, MS_RELATIME = 1024, 2048, 1 << 21
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
ROOT = "/tmp"
"""Where the new root is put together: a folder that every machine has; covered in our mount namespace only."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    check(libc.mount(*encoded, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def enter_namespaces() -> None:
    """New ones of every kind; the next child is process 1 of the new process namespace."""
    flags = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS | os.CLONE_NEWCGROUP
    user, group = os.getuid(), os.getgid()
    if user == 0:
        os.unshare(flags)
        return
    os.unshare(flags | os.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


KEPT = {os.ST_NOSUID: MS_NOSUID, os.ST_NODEV: MS_NODEV, os.ST_NOEXEC: MS_NOEXEC, os.ST_NOATIME: MS_NOATIME,
        os.ST_NODIRATIME: MS_NODIRATIME, os.ST_RELATIME: MS_RELATIME}  # fmt: skip
"""What a user namespace may not take off a mount, and has to name again when it makes it read-only."""


def bind(descriptor: int, path: str) -> None:
    """Show the open file or folder at `path` of the new root, read-only, without what is mounted below it."""
    source, target = f"/proc/self/fd/{descriptor}", ROOT + path
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_RDONLY))
    mount(source, target, None, MS_BIND)
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | (0 if path in DEVICES else MS_NODEV)
    came_with = os.statvfs(target).f_flag
    for shown, flag in KEPT.items():
        flags |= flag if came_with & shown else 0
    mount("none", target, None, flags)
    os.close(descriptor)


def make_root(settings: dict) -> None:
    """Put the new root together and leave the old one."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    # Opened before ROOT is covered: folders below it can still be shown.
    sources = {path: os.open(path, os.O_PATH) for path in (*settings["folders"], *settings["files"], *DEVICES)}
    sources["/sandbox"] = os.open(settings["inside"], os.O_PATH)
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.chdir(ROOT)
    for path, descriptor in sources.items():
        bind(descriptor, path)
    for path, target in settings["links"].items():
        os.symlink(target, ROOT + path)
    os.mkdir(ROOT + "/scratch")
    data = f"size={settings['scratch_bytes']},nr_inodes=4096,mode=1777"
    mount("tmpfs", ROOT + "/scratch", "tmpfs", MS_NOSUID | MS_NODEV, data)
    os.mkdir(ROOT + "/proc")
    with suppress(PermissionError):  # a container may hide parts of /proc, and then nobody may mount it: without it
        mount("proc", ROOT + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.mkdir(ROOT + "/.old")
    check(libc.syscall(PIVOT_ROOT[os.uname().machine], ROOT.encode(), (ROOT + "/.old").encode()), "pivot_root")
    os.chdir("/")
    check(libc.umount2(b"/.old", MNT_DETACH), "umount2")
    os.rmdir("/.old")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/scratch")


def die_with_parent() -> None:
    check(libc.prctl(PR_SET_PDEATHSIG, *(ctypes.c_ulong(n) for n in (signal.SIGKILL, 0, 0, 0))), "prctl")


def exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def wait_for(child: int) -> int:
    """The exit code of `child`; reaps the orphans that process 1 is given."""
    while True:
        process, status = os.wait()
        if process == child:
            return exit_code(status)


def first_process(settings: dict, command: list[str]) -> int:
    """Process 1: with it every other process of the namespace ends."""
    die_with_parent()
    make_root(settings)
    child = os.fork()
    if child == 0:
        os.execv(command[0], command)
    return wait_for(child)


def main(arguments: list[str]) -> int:
    settings, command = json.loads(arguments[0]), arguments[1:]
    die_with_parent()
    enter_namespaces()
    child = os.fork()
    if child == 0:
        os._exit(first_process(settings, command))
    return wait_for(child)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except OSError as error:
        print(f"namespaces: {error.strerror or error}", file=sys.stderr)
        code = 125
    os._exit(code)

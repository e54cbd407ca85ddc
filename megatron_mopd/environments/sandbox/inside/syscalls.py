"""The seccomp filter of a snippet: one process, no network, no signals to others, no new namespaces.

Runs inside the sandbox with nothing but the standard library. Everything that is not named here stays allowed: files
are the business of the mount namespace or Landlock, memory and time that of the resource limits.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

# linux/prctl.h, linux/seccomp.h, linux/filter.h, linux/audit.h
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_ANY_BIT, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, FIRST_ARGUMENT_HIGH = 0, 4, 16, 20
CLONE_THREAD = 0x00010000
CAPABILITY_VERSION_3 = 0x20080522
HIGHEST_KNOWN = 467
"""System calls that came later are refused: this file does not know what they do."""


@dataclass(frozen=True)
class Machine:
    """A processor's audit number and the column of its system calls in the tables below."""

    audit: int
    column: int


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}

SIGNALS = {"kill": (62, 129), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)}
"""Allowed where the first argument is the snippet's own process."""

CLONE, CLONE3 = (56, 220), (435, 435)

REFUSED: dict[str, tuple[int | None, int | None]] = {
    # processes, and other processes
    "fork": (57, None),
    "vfork": (58, None),
    "tkill": (200, 130),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    # network; io_uring opens sockets without a system call of its own
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # memory that no resource limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # namespaces, mounts and the kernel's own doors
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "fanotify_init": (300, 262),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
}

CHANGES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "truncate": (76, 45),
}
"""What changes a file without opening it, and Landlock lets pass: refused where files are those of the machine."""


def build_filter(machine: Machine, process: int, *, own_files: bool) -> bytes:
    """The BPF program, 8 bytes an instruction, for a snippet that is `process` in its own namespace.

    own_files: whether all files that it can write to are its own.
    """
    column = machine.column
    program = [
        _instruction(LOAD, ARCHITECTURE),
        _instruction(JUMP_EQUAL, machine.audit, 1, 0),
        _instruction(RETURN, RET_KILL_PROCESS),  # 32-bit calls have other numbers
        _instruction(LOAD, NUMBER),
        # glibc falls back to clone, whose flags can be read here; x32's numbers lie above too.
        *_refuse(CLONE3[column], errno.ENOSYS),
        _instruction(JUMP_AT_LEAST, HIGHEST_KNOWN + 1, 0, 1),
        _instruction(RETURN, RET_ERRNO | errno.ENOSYS),
    ]
    for numbers in (*REFUSED.values(), *(() if own_files else CHANGES.values())):
        number = numbers[column]
        if number is not None:
            program += _refuse(number, errno.EPERM)
    program += [
        _instruction(JUMP_EQUAL, CLONE[column], 0, 4),
        _instruction(LOAD, FIRST_ARGUMENT),
        _instruction(JUMP_ANY_BIT, CLONE_THREAD, 1, 0),
        _instruction(RETURN, RET_ERRNO | errno.EPERM),
        _instruction(RETURN, RET_ALLOW),
    ]
    for signal_numbers in SIGNALS.values():
        program += [
            _instruction(JUMP_EQUAL, signal_numbers[column], 0, 4),
            # The kernel takes a pid as 32 bits; what stands above them does not matter.
            _instruction(LOAD, FIRST_ARGUMENT),
            _instruction(JUMP_EQUAL, process, 1, 0),
            _instruction(RETURN, RET_ERRNO | errno.EPERM),
            _instruction(RETURN, RET_ALLOW),
        ]
    return b"".join([*program, _instruction(RETURN, RET_ALLOW)])


def _refuse(number: int, code: int) -> list[bytes]:
    return [_instruction(JUMP_EQUAL, number, 0, 1), _instruction(RETURN, RET_ERRNO | code)]


def _instruction(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, when_true, when_false, value)


def install_filter(*, own_files: bool) -> None:
    """See `build_filter`; for this process and for good, after `drop_privileges`.

    Raises OSError where the kernel or the processor has no such filter.
    """
    machine = MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"no system-call filter for {platform.machine()}")
    program = build_filter(machine, os.getpid(), own_files=own_files)
    text = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(text)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))


def drop_privileges() -> None:
    """Give up all capabilities, and the right to gain any by executing a program."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = ctypes.create_string_buffer(struct.pack("<Ii", CAPABILITY_VERSION_3, 0), 8)
    nothing = ctypes.create_string_buffer(24)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def prctl(option: int, first: int, second: int = 0) -> None:
    """Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *(ctypes.c_ulong(value) for value in (first, second, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

"""Landlock: a process gives up every file but some that it may read, without privileges or namespaces.

Runs inside the sandbox with nothing but the standard library. linux/landlock.h; Linux 5.13 and later.
"""

from __future__ import annotations

import ctypes
import os
import struct

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
GET_VERSION, PATH_BENEATH = 1, 1
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many rights on files each version knows; later ones add none."""


def version() -> int:
    """Of the kernel's Landlock; 0 where it has none or it is switched off."""
    found = _libc().syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(GET_VERSION))
    return max(0, int(found))


def restrict_to(readable: list[str]) -> None:
    """Leave this process the files beneath `readable`, to be read and executed, for good.

    It must have given up to gain privileges (PR_SET_NO_NEW_PRIVS). Raises OSError.
    """
    known = version()
    handled = (1 << RIGHTS_BY_VERSION[min(max(known, 1), 5)]) - 1
    attributes = ctypes.create_string_buffer(struct.pack("<Q", handled), 8)
    ruleset = _call(CREATE_RULESET, attributes, ctypes.c_size_t(8), ctypes.c_uint(0))
    for path in readable:
        rights = EXECUTE | READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("<Qi", rights & handled, parent), 12)
        _call(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, ctypes.c_uint(0))
        os.close(parent)
    _call(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = _libc().syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)

"""Snippets that want to do harm. What must not be possible prints ESCAPED; {names} are filled in by the tests."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Hostile:
    code: str
    endings: Collection[str] = ("ok", "error")
    says: str = ""
    """What its output must contain: the refusal itself, so that a snippet which never got there is noticed."""
    free: bool = False
    """Whether it prints ESCAPED without isolation from files, which shows that it could."""


_TRY = """
def attempt(what):
    try:
        result = what()
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        print(type(error).__name__, getattr(error, "errno", ""))
    else:
        print("ESCAPED", result)
"""

SNIPPETS = {
    "fork bomb": Hostile("import os\nwhile True: os.fork()", ("error",), "PermissionError"),
    "fork bomb of a shell": Hostile(
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'f() {{ f | f & }}; f; echo ESCAPED'])",
        ("error", "ok", "killed"),
        "fork",
    ),
    "thread bomb": Hostile(
        "import threading, time\nthreading.stack_size(32768)\ncount = 0\ntry:\n  while True:\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n    count += 1\n"
        "except RuntimeError:\n  print('few' if count <= 64 else 'many')",
        ("ok",),
        "few",
    ),
    "endless loop": Hostile("while True: pass", ("timeout",)),
    "endless loop in C that no signal ends": Hostile(
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\n10 ** 10 ** 9",
        ("timeout", "killed", "error"),
    ),
    "sleeps": Hostile("import time\ntime.sleep(3600)", ("timeout",)),
    "goes on without output": Hostile("import os\nos.close(1); os.close(2)\nwhile True: pass", ("timeout",)),
    "10 GB at once": Hostile("bytearray(10 << 30)", ("error",), "MemoryError"),
    "memory bit by bit": Hostile("hoard = []\nwhile True: hoard.append(bytearray(1 << 20))", ("error",), "MemoryError"),
    "memory in files without a name": Hostile(_TRY + "import os\nattempt(lambda: os.memfd_create('x'))", ("ok",), "1"),
    "shared memory": Hostile(_TRY + "attempt(lambda: open('/dev/shm/{mark}', 'w'))", ("ok",), "Error"),
    "raises its limits": Hostile(
        _TRY + "import resource as r\nattempt(lambda: r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2))",
        ("ok",),
        "Error",
    ),
    "connects to this machine": Hostile(
        _TRY + "import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', {port}), 2))", ("ok",), "Error"
    ),
    "sends a datagram": Hostile(
        _TRY + "import socket\nattempt(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('{host}', {port})))",
        ("ok",),
        "PermissionError 1",
    ),
    "connects to a local socket": Hostile(
        _TRY + "import socket\nattempt(lambda: socket.socket(socket.AF_UNIX).connect('{local}'))", ("ok",), "Error"
    ),
    "opens sockets through io_uring": Hostile(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint('ESCAPED' if libc.syscall(425, 8, "
        "ctypes.create_string_buffer(120)) >= 0 else ctypes.get_errno())",
        ("ok",),
        "1",
    ),
    "reads passwords": Hostile(
        _TRY + "for name in ('passwd', 'shadow', 'hostname'): attempt(lambda: open('/etc/' + name).read())",
        ("ok",),
        "Error",
        free=True,
    ),
    "reads a file of ours": Hostile(_TRY + "attempt(lambda: open('{secret}').read())", ("ok",), "Error", free=True),
    "reads through a symbolic link": Hostile(
        _TRY + "import os\ntry: os.symlink('{secret}', 'link')\nexcept OSError: pass\n"
        "attempt(lambda: open('link').read())\nattempt(lambda: open('../../../../../..{secret}').read())\n",
        ("ok",),
        "Error",
        free=True,
    ),
    "reads through /proc": Hostile(
        _TRY + "for who in ('1', 'self', '{pid}'):\n  for way in ('root', 'cwd'):\n"
        "    attempt(lambda: open(f'/proc/{{who}}/{{way}}{secret}').read())",
        ("ok",),
        "Error",
        free=True,
    ),
    "walks /proc for the environment of others": Hostile(
        "import os, pathlib\nseen = [os.environ.get('MOPD_TEST_SECRET', '')]\n"
        "for path in pathlib.Path('/proc').glob('*/environ'):\n"
        "  try: seen.append(path.read_text())\n  except OSError: pass\n"
        "print('ESCAPED' if any('{mark}' in text for text in seen) else 'nothing')",
        ("ok", "error"),
    ),
    "writes outside": Hostile(
        _TRY + "for folder in ('{folder}', '/tmp', '/usr', '/', '/dev', '/sandbox', '/var/tmp'):\n"
        "  attempt(lambda: open(folder + '/{mark}', 'w'))",
        ("ok",),
        "Error",
        free=True,
    ),
    "changes what it cannot write": Hostile(
        _TRY + "import os\nfor path in (os.__file__, '{secret}'):\n"
        "  attempt(lambda: os.chmod(path, 0o644))\n  attempt(lambda: os.utime(path))\n"
        "  attempt(lambda: os.chown(path, -1, -1))\n  attempt(lambda: os.truncate(path, os.stat(path).st_size))\n"
        "attempt(lambda: os.unlink('{secret}'))",
        ("ok",),
        "Error",
    ),
    "fills the disk": Hostile(
        "total = 0\ntry:\n  for n in range(100):\n    with open(f'file{{n}}', 'wb', buffering=0) as file:\n"
        "      while True: total += file.write(b'x' * (1 << 18))\nexcept OSError as error:\n"
        "  print('ESCAPED' if total > {scratch} else 'full', error.errno)",
        ("ok",),
        "full",
    ),
    "floods its output": Hostile("while True: print('x' * 1000)", ("output",), "xxx"),
    "kills its parent": Hostile(
        _TRY + "import os\nfor who in (os.getppid(), 1, -1, 0, {pid}): attempt(lambda: os.kill(who, 9))",
        ("ok",),
        "Error",
    ),
    "kills from a thread's view": Hostile(
        "import ctypes\nlibc = ctypes.CDLL(None)\nfor number, who in ((200, ({pid}, 9)), (234, ({pid}, {pid}, 9)), "
        "(424, (3, 9, 0, 0))):\n  print('ESCAPED' if libc.syscall(number, *who) == 0 else 'refused')",
        ("ok",),
        "refused",
    ),
    "becomes a daemon": Hostile(
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    print('ESCAPED', flush=True)\n"
        "    time.sleep(3600)\n",
        ("error",),
        "PermissionError",
    ),
    "traces a process": Hostile(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor who in (1, {pid}):\n"
        "  print('ESCAPED' if libc.ptrace(16, who, 0, 0) == 0 else ctypes.get_errno())",
        ("ok",),
        "1",
    ),
    "makes namespaces and mounts": Hostile(
        _TRY
        + "import os\nattempt(lambda: os.unshare(os.CLONE_NEWUSER))\nattempt(lambda: os.chroot('/'))\nimport ctypes\n"
        "print('ESCAPED' if ctypes.CDLL(None).mount(b'x', b'/usr', b'tmpfs', 0, None) == 0 else 'refused')",
        ("ok",),
        "refused",
    ),
    "becomes root": Hostile(
        "import os\ntry: os.setuid(0)\nexcept OSError: pass\n"
        "print('ESCAPED' if int(open('/proc/self/status').read().split('CapEff:')[1].split()[0], 16) else 'none')",
        ("ok", "error"),
    ),
    "crashes": Hostile("import ctypes\nctypes.string_at(0)", ("killed",)),
    "writes to what it did not open": Hostile(
        "import os\nfor n in range(3, 64):\n  try: print('ESCAPED', n, os.write(n, b'x'))\n"
        "  except OSError: pass\nprint('none')",
        ("ok",),
        "none",
    ),
    "opens too many files": Hostile(
        _TRY + "files = []\nattempt(lambda: [files.append(open('/dev/zero')) for n in range(1000)])",
        ("ok",),
        "OSError 24",
    ),
}

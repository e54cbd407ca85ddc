"""What runs inside the sandbox: shuts the doors that are still open, then runs the snippet of standard input.

    python -I -S run.py '{"limits": ..., "user": ..., "readable": ..., "packages": ...}' READY

Started by `Sandbox` where the namespaces are made already (or, with Landlock, in none). Nothing here may import
anything outside of the standard library. READY is a file descriptor: one byte is written to it when every limit is
in place, and it is closed before the snippet starts, so that a broken sandbox is told from a broken snippet.
"""

from __future__ import annotations

import ast
import json
import os
import resource
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import landlock  # type: ignore[import-not-found]
import syscalls  # type: ignore[import-not-found]

SNIPPET = "<snippet>"
PR_SET_PDEATHSIG = 1


def set_limits(limits: dict[str, int]) -> None:
    """Of this process, soft and hard alike. name of RLIMIT_* in lower case -> bytes, seconds or a number."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name.upper()}")
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def drop_root(user: int) -> None:
    """Become a user that nobody else is, for good, where the sandbox was made by root."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def end_with_parent(parent: int) -> None:
    """SIGKILL for this process when the one that started it ends. Raises OSError when that has happened already."""
    syscalls.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the process that started this one has ended")


def run_snippet(source: str) -> int:
    """Run `source` as __main__; the value of a last line that is an expression is printed. Returns the exit code."""
    try:
        tree = ast.parse(source, SNIPPET)
        last = tree.body[-1] if tree.body else None
        value = None
        if isinstance(last, ast.Expr):
            value = compile(ast.Expression(last.value), SNIPPET, "eval")
            tree.body.pop()
        names = {"__name__": "__main__", "__builtins__": __builtins__}
        exec(compile(tree, SNIPPET, "exec"), names)
        if value is not None:
            sys.displayhook(eval(value, names))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != SNIPPET:
            frames = frames.tb_next  # what this file did to run it explains nothing
        sys.__excepthook__(type(error), error.with_traceback(frames), frames)
        return 1
    return 0


def main(arguments: list[str]) -> int:
    settings, ready, parent = json.loads(arguments[0]), int(arguments[1]), os.getppid()
    source = sys.stdin.buffer.read().decode("utf-8", "replace")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if settings["user"] is not None:
        drop_root(settings["user"])
    end_with_parent(parent)  # after the change of user, which forgets it
    set_limits(settings["limits"])
    syscalls.drop_privileges()
    if settings["readable"] is not None:
        landlock.restrict_to(settings["readable"])
    syscalls.install_filter(own_files=settings["own_files"])
    sys.path[:] = [*(path for path in sys.path[1:] if os.path.isdir(path)), *settings["packages"]]
    os.write(ready, b"1")
    os.close(ready)
    return run_snippet(source)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 1
    # No clean-up: a snippet's threads and exit handlers do not decide when it is over.
    os._exit(code & 0xFF)

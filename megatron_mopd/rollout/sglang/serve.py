"""One SGLang server, run by SGLang's own Python as `python -P serve.py`: imports nothing of this project.

Settings come as one line of JSON on stdin: {"arguments": [...], "api_key": "...", "parent": pid}. So the key is on no
command line, where every user of the machine could read it. The server ends when the process `parent` does, also of
kill -9: this process leads a session of its own, and all of it is killed.

SGLang's workers import this file again, as any module that multiprocessing spawns from: it must do nothing then.
"""

import json
import logging
import os
import signal
import sys
import threading
import time

_POLL_SECONDS = 0.5


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_follow, args=(settings["parent"],), daemon=True).start()
    _hide_in_logs(settings["api_key"])
    print(f"serve: sys.path {sys.path}", flush=True)

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    arguments = prepare_server_args(settings["arguments"])
    arguments.api_key = settings["api_key"]
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _hide_in_logs(api_key: str) -> None:
    """SGLang logs its arguments, the key among them."""
    make = logging.getLogRecordFactory()

    def record(*args: object, **kwargs: object) -> logging.LogRecord:
        made = make(*args, **kwargs)
        if api_key in made.getMessage():
            made.msg, made.args = made.getMessage().replace(api_key, "***"), ()
        return made

    logging.setLogRecordFactory(record)


if __name__ == "__main__":
    main()

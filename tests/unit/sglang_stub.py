"""A stand-in for an SGLang server's HTTP side, for faults that a real one does not make on demand."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, Any], tuple[int, Any] | None]
"""(path, body) -> HTTP status and JSON; None breaks the connection off."""


class StubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Reply, api_key: str | None = None) -> None:
        self.reply, self.api_key = reply, api_key
        self.seen: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what it is here for."""


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        self.server.seen[self.path] += 1
        if self.server.api_key and self.headers["Authorization"] != f"Bearer {self.server.api_key}":
            reply: tuple[int, Any] | None = (401, {"error": "Unauthorized"})
        else:
            reply = self.server.reply(self.path, body)
        if reply is None:
            self.connection.close()
            return
        payload = json.dumps(reply[1]).encode()
        self.send_response(reply[0])
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(reply: Reply, api_key: str | None = None) -> Iterator[StubServer]:
    server = StubServer(reply, api_key)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

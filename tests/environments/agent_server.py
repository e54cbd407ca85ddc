"""A small real agent environment on the loopback interface: a counting game, and whatever else a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, dict[str, Any]], Any]
"""(path, body) -> a JSON object for code 200 · (code, bytes) · a function of the handler, which does it itself."""


class AgentServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for seen, body in self.seen if seen == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what it is here for."""


class _Handler(BaseHTTPRequestHandler):
    server: AgentServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        self.server.keys.add(self.headers["Authorization"])
        reply = self.server.reply(self.path, body)
        if callable(reply):
            reply(self)
            return
        code, payload = reply if isinstance(reply, tuple) else (200, json.dumps(reply).encode())
        self.send_response(code)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        pass


def break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def counting_game(turns: int = 2) -> Reply:
    """Says 'turn N' until the last turn, and gives 0.25 points a turn."""

    def reply(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/check":
            return {"protocol": 1}
        if path != "/step":
            return {}
        number = body["turn"] + 1
        points = {"reward": 0.25 * number}
        return points | ({"done": True} if number == turns else {"observation": f"turn {number}"})

    return reply


@contextmanager
def serving(reply: Reply) -> Iterator[AgentServer]:
    server = AgentServer(reply)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

"""One JSON request to an agent environment: bounded in time and size, retried where that can help, never followed
elsewhere."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_mopd.environments.protocol import EnvironmentFailure

RETRIED_CODES = frozenset({429, 502, 503, 504})
MAX_ANSWER_BYTES = 16 << 20
_FIRST_PAUSE = 0.1
"""Seconds before the first retry; doubled for each further one."""
_EXCERPT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where an environment is, and how patiently it is asked."""

    url: str
    api_key: str | None
    retries: int

    def post(self, path: str, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The JSON object that POST url + path answers within `seconds`, retries and pauses included.

        Every attempt is a connection of its own: an environment may be restarted between two turns. Raises
        EnvironmentFailure; the key is in no message.
        """
        deadline = time.monotonic() + seconds
        data = json.dumps(_plain(body), default=str).encode()
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                code, answer = self._send(path, data, deadline)
            except TimeoutError:
                raise EnvironmentFailure("timeout", f"{self.url}{path}: no answer within {seconds:.3g} s") from None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                if last:
                    raise EnvironmentFailure("unreachable", f"{self.url}{path}: {reason}") from None
            else:
                if code == 200:
                    return self._read(path, answer)
                if code not in RETRIED_CODES or last:
                    words = answer[:_EXCERPT].decode("utf-8", "replace")
                    raise EnvironmentFailure("refused", f"{self.url}{path}: HTTP {code}: {words}")
            pause = _FIRST_PAUSE * 2**attempt
            if time.monotonic() + pause >= deadline:
                raise EnvironmentFailure("timeout", f"{self.url}{path}: no answer within {seconds:.3g} s")
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, path: str, data: bytes, deadline: float) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        assert parts.hostname is not None
        connection = kind(parts.hostname, parts.port, timeout=_left(deadline))
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.connect()
            with _cut_off(connection.sock, deadline):
                connection.request("POST", parts.path.rstrip("/") + path, data, headers)
                response = connection.getresponse()
                body = _read_body(response)
            _left(deadline)  # what was cut off can look like the end of the answer
            return response.status, body
        except (OSError, http.client.HTTPException):
            _left(deadline)  # that it took too long says more than how it broke
            raise
        finally:
            connection.close()

    def _read(self, path: str, answer: bytes) -> dict[str, Any]:
        try:
            tree = json.loads(answer)
        except (ValueError, RecursionError):
            words = answer[:_EXCERPT].decode("utf-8", "replace")
            raise EnvironmentFailure("bad_answer", f"{self.url}{path}: not JSON: {words}") from None
        if not isinstance(tree, dict):
            raise EnvironmentFailure("bad_answer", f"{self.url}{path}: not a JSON object")
        return tree


def _read_body(response: http.client.HTTPResponse) -> bytes:
    body = response.read(MAX_ANSWER_BYTES + 1)
    if len(body) > MAX_ANSWER_BYTES:
        raise EnvironmentFailure("bad_answer", f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
    if response.length:
        raise http.client.IncompleteRead(body, response.length)
    return body


@contextmanager
def _cut_off(connected: socket.socket, deadline: float) -> Iterator[None]:
    """Shut the connection at the deadline: a socket's own limit is for each piece, and a trickle never meets it."""

    def shut() -> None:
        with suppress(OSError):  # it is closed already
            socket.socket.shutdown(connected, socket.SHUT_RDWR)

    timer = threading.Timer(_left(deadline), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _plain(value: Any) -> Any:
    """With keys that JSON knows: a reasoning-gym entry may hold others."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left

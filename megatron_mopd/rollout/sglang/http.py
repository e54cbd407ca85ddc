"""One SGLang server's HTTP interface, blocking: for everything but the stream of `/generate` requests."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_MESSAGE_CHARACTERS = 300


class ServerError(Exception):
    """Base of what can go wrong between us and a server; its text names the URL."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url, self.reason = url, reason

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions travel between ranks
        return type(self), (self.url, self.reason)


class ServerUnreachable(ServerError):
    """The connection could not be made, broke, or took longer than the timeout. Worth another try."""


class ServerRefused(ServerError):
    """The server answered, with an error: HTTP `status` and what it said. The same request fails again."""

    def __init__(self, url: str, status: int, message: str) -> None:
        super().__init__(url, f"HTTP {status}: {message}")
        self.status, self.message = status, message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.status, self.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConnection:
    """Where a server is and how to ask it. A connection is opened for each request: safe in any thread and rank."""

    url: str
    """http://host:port, without a slash at the end."""
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    """Seconds for one request, answer included, where the call names no other."""

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The answer to GET `path`: parsed JSON, or the text where it is none. Raises ServerError."""
        return self._request("GET", path, None, timeout)

    def post(self, path: str, body: Any, timeout: float | None = None) -> Any:
        """The answer to POST `path` with `body` as JSON. Raises ServerError.

        Administrative endpoints answer {"success": false} with HTTP 400, some with 200: both are ServerRefused.
        """
        return self._request("POST", path, body, timeout)

    def _request(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        place = split_url(self.url)
        connection = http.client.HTTPConnection(place.host, place.port, timeout=timeout or self.timeout)
        try:
            connection.request(
                method,
                place.path + path,
                body=None if body is None else json.dumps(body).encode(),
                headers=request_headers(self.api_key),
            )
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(self.url, f"{method} {path}: {describe(error)}") from None
        finally:
            connection.close()
        return parse_answer(self.url, path, response.status, text)


@dataclass(frozen=True, slots=True)
class Place:
    """What a URL says about where to connect."""

    host: str
    port: int
    path: str


def split_url(url: str) -> Place:
    """Raises ValueError for anything but http://host[:port][/path]."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{url}: write it as http://host:port")
    return Place(parts.hostname, parts.port or 80, parts.path.rstrip("/"))


def request_headers(api_key: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    return headers | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


def parse_answer(url: str, path: str, status: int, text: bytes) -> Any:
    """Parsed JSON, or the text; ServerRefused where the status, or an administrative answer, says no."""
    try:
        answer = json.loads(text) if text else None
    except ValueError:
        answer = text.decode(errors="replace")
    failed = isinstance(answer, dict) and answer.get("success") is False
    if status >= 400 or failed:
        raise ServerRefused(url, status, f"{path}: {_message(answer)}")
    return answer


def _message(answer: Any) -> str:
    """What an error answer says, in one line: servers wrap it as `message`, `detail` or `error.message`."""
    while isinstance(answer, dict):
        answer = next((answer[key] for key in ("error", "message", "detail") if answer.get(key)), str(answer))
    return " ".join(str(answer or "no reason given").split())[:_MESSAGE_CHARACTERS]


def describe(error: Exception) -> str:
    """The reason of a connection fault in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__

"""One HTTP request and its answer without a thread of its own: what thousands of `/generate` requests at once need."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from megatron_mopd.rollout.sglang.http import (
    ServerConnection,
    ServerUnreachable,
    describe,
    parse_answer,
    request_headers,
    split_url,
)


class TooSlow(ServerUnreachable):
    """The server took longer than `answer_seconds`."""


async def exchange(connection: ServerConnection, method: str, path: str, body: Any, seconds: float) -> Any:
    """One request and its answer, like `ServerConnection` but without a thread. Raises ServerError."""
    try:
        async with asyncio.timeout(seconds):
            status, text = await _exchange_bytes(connection, method, path, body)
    except TimeoutError:
        raise TooSlow(connection.url, f"{path}: no answer within {seconds:g} s") from None
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ServerUnreachable(connection.url, f"{method} {path}: {describe(error)}") from None
    return parse_answer(connection.url, path, status, text)


async def _exchange_bytes(connection: ServerConnection, method: str, path: str, body: Any) -> tuple[int, bytes]:
    """(HTTP status, body). HTTP/1.0: the server sends one answer, in one piece, and closes the connection."""
    place = split_url(connection.url)
    payload = b"" if body is None else json.dumps(body).encode()
    headers = {
        "Host": f"{place.host}:{place.port}",
        "Content-Length": str(len(payload)),
        **request_headers(connection.api_key),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    reader, writer = await asyncio.open_connection(place.host, place.port)
    try:
        writer.write(f"{method} {place.path}{path} HTTP/1.0\r\n{head}\r\n".encode() + payload)
        await writer.drain()
        answer_head = await reader.readuntil(b"\r\n\r\n")
        text = await reader.read(-1)
    finally:
        writer.close()
    lines = answer_head.decode("latin-1").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if len(text) < int(fields.get("content-length", 0)):
        raise EOFError("the answer broke off")
    return int(lines[0].split()[1]), text

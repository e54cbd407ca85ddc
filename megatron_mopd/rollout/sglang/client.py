"""Many `/generate` requests at once, over all live servers: the least busy one takes the next."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mopd.rollout.sglang.http import (
    ServerConnection,
    ServerError,
    ServerUnreachable,
    describe,
    parse_answer,
    request_headers,
    split_url,
)
from megatron_mopd.rollout.sglang.pool import Member, ServerPool
from megatron_mopd.types import Rollout

_LOADS_SECONDS = 5.0
"""How often servers are asked how busy they are with the requests of others."""
_PROBE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.25


class TooSlow(ServerUnreachable):
    """The server took longer than `answer_seconds`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    body: Mapping[str, Any]
    """JSON of POST /generate."""
    read: Callable[[str, Any], Rollout]
    """(url, answer) -> the rollout; raises BadAnswer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """See `SglangSpec`."""

    concurrency: int
    answer_seconds: float
    retries: int


def generate_all(pool: ServerPool, requests: Sequence[Request], limits: Limits) -> list[Rollout]:
    """One rollout per request, in order, whichever server it came from.

    A request whose server dies is asked again elsewhere: its seed makes it the same rollout. Raises RolloutFailure
    when no server is left, ServerRefused and BadAnswer for what would not get better by asking again.
    """
    return asyncio.run(_Batch(pool, limits).run(requests)) if requests else []


class _Batch:
    def __init__(self, pool: ServerPool, limits: Limits) -> None:
        self._pool, self._limits = pool, limits
        self._free = asyncio.Condition()
        self._probing = {member.number: asyncio.Lock() for member in pool.members}

    async def run(self, requests: Sequence[Request]) -> list[Rollout]:
        watch = asyncio.create_task(self._watch_loads())
        tasks = [asyncio.create_task(self._one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in (watch, *tasks):
                task.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)

    async def _one(self, request: Request) -> Rollout:
        faults: dict[int, int] = {}
        while True:
            member = await self._take()
            try:
                rollout = await self._ask(member, request)
                member.restarts = 0
                return rollout
            except TooSlow as fault:
                self._pool.lose(member, f"{fault.reason} (rollout.sglang.answer_seconds)")
                continue
            except ServerUnreachable as fault:
                faults[member.number] = faults.get(member.number, 0) + 1
                reason = fault.reason
            finally:
                await self._give_back(member)
            if faults[member.number] > self._limits.retries and member.is_live:
                self._pool.lose(member, f"broke {faults[member.number]} times off while it answered: {reason}")
            await self._look_at(member, time.monotonic(), reason)

    async def _take(self) -> Member:
        """The least busy live server that has room for one more request."""
        async with self._free:
            while True:
                member = min(self._pool.require_live(), key=lambda member: member.load)
                with_room = [m for m in self._pool.live if m.in_flight < self._limits.concurrency]
                if with_room:
                    member = min(with_room, key=lambda member: member.load)
                    member.in_flight += 1
                    return member
                await self._free.wait()

    async def _give_back(self, member: Member) -> None:
        async with self._free:
            member.in_flight -= 1
            self._free.notify_all()

    async def _ask(self, member: Member, request: Request) -> Rollout:
        connection = member.connection
        answer = await exchange(connection, "POST", "/generate", request.body, self._limits.answer_seconds)
        return request.read(connection.url, answer)

    async def _look_at(self, member: Member, fault: float, reason: str) -> None:
        """After a fault: wait until the server answers, or take it out. Of many faults at once the first one looks."""
        async with self._probing[member.number]:
            if not member.is_live or member.probed > fault:
                return
            for attempt in range(self._limits.retries + 1):
                if member.has_exited:
                    break
                try:
                    await exchange(member.connection, "GET", "/model_info", None, _PROBE_SECONDS)
                    member.probed = time.monotonic()
                    return
                except ServerError as error:
                    reason = error.reason
                await asyncio.sleep(_FIRST_PAUSE_SECONDS * 2**attempt if attempt < self._limits.retries else 0)
            self._pool.lose(member, f"cannot be reached: {reason}")
            async with self._free:
                self._free.notify_all()

    async def _watch_loads(self) -> None:
        while True:
            for member in self._pool.live:
                try:
                    answer = await exchange(member.connection, "GET", "/v1/loads?include=core", None, _PROBE_SECONDS)
                    loads = answer["loads"]
                    total = sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
                    member.elsewhere = max(0, total - member.in_flight)
                except (ServerError, KeyError, TypeError):
                    member.elsewhere = 0  # only a hint: a server that is in trouble shows it in its answers
            await asyncio.sleep(_LOADS_SECONDS)


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

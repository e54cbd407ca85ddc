"""Many `/generate` requests at once, over all live servers: the least busy one takes the next."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_mopd.rollout.sglang.exchange import TooSlow, exchange
from megatron_mopd.rollout.sglang.http import ServerError, ServerUnreachable
from megatron_mopd.rollout.sglang.pool import Member, ServerPool
from megatron_mopd.rollout.sglang.protocol import Part
from megatron_mopd.types import Rollout

_LOADS_SECONDS = 5.0
"""How often servers are asked how busy they are with the requests of others."""
_PROBE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.25
_STILL_LIVE_SECONDS = 2.0
"""How often a request looks whether its server was taken out meanwhile (by a weight update that failed)."""
_STOP_SECONDS = 0.5
"""How often servers are told to stop, until they have: one may not know yet of a request that it was just sent."""

Answer = Rollout | Part | None
"""The rollout; what there is of it, where it was stopped; None where it was stopped before it had begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    body: Mapping[str, Any]
    """JSON of POST /generate."""
    read: Callable[[str, Any], Rollout | Part]
    """(url, answer) -> the rollout, or the part of it that there is; raises BadAnswer."""
    when_sent: Callable[[], Mapping[str, Any]] = dict
    """Added to `body` at the moment of sending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """See `SglangSpec`."""

    concurrency: int
    answer_seconds: float
    retries: int


def generate_all(pool: ServerPool, requests: Sequence[Request], limits: Limits) -> list[Rollout]:
    """`Dispatcher.generate` of one batch alone."""
    with contextlib.closing(Dispatcher(pool, limits)) as dispatcher:
        return dispatcher.generate(requests)


class Dispatcher:
    """Asks the servers of a pool, in a thread of its own. Its methods are for one other thread.

    A request whose server dies is asked again elsewhere: its seed makes it the same rollout. A request fails with
    RolloutFailure when no server is left, with ServerRefused and BadAnswer for what would not get better by asking
    again.
    """

    def __init__(self, pool: ServerPool, limits: Limits) -> None:
        self._pool, self._limits = pool, limits
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Condition()
        self._probing = {member.number: asyncio.Lock() for member in pool.members}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._held, self._stopping = False, False
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in order, whichever server it came from."""
        futures = [self.submit(request) for request in requests]
        try:
            done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            self.abort()
            raise
        rollouts = [future.result() for future in futures]
        assert all(isinstance(rollout, Rollout) for rollout in rollouts), "nobody has stopped them"
        return rollouts  # type: ignore[return-value]

    def submit(self, request: Request) -> Future[Answer]:
        """Begin with a request; its callbacks are called in the dispatcher's thread."""
        return asyncio.run_coroutine_threadsafe(self._one(request), self._loop)

    def stop(self) -> None:
        """End all requests with what they have; returns when nothing is under way any more."""
        self._wait(self._stop())

    def hold(self) -> None:
        """Send nothing more, and wait until all that was sent is answered."""
        self._wait(self._hold())

    def release(self) -> None:
        """Go on after `hold`."""
        self._wait(self._release())

    def abort(self) -> None:
        """Nobody waits any more: cancel all requests, and have the servers, which are this run's alone, drop them."""
        self._wait(self._abort())

    def close(self) -> None:
        if self._thread.is_alive():
            if self._tasks:
                self._wait(self._abort())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _wait(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _stop(self) -> None:
        self._stopping = True
        async with self._free:
            self._free.notify_all()
        while self._tasks:
            await self._tell_servers_to_stop()
            if self._tasks:  # they may have ended by themselves in the meantime
                await asyncio.wait(set(self._tasks), timeout=_STOP_SECONDS)
        self._stopping = False

    async def _hold(self) -> None:
        self._held = True
        async with self._free:
            await self._free.wait_for(lambda: not any(member.in_flight for member in self._pool.members))

    async def _release(self) -> None:
        self._held = False
        async with self._free:
            self._free.notify_all()

    async def _abort(self) -> None:
        tasks = set(self._tasks)
        await self._tell_servers_to_stop()
        if self._watch is not None:
            tasks.add(self._watch)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell_servers_to_stop(self) -> None:
        for member in self._pool.live:
            with contextlib.suppress(ServerError):  # what is wrong with it shows in its answers
                await exchange(member.connection, "POST", "/abort_request", {"abort_all": True}, _PROBE_SECONDS)

    async def _one(self, request: Request) -> Answer:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_loads())
        try:
            return await self._answer(request)
        finally:
            self._tasks.discard(task)
            if not self._tasks:
                self._watch.cancel()

    async def _answer(self, request: Request) -> Answer:
        faults: dict[int, int] = {}
        while True:
            member = await self._take()
            if member is None:
                return None
            try:
                rollout = await self._ask(member, request)
                member.restarts = 0
                return rollout
            except TooSlow as fault:
                if member.is_live:
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

    async def _take(self) -> Member | None:
        """The least busy live server that has room for one more request; None where all are stopped."""
        async with self._free:
            while not self._stopping:
                self._pool.require_live()
                with_room = [m for m in self._pool.live if m.in_flight < self._limits.concurrency]
                if with_room and not self._held:
                    member = min(with_room, key=lambda member: member.load)
                    member.in_flight += 1
                    return member
                await self._free.wait()
            return None

    async def _give_back(self, member: Member) -> None:
        async with self._free:
            member.in_flight -= 1
            self._free.notify_all()

    async def _ask(self, member: Member, request: Request) -> Rollout | Part:
        connection, losses = member.connection, member.losses
        body = {**request.body, **request.when_sent()}
        asking = asyncio.create_task(exchange(connection, "POST", "/generate", body, self._limits.answer_seconds))
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=_STILL_LIVE_SECONDS)
                if member.losses != losses and not asking.done():
                    raise ServerUnreachable(connection.url, "was taken out")
        finally:
            asking.cancel()
        return request.read(connection.url, asking.result())

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
            if member.is_live:
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

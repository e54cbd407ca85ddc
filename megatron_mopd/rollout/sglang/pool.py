"""The servers of a run: which of them live, how busy each is, and how a dead one comes back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_mopd.rollout.engine import RolloutFailure
from megatron_mopd.rollout.sglang.check import NOBODY, refusal
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerError, ServerRefused
from megatron_mopd.rollout.sglang.server import ServerProcess, stop_servers
from megatron_mopd.yaml_config import ConfigError

MAX_RESTARTS = 3
"""A server of ours that dies more often than that without answering a request in between stays dead."""
_NEW = "has no weights yet"
_POLL_SECONDS = 0.5
_LOOK_SECONDS = 10.0
"""How long a server may take to say who it is."""

Starter = Callable[[int], ServerProcess]
"""Starts the server of this number, at the same address each time."""


@dataclass
class Member:
    """One server as the run sees it. Live means: it answered last time, and has the current weights."""

    number: int
    connection: ServerConnection
    process: ServerProcess | None
    """None for a server that was running before us."""
    is_live: bool = False
    in_flight: int = 0
    """Our requests that it has now."""
    elsewhere: int = 0
    """Requests of others that it said it had."""
    restarts: int = 0
    reason: str = _NEW
    """Why it is not live."""
    probed: float = field(default=0.0)
    """Monotonic seconds of the last look at it after a fault."""
    losses: int = 0
    """How often it was taken out: tells an answer about the server from one about the server that it was before."""
    offered: int = 0
    """`losses` when it was last named for an update."""

    @property
    def url(self) -> str:
        return self.connection.url

    @property
    def load(self) -> int:
        return self.in_flight + self.elsewhere

    @property
    def has_exited(self) -> bool:
        return self.process is not None and not self.process.is_running


class ServerPool:
    """Lives on rank 0 only. Nothing here waits for a server but `wait_started`.

    Requests lose servers in one thread while another one sends weights.
    """

    def __init__(
        self,
        connections: Sequence[ServerConnection],
        *,
        start: Starter | None,
        check: Callable[[ServerConnection], None],
        say: Callable[[str], None],
    ) -> None:
        """
        start: how to start server i, for servers of our own, which are started at once; None where they run already.
        check: raises ConfigError for a server that is not what the run needs.
        say: takes one line for the user.
        """
        self._start, self._check, self._say = start, check, say
        self._lock = threading.RLock()
        self.members = [
            Member(number=number, connection=connection, process=start(number) if start else None)
            for number, connection in enumerate(connections)
        ]

    def wait_started(self, seconds: float) -> None:
        """Until all servers answer and are what they should be. Raises ConfigError naming the first that fails."""
        deadline = time.monotonic() + seconds
        waiting = list(self.members)
        while waiting:
            waiting = [member for member in waiting if not self._has_started(member)]
            if waiting and time.monotonic() > deadline:
                raise ConfigError(f"rollout.sglang: {self._late(waiting[0], seconds)}")
            time.sleep(_POLL_SECONDS if waiting else 0)

    def _has_started(self, member: Member) -> bool:
        if member.has_exited:
            assert member.process is not None
            raise ConfigError(
                f"rollout.sglang: server {member.url} ended while it started: {member.process.last_words()}; "
                f"see {member.process.log}"
            )
        if not self._answers(member):
            return False
        self._check(member.connection)
        return True

    def _late(self, member: Member, seconds: float) -> str:
        if member.process is None:
            return f"{member.url} cannot be reached; start it, or correct rollout.sglang.urls"
        return (
            f"server {member.url} did not answer within {seconds:g} s (rollout.sglang.launch.start_seconds): "
            f"{member.process.last_words()}; see {member.process.log}"
        )

    def _answers(self, member: Member) -> bool:
        """Raises ConfigError where something else answers at the address."""
        try:
            member.connection.get("/model_info", timeout=_LOOK_SECONDS)
        except ServerRefused as refused:
            raise ConfigError(f"rollout.sglang: {refusal(refused)}") from None
        except ServerError:
            return False
        return True

    @property
    def live(self) -> list[Member]:
        return [member for member in self.members if member.is_live]

    def require_live(self) -> list[Member]:
        """The live servers. Raises RolloutFailure, with every server's reason, when there is none."""
        live = self.live
        if not live:
            reasons = "; ".join(f"{member.url} {member.reason}" for member in self.members)
            raise RolloutFailure(f"rollout.sglang: no server is left: {reasons}")
        return live

    def lose(self, member: Member, reason: str) -> None:
        """Take a server out; one of ours is started again, and comes back with the next weights."""
        with self._lock:
            if member.process is not None and member.has_exited:
                reason = f"ended ({member.process.last_words()}; see {member.process.log})"
            if member.is_live:
                self._say(f"rollout server {member.url} is taken out: {reason}")
            member.is_live, member.reason = False, reason
            member.losses += 1
            if self._start is not None and member.process is not None:
                member.process.kill()
                if member.restarts < MAX_RESTARTS:
                    member.restarts += 1
                    member.process = self._start(member.number)

    def ready_for_weights(self) -> list[ServerConnection]:
        """The live servers, and those that answer again and are what they should be."""
        ready = []
        for member in self.members:
            member.offered = member.losses
            if member.is_live or self._is_back(member):
                ready.append(member.connection)
        return ready

    def _is_back(self, member: Member) -> bool:
        if member.has_exited:
            self.lose(member, member.reason)
            return False
        try:
            if not self._answers(member):
                return False
            self._check(member.connection)
        except ConfigError as problem:
            member.reason = str(problem)
            return False
        return True

    def weights_sent(self, synced: Sequence[str], failed: Mapping[str, str]) -> None:
        """What became of an update: `synced` servers are live now, `failed` ones (url -> reason) are not.

        Nothing becomes of a server that was taken out during the update: what is there now is another one.
        """
        for member in self.members:
            with self._lock:
                if member.losses != member.offered:
                    continue
                if member.url in failed:
                    self.lose(member, failed[member.url])
                elif member.url in synced and not member.is_live:
                    if member.reason != _NEW:
                        self._say(f"rollout server {member.url} is back, with the current weights")
                    member.is_live, member.reason = True, _NEW

    def close(self) -> None:
        """Stop what was started, and give back what was found: the next run takes a server of nobody's."""
        for member in self.live:
            if member.process is None:
                with contextlib.suppress(ServerError):  # it is gone, and nobody's then
                    member.connection.post(
                        "/update_weight_version", {"new_version": NOBODY, "abort_all_requests": False}
                    )
        stop_servers([member.process for member in self.members if member.process is not None])
        for member in self.members:
            member.is_live = False

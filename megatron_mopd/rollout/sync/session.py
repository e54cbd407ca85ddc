"""One weight update as the servers live it: paused, changed, checked, and only then serving again.

    pause -> flush -> begin -> buckets -> version -> end -> check -> continue

A server that fails on the way stays paused: half of an update never serves. The next update begins anew with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_mopd.rollout.sglang.http import ServerConnection, ServerRefused
from megatron_mopd.rollout.sync.checksum import ServerChecksums, difference
from megatron_mopd.rollout.sync.recipients import Recipients, ServerFacts, UpdateRefused, understanding

KV_CACHE, WEIGHTS = "kv_cache", "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What all servers of an update are told."""

    version: str
    timeout: float
    """Seconds for one request."""
    in_parts: bool
    """The weights come in several requests, between begin_weight_update and end_weight_update."""
    released: frozenset[str] = frozenset()
    """URLs of servers that gave their memory up (`release_memory`) and have to get it back."""
    keeps_cache: bool = False
    """Requests under way go on with the cache of the old weights (`sync.in_flight: in_place`)."""

    def run(
        self,
        recipients: Recipients,
        deliver: Callable[[Recipients], None],
        checksums: Mapping[int, ServerChecksums],
    ) -> None:
        """Update the live recipients; those that are live after it serve the new weights.

        `checksums`: by number of tensor-parallel ranks, complete once `deliver` has returned. What `deliver` raises
        comes through, and all servers stay paused.
        """
        recipients.ask(self._open)
        deliver(recipients)
        recipients.ask(self._close)
        recipients.ask(lambda server: self._check(server, recipients, checksums))
        recipients.ask(self._serve)

    def _open(self, server: ServerConnection) -> None:
        if self.keeps_cache:
            server.post("/pause_generation", {"mode": "in_place"}, timeout=self.timeout)
        else:
            pause(server, self.timeout)
        if server.url in self.released:
            server.post("/resume_memory_occupation", {"tags": [WEIGHTS]}, timeout=self.timeout)
        if self.in_parts:
            try:
                server.post("/begin_weight_update", {}, timeout=self.timeout)
            except ServerRefused:
                # One that an earlier trainer or a failed update left open.
                server.post("/end_weight_update", {}, timeout=self.timeout)
                server.post("/begin_weight_update", {}, timeout=self.timeout)

    def _close(self, server: ServerConnection) -> None:
        # Before the weights can serve, so that requests which were only retracted carry both versions.
        body = {"new_version": self.version, "abort_all_requests": False}
        server.post("/update_weight_version", body, timeout=self.timeout)
        if self.in_parts:
            server.post("/end_weight_update", {}, timeout=self.timeout)

    def _check(
        self, server: ServerConnection, recipients: Recipients, checksums: Mapping[int, ServerChecksums]
    ) -> None:
        model = server.get("/model_info")
        with understanding(server):
            served = model["weight_version"]
        if served != self.version:
            raise UpdateRefused(server.url, f"has weight version '{served}' after an update to '{self.version}'")
        facts = recipients.facts[server.url]
        if can_check(facts) and facts.tensor_ranks in checksums:
            answer = server.post("/weights_checker", {"action": "checksum"}, timeout=self.timeout)
            with understanding(server):
                problem = difference(checksums[facts.tensor_ranks], answer["ranks"])
            if problem is not None:
                raise UpdateRefused(server.url, f"{problem} as version '{self.version}'")

    def _serve(self, server: ServerConnection) -> None:
        if server.url in self.released:
            server.post("/resume_memory_occupation", {"tags": [KV_CACHE]}, timeout=self.timeout)
        server.post("/continue_generation", {}, timeout=self.timeout)


def pause(server: ServerConnection, timeout: float) -> None:
    """Stop decoding; requests go back to the queue, and their cache is dropped: old weights computed it."""
    server.post("/pause_generation", {"mode": "retract"}, timeout=timeout)
    server.post("/flush_cache", {}, timeout=timeout)


def release_memory(server: ServerConnection, timeout: float) -> None:
    """Colocated: give weights and cache up until the next update, which gives them back. The server stays paused."""
    pause(server, timeout)
    server.post("/release_memory_occupation", {"tags": [KV_CACHE, WEIGHTS]}, timeout=timeout)


def can_check(facts: ServerFacts) -> bool:
    """Whether `ServerChecksums` says what this server must answer."""
    return facts.on_cpu and facts.expert_ranks == 1

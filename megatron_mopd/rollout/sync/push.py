"""One student's weights to several servers: `ServerSync` on rank 0, `sync_weights` on every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mopd.parallel.runtime import World
from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sync.buckets import Weights
from megatron_mopd.rollout.sync.checksum import ServerChecksums, Watched
from megatron_mopd.rollout.sync.config import SyncSpec
from megatron_mopd.rollout.sync.disk import DiskTransport
from megatron_mopd.rollout.sync.distributed import DistributedTransport
from megatron_mopd.rollout.sync.group import BroadcastFailed
from megatron_mopd.rollout.sync.recipients import Recipients, read_facts
from megatron_mopd.rollout.sync.session import Session, can_check, release_memory
from megatron_mopd.rollout.sync.tensor import TensorTransport
from megatron_mopd.rollout.sync.transport import Deliver, Transport
from megatron_mopd.rollout.sync.version import weight_version
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.yaml_config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What became of an update: every server is in one of the three."""

    synced: tuple[str, ...]
    """URLs of the servers that serve the new weights."""
    failed: Mapping[str, str]
    """URL -> reason. They serve nothing: dead, or paused until an update of theirs succeeds."""
    interrupted: tuple[str, ...]
    """Sound servers, paused in the middle of an update that another one's death ended; they need it from the start."""
    num_bytes: int
    """Of the model, sent once to however many servers."""
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        return {"sync_bytes": float(self.num_bytes), "sync_servers": float(len(self.synced))}


class ServerSync:
    """Rank 0's side of every update. Holds one bucket, never a model; see `Transport` for what is kept in between."""

    def __init__(self, spec: SyncSpec, transport: Transport, *, run_id: str, head_dim: int):
        self._spec = spec
        self._transport = transport
        self._run_id = run_id
        self._head_dim = head_dim
        self._served: dict[str, str] = {}
        """URL -> weight version that the server had when it was last left in order."""
        self._released: set[str] = set()

    def push(self, weights: Weights, num_updates: int, servers: Sequence[ServerConnection]) -> SyncReport:
        """Bring a stream of whole tensors to all `servers`. `weights` may be left unfinished.

        Raises ConfigError where the weights cannot be written (`disk`); the servers serve on as before then.
        """
        start = time.monotonic()
        recipients = self._recipients(servers)
        checksums = self._checksums(recipients)
        watched = Watched(weights, checksums)
        interrupted = False
        try:
            deliver = self._transport.stage(watched, num_updates)
            self._update(recipients, deliver, num_updates, checksums)
        except BroadcastFailed:
            interrupted = True
        return self._report(recipients, interrupted, watched.num_bytes, start)

    def catch_up(self, server: ServerConnection) -> SyncReport | None:
        """Bring one server that returned to the current weights without asking the student for them.

        None where they are nowhere but in the student (`tensor`, `distributed`): no rank keeps a copy, and a stream
        of its own would have to stop all ranks. The next `push`, which includes it, does.
        """
        start = time.monotonic()
        kept = self._transport.staged()
        if kept is None:
            return None
        weights, num_updates, deliver = kept
        recipients = self._recipients([server])
        checksums = self._checksums(recipients)
        watched = Watched(weights, checksums)
        for _ in watched if checksums else ():
            pass
        self._update(recipients, deliver, num_updates, checksums)
        return self._report(recipients, False, watched.num_bytes, start)

    def release(self, servers: Sequence[ServerConnection]) -> Mapping[str, str]:
        """Colocated: have the servers give their memory up until the next push. Returns those that failed, and why."""
        if not self._spec.colocated:
            return {}
        recipients = Recipients(servers)
        recipients.ask(lambda server: release_memory(server, self._spec.timeout_seconds))
        self._released |= recipients.live.keys()
        return recipients.failed

    def close(self) -> None:
        self._transport.close()

    def _recipients(self, servers: Sequence[ServerConnection]) -> Recipients:
        recipients = Recipients(servers)
        recipients.facts = recipients.ask(read_facts)
        restarted = frozenset(
            url for url in recipients.live if recipients.facts[url].weight_version != self._served.get(url)
        )
        self._released -= restarted
        self._transport.forget(recipients, restarted)
        return recipients

    def _checksums(self, recipients: Recipients) -> dict[int, ServerChecksums]:
        facts = [recipients.facts[url] for url in recipients.live]
        wanted = {fact.tensor_ranks for fact in facts if self._spec.checksum and can_check(fact)}
        return {ranks: ServerChecksums(ranks, self._head_dim) for ranks in wanted}

    def _update(
        self, recipients: Recipients, deliver: Deliver, num_updates: int, checksums: Mapping[int, ServerChecksums]
    ) -> None:
        version = weight_version(self._run_id, num_updates)
        session = Session(
            version=version,
            timeout=self._spec.timeout_seconds,
            in_parts=self._transport.in_parts,
            released=frozenset(self._released),
            keeps_cache=self._spec.in_flight == "in_place",
        )
        # Until this is over they are not in order, however it ends.
        for url in recipients.facts:
            self._served.pop(url, None)
        session.run(recipients, deliver, checksums)
        self._served |= dict.fromkeys(recipients.live, version)
        self._released -= recipients.live.keys()

    def _report(self, recipients: Recipients, interrupted: bool, num_bytes: int, start: float) -> SyncReport:
        live = tuple(recipients.live)
        return SyncReport(
            synced=() if interrupted else live,
            failed=dict(recipients.failed),
            interrupted=live if interrupted else (),
            num_bytes=num_bytes,
            seconds=time.monotonic() - start,
        )


def make_sync(
    spec: SyncSpec, arch: Architecture, dtype: torch.dtype, *, run_id: str, run_dir: Path, device: torch.device
) -> ServerSync:
    """`device`, `dtype`: of the student's weights."""
    transport: Transport
    if spec.kind == "disk":
        folder = Path(spec.folder) / run_id if spec.folder else run_dir / "weights"
        keeps_cache = spec.in_flight == "in_place"
        transport = DiskTransport(
            folder=folder, arch=arch, dtype=dtype, timeout=spec.timeout_seconds, keeps_cache=keeps_cache
        )
    elif spec.kind == "tensor":
        transport = TensorTransport(bucket_bytes=spec.bucket_bytes, timeout=spec.timeout_seconds)
    else:
        backend = ("nccl" if device.type == "cuda" else "gloo") if spec.backend == "auto" else spec.backend
        transport = DistributedTransport(bucket_bytes=spec.bucket_bytes, backend=backend, timeout=spec.timeout_seconds)
    return ServerSync(spec, transport, run_id=run_id, head_dim=arch.head_dim)


def sync_weights(
    weights: Weights, num_updates: int, world: World, sync: ServerSync | None, servers: Sequence[ServerConnection]
) -> SyncReport:
    """Push the student's weights to the servers; the same report on every rank. Collective.

    `weights` is iterated once per pass, on all ranks: rank 0 sends, the others do their part in the collectives.
    A pass that a server's death interrupted is repeated for the sound ones. `sync` and `servers`: on rank 0 only.
    Raises ConfigError on every rank where the weights cannot be written, and ValueError for an iterator, which could
    not be repeated.
    """
    if isinstance(weights, Iterator):
        raise ValueError("weights: an iterator; give something that can be iterated again, such as HFWeights")
    failed: dict[str, str] = {}
    num_bytes, seconds = 0, 0.0
    for attempt in range(_PASSES):
        report = _one_pass(weights, num_updates, world, sync, servers)
        failed |= report.failed
        num_bytes, seconds = num_bytes + report.num_bytes, seconds + report.seconds
        if not report.interrupted:
            break
        servers = [server for server in servers if server.url in report.interrupted]
        if attempt == _PASSES - 1:
            reason = f"{_PASSES} updates in a row were interrupted by other servers"
            failed |= dict.fromkeys(report.interrupted, reason)
    return replace(report, failed=failed, interrupted=(), num_bytes=num_bytes, seconds=seconds)


_PASSES = 4
"""Each one more needs another server to die during an update."""


def _one_pass(
    weights: Weights, num_updates: int, world: World, sync: ServerSync | None, servers: Sequence[ServerConnection]
) -> SyncReport:
    stream = iter(weights)
    report: SyncReport | None = None
    problem: str | None = None
    if sync is not None:
        try:
            report = sync.push(stream, num_updates, servers)
        except ConfigError as error:
            problem = str(error)
    for _ in stream:
        pass  # the other ranks' part in the collectives, and rank 0's where it gave up
    problem, report = world.all_gather_objects((problem, report))[0]
    if problem is not None:
        raise ConfigError(problem)
    assert report is not None
    return report

"""`distributed`: buckets broadcast from the trainer's rank 0 to all servers at once, the way for many machines."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sync.buckets import Bucket, Weights, iter_buckets
from megatron_mopd.rollout.sync.group import BroadcastFailed, UpdateGroup, is_collateral
from megatron_mopd.rollout.sync.recipients import Recipients
from megatron_mopd.rollout.sync.transport import Deliver


class DistributedTransport:
    """Keeps its group from update to update; makes it anew when a server has died, returned, or failed.

    A server that dies while buckets are sent breaks the group of all: `BroadcastFailed`, and the others need the
    weights from the start. (One group, not one per server: rank 0 sends every byte once.)
    """

    in_parts = True

    def __init__(self, *, bucket_bytes: int, backend: str, timeout: float):
        self._bucket_bytes = bucket_bytes
        self._backend = backend
        self._timeout = timeout
        self._group: UpdateGroup | None = None

    def stage(self, weights: Weights, num_updates: int) -> Deliver:
        return partial(self._deliver, weights)

    def staged(self) -> None:
        return None

    def forget(self, recipients: Recipients, restarted: frozenset[str]) -> None:
        if self._group is not None and (restarted or self._group.urls != recipients.live.keys()):
            self._leave(recipients)

    def close(self) -> None:
        """Leave the group on this side; servers that go on drop theirs with the connection."""
        self._leave(Recipients([]))

    def _deliver(self, weights: Weights, recipients: Recipients) -> None:
        try:
            for bucket in iter_buckets(weights, self._bucket_bytes):
                if not recipients.live:
                    return
                if self._group is None or self._group.urls != recipients.live.keys():
                    # Here, with the servers paused: building it needs all of them to answer at once.
                    self._leave(recipients)
                    self._group = UpdateGroup.join(recipients, self._backend, self._timeout)
                self._send(bucket, self._group, recipients)
        except BroadcastFailed:
            self._leave(recipients)
            raise

    def _send(self, bucket: Bucket, group: UpdateGroup, recipients: Recipients) -> None:
        body: dict[str, Any] = {
            "names": [entry.name for entry in bucket.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.entries],
            "shapes": [list(entry.shape) for entry in bucket.entries],
            "group_name": group.name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }

        def ask(server: ServerConnection) -> None:
            server.post("/update_weights_from_distributed", body, timeout=self._timeout)

        failure: BroadcastFailed | None = None
        with recipients.asking(ask) as answers:
            try:
                group.broadcast(bucket.data, answers, self._timeout)
            except BroadcastFailed as error:
                failure = error
                # Now, not after the answers: servers that wait for the rest of the bucket answer when it is gone.
                refusers = Recipients([recipients.live[u] for u, f in answers.items() if f.done() and f.exception()])
                group.leave(refusers, self._timeout)
                self._group = None
        recipients.drop_failed(answers, is_collateral)
        if failure is None and group.urls != recipients.live.keys():
            failure = BroadcastFailed("a server could not take a bucket")
        if failure is not None:
            raise failure

    def _leave(self, recipients: Recipients) -> None:
        if self._group is not None:
            self._group.leave(recipients, self._timeout)
            self._group = None

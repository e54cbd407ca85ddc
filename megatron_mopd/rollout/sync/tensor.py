"""`tensor`: buckets inside the requests, one copy per tensor-parallel rank. For servers on the trainer's machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_mopd.rollout.sglang.http import ServerConnection
from megatron_mopd.rollout.sync.buckets import Weights, iter_buckets
from megatron_mopd.rollout.sync.payload import serialize
from megatron_mopd.rollout.sync.recipients import Recipients
from megatron_mopd.rollout.sync.transport import Deliver


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorTransport:
    bucket_bytes: int
    timeout: float
    in_parts: bool = True

    def stage(self, weights: Weights, num_updates: int) -> Deliver:
        return partial(self._deliver, weights)

    def _deliver(self, weights: Weights, recipients: Recipients) -> None:
        for bucket in iter_buckets(weights, self.bucket_bytes):
            if not recipients.live:
                return
            recipients.ask(partial(self._send, serialize(bucket), recipients))

    def _send(self, payload: str, recipients: Recipients, server: ServerConnection) -> None:
        body = {
            "serialized_named_tensors": [payload] * recipients.facts[server.url].tensor_ranks,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        server.post("/update_weights_from_tensor", body, timeout=self.timeout)

    def staged(self) -> None:
        return None

    def forget(self, recipients: Recipients, restarted: frozenset[str]) -> None:
        pass

    def close(self) -> None:
        pass

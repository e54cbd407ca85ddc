"""`rollout.sglang.sync`: how a step's weights reach the rollout servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mopd.yaml_config import require

Kind = Literal["distributed", "tensor", "disk"]
InFlight = Literal["retract", "in_place", "wait"]


@dataclass(frozen=True, kw_only=True)
class SyncSpec:
    kind: Kind = "distributed"
    """distributed: broadcast in a process group of the trainer's rank 0 and the servers · tensor: in the request
    itself, for servers on this machine · disk: safetensors files in a folder that the servers read."""
    bucket_mb: int = 512
    """`distributed`, `tensor`: MiB that travel at once. A tensor that is larger travels alone, whole."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """`distributed`: auto is nccl where the student is on GPUs, gloo elsewhere."""
    folder: str | None = None
    """`disk`: where the files lie, the same path here and on the servers; None: `weights` in the run folder. There has
    to be room for the model twice."""
    checksum: bool = True
    """Compare the servers' checksum of their weights with one made from what was sent. Servers on GPUs hash in another
    way, which is not rebuilt here: of them only the version is compared."""
    colocated: bool = False
    """`tensor`: the servers share their devices with the trainer, and give the memory up while it trains."""
    in_flight: InFlight = "retract"
    """`rollout.lag`: what an update does to answers under way. retract: they pause, their cache is computed again with
    the new weights, and they go on · in_place: they pause and go on with the cache of the old weights · wait: the
    update waits until what the servers have begun is answered, so that no answer has tokens of two versions."""
    timeout_seconds: float = 300.0
    """For one request or broadcast. A server that takes longer counts as dead."""

    def __post_init__(self) -> None:
        require(self.bucket_mb >= 1, "bucket_mb: must be >= 1")
        require(self.timeout_seconds > 0, "timeout_seconds: must be > 0")
        default = SyncSpec.__dataclass_fields__
        for key, kinds in _READ_BY.items():
            unset = getattr(self, key) == default[key].default
            require(unset or self.kind in kinds, f"{key}: only for kind {' or '.join(kinds)}, not '{self.kind}'")

    @property
    def bucket_bytes(self) -> int:
        return self.bucket_mb << 20


_READ_BY: dict[str, tuple[Kind, ...]] = {
    "bucket_mb": ("distributed", "tensor"),
    "backend": ("distributed",),
    "folder": ("disk",),
    "colocated": ("tensor",),
}
"""Keys that other kinds would ignore: set there, they are a misunderstanding."""

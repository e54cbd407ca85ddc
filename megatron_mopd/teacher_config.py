"""The part of a run's file that says who teaches, and where the teachers' weights wait for their turn."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mopd.yaml_config import require


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    checkpoint: str
    """Folder or Hub name with safetensors, a checkpoint of this program, or `self`: the student at the start."""


@dataclass(frozen=True, kw_only=True)
class TeacherMemorySpec:
    """One teacher at a time scores, on the device; the others wait in each rank's host memory, or on a disk."""

    host_gb: float | None = None
    """GB (10^9 bytes) of host memory for each rank; what does not fit goes to `folder`. null: everything fits."""
    folder: str | None = None
    """On a disk of the machine itself (NVMe). The files have no name any more once they are open: they end with the
    run, however it ends."""
    buffers: int = 1
    """Teachers on the device at once. 2: the next one is copied while this one scores."""

    def __post_init__(self) -> None:
        require(self.buffers in (1, 2), f"buffers: must be 1 or 2, got {self.buffers}")
        require(self.host_gb is None or self.host_gb >= 0, "host_gb: must be >= 0")
        require(
            self.host_gb is None or self.folder is not None,
            "folder: missing; host_gb needs a folder on a local disk for what does not fit",
        )
        require(
            self.folder is None or self.host_gb is not None,
            "host_gb: missing; folder is only used for what does not fit into host_gb",
        )

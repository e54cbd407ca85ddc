"""The weight version that a server is told: whose run it is, and how many updates the weights have seen."""

from __future__ import annotations


def weight_version(run_id: str, num_updates: int) -> str:
    """`<run id>:<updates>`: weights of another run are never taken for this run's."""
    return f"{run_id}:{num_updates}"


def num_updates_of(version: str, run_id: str) -> int:
    """The inverse of `weight_version`. Raises ValueError for a version that is not of this run."""
    owner, colon, number = version.rpartition(":")
    if not colon or owner != run_id or not (number.isascii() and number.isdigit()):
        raise ValueError(f"weight version '{version}' is not one of run '{run_id}'")
    return int(number)

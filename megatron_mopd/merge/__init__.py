"""Param-Merge: one model out of several by arithmetic on their weights, streamed slice by slice."""

from __future__ import annotations

from pathlib import Path

from megatron_mopd.merge.config import MergeConfig, load_merge_config

__all__ = ["MergeConfig", "load_merge_config", "merge"]


def merge(config: MergeConfig) -> Path:
    """Merge as `config` says, or find it done, and return the folder. Raises ConfigError before anything is written."""
    from megatron_mopd.merge.run import run_merge  # torch is imported only for a configuration that is good

    return run_merge(config)

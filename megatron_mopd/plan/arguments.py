"""The options of `mopd plan`. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_mopd.yaml_config import require

_CLUSTER = (
    ("gpus", int, "that train"),
    ("gpus_per_node", int, "default: 8"),
    ("device", str, "h100, h200 or cpu"),
    ("gpu_memory_gb", float, "default: the data sheet's"),
    ("host_memory_gb", float, "of a node; default: not compared"),
    ("network_gb_s", float, "of a GPU, one direction; default: 50 (400 Gb/s)"),
    ("reserve_gb", float, "of a GPU, for CUDA and NCCL; default: 4, assumed"),
    ("rollout_gpus", int, "more GPUs, for servers that answer; default: 0"),
    ("rollout_tensor", int, "GPUs of one server; default: 1"),
    ("price_per_gpu_hour", float, "default: no cost is given"),
)
"""Fields of a cluster file that are options too: name, type, help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line but for CONFIG and its overrides."""

    model: str | None = None
    cluster: str | None = None
    cluster_values: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ClusterSpec` that were given as options."""
    efficiency: float = 1.0
    response_share: float | None = None
    suggest: bool = False
    simulate: bool = False
    lag: int = 0
    scale_table: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        require(0 < self.efficiency <= 1, f"--efficiency: must be in (0, 1], got {self.efficiency}")
        share = self.response_share
        require(share is None or 0 < share <= 1, f"--response-share: must be in (0, 1], got {share}")
        require(self.lag >= 0, f"--lag: must be >= 0, got {self.lag}")
        require(
            not (self.suggest and self.simulate), "--simulate: shares out the layout of CONFIG; leave --suggest out"
        )


def add(parser: argparse.ArgumentParser) -> None:
    """CONFIG and the options."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of the run")
    parser.add_argument("--model", metavar="FOLDER", help="shapes: a folder with config.json, or a published name")
    parser.add_argument("--cluster", metavar="FILE", help="YAML file with a `cluster:` of the options below")
    for name, kind, text in _CLUSTER:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=kind.__name__.upper(), type=kind, help=text)
    parser.add_argument("--efficiency", metavar="F", type=float, default=1.0, help="assumed share of the ceilings")
    parser.add_argument("--response-share", metavar="F", type=float, help="mean answer / longest answer")
    parser.add_argument("--suggest", action="store_true", help="search layouts that fit")
    parser.add_argument("--simulate", action="store_true", help="every train:rollout share of the nodes")
    parser.add_argument("--lag", metavar="N", type=int, default=0, help="steps that --simulate's answers may be old")
    parser.add_argument("--scale-table", action="store_true", help="30B, 235B and 1T on paper; needs no CONFIG")
    parser.add_argument("--json", action="store_true", help="every figure with its origin")


def options(arguments: argparse.Namespace) -> Options:
    """Raises ConfigError for a value that is out of range."""
    values = {name: getattr(arguments, name) for name, _, _ in _CLUSTER}
    return Options(
        model=arguments.model,
        cluster=arguments.cluster,
        cluster_values={name: value for name, value in values.items() if value is not None},
        efficiency=arguments.efficiency,
        response_share=arguments.response_share,
        suggest=arguments.suggest,
        simulate=arguments.simulate,
        lag=arguments.lag,
        scale_table=arguments.scale_table,
        as_json=arguments.json,
    )

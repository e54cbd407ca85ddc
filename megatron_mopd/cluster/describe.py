"""A run's facts for the launcher, and what can be found wrong with it before it waits in a queue.

    python -m megatron_mopd.cluster.describe [OPTIONS] COMMAND CONFIG [key.path=value ...]

prints `name=value` lines: run_dir, steps, complete, servers, world, versions. A mistake is one line on stderr
and exit code 2, as from `mopd`. Imports torch only with --full.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mopd.cluster.node_check import versions
from megatron_mopd.config import RunConfig, check_layout, load_config
from megatron_mopd.hub import resolve_folder
from megatron_mopd.merge.config import load_merge_config
from megatron_mopd.rank_process import EXIT_CONFIG
from megatron_mopd.student.checkpoint_files import find_latest, free_bytes, read_manifest
from megatron_mopd.yaml_config import ConfigError

COMMANDS = ("run", "eval", "sample", "export", "merge")
TRAINING_STATE_BYTES = 12
"""Of one parameter in a checkpoint's state: fp32 weight and Adam's two moments."""
NODE_LOCAL = {"tmpfs", "ramfs", "overlay"}
"""File systems that no other node can see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The nodes of a job."""

    nodes: int
    rollout_nodes: int
    ranks_per_node: int
    colocated: bool = False
    spare_nodes: int = 0

    def __post_init__(self) -> None:
        if self.train_nodes < 1:
            raise ConfigError(
                f"nodes: {self.nodes} nodes - {self.rollout_nodes} for rollouts - {self.spare_nodes} spare leave none "
                "to train on; ask for more with -N"
            )

    @property
    def train_nodes(self) -> int:
        return self.nodes - self.spare_nodes - (0 if self.colocated else self.rollout_nodes)

    @property
    def world(self) -> int:
        return self.train_nodes * self.ranks_per_node


def describe(command: str, path: str, overrides: Sequence[str], shape: Shape | None, *, full: bool) -> dict[str, str]:
    """The facts of `command` on `shape` (None: not known yet). Raises ConfigError."""
    if command == "merge":
        # The merge makes its folder itself, when it is complete: the job's logs lie beside it.
        return {"run_dir": f"{Path(load_merge_config(path, overrides).out).absolute()}.job"}
    config = load_config(path, overrides)
    if shape is not None:
        _check_shape(config, shape, command)
        if full:
            _check_files(config, shape, command)
    latest = find_latest(Path(config.run_dir)) if command == "run" else None
    complete = latest is not None and read_manifest(latest).step >= config.steps
    return {
        "run_dir": str(Path(config.run_dir).absolute()),
        "steps": str(config.steps),
        "complete": str(int(complete)),
        "servers": str(_servers(config)),
        "world": str(shape.world) if shape else "",
    }


def _servers(config: RunConfig) -> int:
    """Rollout servers on a node that has them."""
    spec = config.rollout.sglang
    return spec.launch.servers if spec and spec.launch else 0


def _check_shape(config: RunConfig, shape: Shape, command: str) -> None:
    asked = config.parallel.ranks
    if asked is not None and asked != shape.world:
        raise ConfigError(
            f"parallel.ranks: the configuration is for {asked} ranks, the job has {shape.train_nodes} training nodes x "
            f"{shape.ranks_per_node} = {shape.world}; set parallel.ranks={shape.world}, or ask for other nodes"
        )
    check_layout(config.parallel, shape.world)
    _check_servers(config, shape)


def _check_servers(config: RunConfig, shape: Shape) -> None:
    if not shape.rollout_nodes:
        return  # servers that run already, or that the run starts itself on its first node
    launch = config.rollout.sglang.launch if config.rollout.sglang else None
    if config.rollout.engine != "sglang":
        raise ConfigError(
            f"--rollout-nodes: rollout.engine '{config.rollout.engine}' needs no servers; "
            "remove the option (or the second part of the het job), or set rollout.engine=sglang"
        )
    if launch is None:
        raise ConfigError(
            "rollout.sglang: has urls of servers that run already; remove --rollout-nodes (or the second part of the "
            "het job), or say in rollout.sglang.launch what is to be started on a node"
        )


def _check_files(config: RunConfig, shape: Shape, command: str) -> None:
    from megatron_mopd import preflight  # imports torch

    if command == "run":
        preflight.check(config, shape.world)
        _check_space(config)


def _check_space(config: RunConfig) -> None:
    """Raise ConfigError when the disk of the run folder has no room for the checkpoints that it will hold at once."""
    from megatron_mopd.student.architecture import read_architecture
    from megatron_mopd.student.weight_table import model_tensors

    arch = read_architecture(resolve_folder(config.model.source, "model"))
    parameters = sum(math.prod(tensor.shape) for tensor in model_tensors(arch))
    weight_bytes = 4 if config.model.dtype == "float32" else 2
    # In the state and as safetensors; while one is written, the older ones are still there.
    one = parameters * (TRAINING_STATE_BYTES + 2 * weight_bytes)
    needed, free = one * (config.checkpoint.keep_last + 1), free_bytes(Path(config.run_dir))
    if free < needed:
        raise ConfigError(
            f"run_dir: {config.run_dir} has {free / 1e9:.1f} GB free; {config.checkpoint.keep_last + 1} checkpoints of "
            f"{one / 1e9:.1f} GB are kept or being written; free space, or lower checkpoint.keep_last"
        )


def check_shared(folder: Path, mounts: str, nodes: int) -> None:
    """Raise ConfigError when `folder` lies on a file system that only this machine sees. mounts: of /proc/mounts."""
    if nodes < 2:
        return
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists()).resolve()
    kinds = {line.split()[1]: line.split()[2] for line in mounts.splitlines()}
    point = next(str(path) for path in (existing, *existing.parents) if str(path) in kinds)
    if kinds[point] in NODE_LOCAL or existing.is_relative_to("/tmp"):
        raise ConfigError(
            f"run_dir: {folder} is on this machine only ({kinds[point]} at {point}); "
            "name a folder that all nodes share, or set MOPD_SHARED_STORAGE=yes if they do share it"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts; 2 after a ConfigError."""
    parser = argparse.ArgumentParser(prog="describe", allow_abbrev=False)
    for option in ("nodes", "rollout-nodes", "ranks-per-node", "spare-nodes"):
        parser.add_argument(f"--{option}", type=int, default=0)
    parser.add_argument("--colocated", action="store_true", help="the rollout nodes train too")
    parser.add_argument("--full", action="store_true", help="check files, space and storage too")
    parser.add_argument("--shared", action="store_true", help="the user says that run_dir is shared")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("config")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    overrides = [item for item in arguments.rest if "=" in item and not item.startswith("-")]
    try:
        shape = _shape(arguments)
        if arguments.full and not arguments.shared and shape is not None:
            folder = describe(arguments.command, arguments.config, overrides, shape, full=False)["run_dir"]
            check_shared(Path(folder), Path("/proc/mounts").read_text(), shape.nodes)
        facts = describe(arguments.command, arguments.config, overrides, shape, full=arguments.full)
    except ConfigError as error:
        print(f"mopd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CONFIG
    for name, value in (facts | {"versions": versions()}).items():
        print(f"{name}={value}")
    return 0


def _shape(arguments: argparse.Namespace) -> Shape | None:
    if not arguments.nodes:
        return None
    if arguments.ranks_per_node < 1:
        raise ConfigError(
            "GPUs per node: not known; add --gpus-per-node=8 to sbatch (nodes without GPUs: --ranks-per-node=N)"
        )
    return Shape(
        nodes=arguments.nodes,
        rollout_nodes=arguments.rollout_nodes,
        ranks_per_node=arguments.ranks_per_node,
        colocated=arguments.colocated,
        spare_nodes=arguments.spare_nodes,
    )


if __name__ == "__main__":
    sys.exit(main())

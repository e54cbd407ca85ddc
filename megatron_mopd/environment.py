"""What this process was given by the machine: threads, GPUs, and a place in a world that others have started.

Imports no torch: thread settings must be in place before that, and a launcher must not touch CUDA.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

from megatron_mopd.config import ParallelSpec
from megatron_mopd.yaml_config import ConfigError


def prepare_environment() -> None:
    """Thread settings of a rank; call it before anything imports torch. What the user has set stays.

    Ranks share the cores: one thread each, and none that spins while it waits for the others.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Megatron and torch say at import that there is no GPU and no GPU package. On a machine with GPUs, a
    # missing Transformer Engine is an error of `start_world`'s.
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def gpu_count() -> int:
    """GPUs that this process may use, found without CUDA (which would make a fork useless)."""
    present = sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    return sum(1 for item in visible.split(",") if item.strip() not in ("", "-1"))


def joined_world() -> tuple[int, int] | None:
    """(rank, world size) when torchrun or srun has started this process as one of several ranks.

    From srun's variables those of torchrun are set. An sbatch script has SLURM_PROCID too: only with
    MASTER_ADDR is it taken as a rank. Raises ConfigError for an address without a port.
    """
    env = os.environ
    if "RANK" not in env and "MASTER_ADDR" in env and "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ConfigError(f"the environment has RANK but no {' and no '.join(missing)}; set it, or unset RANK")
    return int(env["RANK"]), int(env["WORLD_SIZE"])


def world_size(parallel: ParallelSpec) -> int:
    """Ranks of the run: those of the world that was joined, else those that `run_ranks` will start here."""
    joined = joined_world()
    return joined[1] if joined else parallel.ranks or gpu_count() or parallel.default_ranks

"""The machines of a plan: GPUs and their data-sheet ceilings, from options or a small YAML file.

cluster:
  gpus: 128
  gpus_per_node: 8
  device: h100
  price_per_gpu_hour: 2.5
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_mopd.yaml_config import ConfigError, build, load_yaml, read_text, require

DeviceName = Literal["h100", "h200", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Data-sheet ceilings of one device. Bandwidths are GB/s in one direction; 0: none is stated, so no time."""

    memory_gb: float
    tflops_bf16: float
    """Dense, without sparsity."""
    tflops_fp32: float
    hbm_gb_s: float
    nvlink_gb_s: float
    pcie_gb_s: float
    source: str


DEVICES: Mapping[DeviceName, Device] = {
    "h100": Device(
        memory_gb=80,
        tflops_bf16=989.4,
        tflops_fp32=67,
        hbm_gb_s=3350,
        nvlink_gb_s=450,
        pcie_gb_s=64,
        source="NVIDIA H100 Tensor Core GPU data sheet, SXM5 (bf16 1,979 TFLOPS with sparsity, half of it dense; "
        "NVLink 900 GB/s and PCIe Gen5 128 GB/s in both directions together)",
    ),
    "h200": Device(
        memory_gb=141,
        tflops_bf16=989.4,
        tflops_fp32=67,
        hbm_gb_s=4800,
        nvlink_gb_s=450,
        pcie_gb_s=64,
        source="NVIDIA H200 Tensor Core GPU data sheet, SXM",
    ),
    "cpu": Device(
        memory_gb=0,
        tflops_bf16=0,
        tflops_fp32=0,
        hbm_gb_s=0,
        nvlink_gb_s=0,
        pcie_gb_s=0,
        source="ranks on this machine's cores: no data sheet, so no ceilings",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    gpus: int
    """Ranks of training: GPUs, or processes where the device is a CPU; left out, the fewest of the layout."""
    gpus_per_node: int = 8
    """GPUs, or ranks on a CPU, of one machine."""
    device: DeviceName = "h100"
    """Whose data-sheet ceilings count."""
    gpu_memory_gb: float | None = None
    """Per GPU; default: the data sheet's. On a CPU: of the whole machine."""
    host_memory_gb: float | None = None
    """Per node; default: unknown, and then nothing is compared with it."""
    network_gb_s: float = 50.0
    """Per GPU, one direction: 400 Gb/s InfiniBand NDR, one port a GPU, as in NVIDIA's DGX H100 data sheet."""
    reserve_gb: float = 4.0
    """Per GPU, assumed: CUDA context, NCCL buffers, the allocator's fragments."""
    rollout_gpus: int = 0
    """GPUs that answer besides those that train, under a server like SGLang; 0: none."""
    rollout_tensor: int = 1
    """GPUs that hold one copy of the student there."""
    price_per_gpu_hour: float | None = None
    """In whatever currency; null: no cost is given."""

    def __post_init__(self) -> None:
        require(self.gpus >= 1, "gpus: must be >= 1")
        require(self.gpus_per_node >= 1, "gpus_per_node: must be >= 1")
        require(self.gpu_memory_gb is None or self.gpu_memory_gb > 0, "gpu_memory_gb: must be > 0")
        require(self.host_memory_gb is None or self.host_memory_gb > 0, "host_memory_gb: must be > 0")
        require(self.network_gb_s > 0, "network_gb_s: must be > 0")
        require(self.reserve_gb >= 0, "reserve_gb: must be >= 0")
        require(self.rollout_gpus >= 0, "rollout_gpus: must be >= 0")
        require(self.rollout_tensor >= 1, "rollout_tensor: must be >= 1")
        require(self.price_per_gpu_hour is None or self.price_per_gpu_hour >= 0, "price_per_gpu_hour: must be >= 0")
        if self.rollout_gpus % self.rollout_tensor:
            raise ConfigError(
                f"rollout_gpus: {self.rollout_gpus} is not a multiple of rollout_tensor {self.rollout_tensor}"
            )
        for name in ("gpus", "rollout_gpus"):
            count = getattr(self, name)
            if count > self.gpus_per_node and count % self.gpus_per_node:
                raise ConfigError(
                    f"{name}: {count} is not a whole number of nodes of {self.gpus_per_node}; "
                    f"use a multiple, or set gpus_per_node"
                )

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def ceilings(self) -> Device:
        return DEVICES[self.device]

    @property
    def memory_gb(self) -> float | None:
        """Of one GPU; None where it is not known."""
        return self.gpu_memory_gb or self.ceilings.memory_gb or None

    @property
    def ranks_per_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node) + -(-self.rollout_gpus // self.gpus_per_node)

    def link_gb_s(self, ranks: int) -> float:
        """The slowest link in a group of `ranks` neighbours."""
        inside = ranks <= self.gpus_per_node
        return self.ceilings.nvlink_gb_s if inside else min(self.network_gb_s, self.ceilings.nvlink_gb_s)

    def tflops(self, dtype: str) -> float:
        return self.ceilings.tflops_bf16 if dtype == "bfloat16" else self.ceilings.tflops_fp32


def read_cluster(file: str | None, options: Mapping[str, Any], default_gpus: int) -> ClusterSpec:
    """The `cluster:` of a YAML file, with the options that were given in its place. Raises ConfigError."""
    tree: dict[str, Any] = {}
    if file is not None:
        text = load_yaml(read_text(file, "cluster file"), file)
        if set(text) != {"cluster"} or not isinstance(text["cluster"], dict):
            raise ConfigError(f"{file}: expected one mapping called 'cluster'; see `mopd plan --help`")
        tree = dict(text["cluster"])
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return build(ClusterSpec, {"gpus": default_gpus, **tree, **given})
    except ConfigError as error:
        raise ConfigError(f"{file or 'cluster'}: {error}") from None


def with_gpus(cluster: ClusterSpec, gpus: int) -> ClusterSpec:
    """The same machines, as many as hold `gpus`."""
    return replace(cluster, gpus=gpus)

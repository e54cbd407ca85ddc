"""Bytes that one GPU sends in a step, by what for. Rings: of n ranks each sends (n - 1)/n of the whole."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.memory import GRADIENT_BYTES, Setting, offloaded_bytes
from megatron_mopd.student.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Flow:
    """One reason to move bytes."""

    key: str
    phase: str
    """Of the step: teacher, update or sync."""
    bytes: float
    """Sent by one GPU in a step."""
    gb_s: float
    """Ceiling of the slowest link on the way; 0 where there is none."""
    link: str
    formula: str

    @property
    def seconds(self) -> float:
        return self.bytes / (self.gb_s * 1e9) if self.gb_s else 0.0


def flows(setting: Setting, cluster: ClusterSpec) -> tuple[Flow, ...]:
    """All flows of a step, on the fullest rank; balanced routing, mean lengths."""
    found = [
        *_tensor(setting, cluster),
        *_context(setting, cluster),
        *_expert(setting, cluster),
        *_pipeline(setting, cluster),
        *_data(setting, cluster),
        *_teachers(setting, cluster),
        *_moments(setting, cluster),
        *_sync(setting, cluster),
    ]
    return tuple(flow for flow in found if flow.bytes)


def _rank_tokens(setting: Setting) -> float:
    """Of a step, on one context rank."""
    return setting.workload.tokens / setting.data_ranks / setting.parallel.context


def _ring(size: int) -> float:
    return (size - 1) / size


def _flow(cluster: ClusterSpec, extent: int, key: str, phase: str, size: float, formula: str) -> Flow:
    """extent: neighbouring ranks that the group spans."""
    inside = extent <= cluster.gpus_per_node
    return Flow(key, phase, size, cluster.link_gb_s(extent), "NVLink" if inside else "network", formula)


def _passes(setting: Setting, forward: float, backward: float) -> float:
    """Of the update: forward once, twice with recomputation."""
    return forward * (2 if setting.parallel.recompute else 1) + backward


def _tensor(setting: Setting, cluster: ClusterSpec) -> list[Flow]:
    """Sequence parallelism (arXiv 2205.05198 sec. 4.2): forward gathers a block's input and scatters its output,
    backward does both the other way round and gathers the input once more for the weight's gradient."""
    parallel, b = setting.parallel, setting.itemsize
    size = parallel.tensor

    def one(arch_layers: int, hidden: int, moe: bool) -> float:
        blocks = 1 if moe else 2
        return blocks * _rank_tokens(setting) * hidden * b * _ring(size) * arch_layers / parallel.pipeline

    arch = setting.count.arch
    student = one(arch.num_layers, arch.hidden_size, arch.is_moe)
    teacher = sum(share * one(a.num_layers, a.hidden_size, a.is_moe) for a, share in _teacher_shares(setting))
    formula = "tokens x H x bytes x (t-1)/t a collective; 2 forward, 3 backward a layer (attention; MLP too if dense)"
    return [
        _flow(cluster, size, "tensor_parallel", "update", _passes(setting, 2, 3) * student, formula),
        _flow(cluster, size, "tensor_parallel_teacher", "teacher", 2 * teacher, formula),
    ]


def _context(setting: Setting, cluster: ClusterSpec) -> list[Flow]:
    """Keys and values go around the ring; backward once more, and their gradients after them (Ring Attention, arXiv
    2310.01889 sec. 3)."""
    parallel = setting.parallel

    def one(arch: Architecture) -> float:
        wide = 2 * arch.num_kv_heads * arch.head_dim / parallel.tensor
        layers = arch.num_layers / parallel.pipeline
        return _rank_tokens(setting) * (parallel.context - 1) * wide * setting.itemsize * layers

    student = one(setting.count.arch)
    teacher = sum(share * one(arch) for arch, share in _teacher_shares(setting))
    extent = parallel.tensor * parallel.context
    formula = "tokens/c x (c-1) x 2 K/t x bytes a time round; once forward, twice backward a layer"
    return [
        _flow(cluster, extent, "context_parallel", "update", _passes(setting, 1, 2) * student, formula),
        _flow(cluster, extent, "context_parallel_teacher", "teacher", teacher, formula),
    ]


def _teacher_shares(setting: Setting) -> list[tuple[Architecture, float]]:
    """(architecture, its share of the step's tokens) of each teacher."""
    tokens = setting.workload.tokens
    shares = []
    for name, teacher in zip(setting.config.teachers, setting.teachers, strict=True):
        own = sum(load.rollouts * load.mean for load in setting.workload.domains if load.teacher == name)
        shares.append((teacher.arch, own / tokens))
    return shares


def _expert(setting: Setting, cluster: ClusterSpec) -> list[Flow]:
    parallel, b = setting.parallel, setting.itemsize
    if parallel.expert == 1:
        return []
    per_rank = _rank_tokens(setting) / parallel.tensor

    def one(arch: Architecture) -> float:
        layers = arch.num_layers / parallel.pipeline
        return per_rank * arch.experts_per_token * arch.hidden_size * b * _ring(parallel.expert) * layers

    student = one(setting.count.arch)
    teacher = sum(share * one(arch) for arch, share in _teacher_shares(setting))
    formula = "tokens/t x k x H x bytes x (e-1)/e an all-to-all; dispatch and combine, forward and backward"
    return [
        _flow(cluster, parallel.expert, "expert_all_to_all", "update", _passes(setting, 2, 2) * student, formula),
        _flow(cluster, parallel.expert, "expert_all_to_all_teacher", "teacher", 2 * teacher, formula),
    ]


def _pipeline(setting: Setting, cluster: ClusterSpec) -> list[Flow]:
    parallel = setting.parallel
    if parallel.pipeline == 1:
        return []
    hidden = setting.count.arch.hidden_size
    size = _rank_tokens(setting) / parallel.tensor * hidden * setting.itemsize
    extent = setting.ranks // parallel.pipeline + 1
    return [_flow(cluster, extent, "pipeline", "update", 2 * size, "tokens/t x H x bytes, forward and backward")]


def _data(setting: Setting, cluster: ClusterSpec) -> list[Flow]:
    """The distributed optimizer: gradients are scattered in fp32, updated weights gathered. Experts in their groups."""
    shard = setting.count.shard(setting.parallel, 0)
    each = (GRADIENT_BYTES + setting.itemsize) * setting.workload.updates
    stage = setting.ranks // setting.parallel.pipeline
    formula = "(4 + weight bytes) x parameters x (n-1)/n an update"
    dense = each * shard.dense * _ring(setting.optimizer_ranks)
    experts = each * shard.experts * _ring(setting.expert_data_ranks)
    return [
        _flow(cluster, stage, "data_parallel", "update", dense, formula),
        _flow(cluster, stage, "expert_data_parallel", "update", experts, formula + ", of the ranks with these experts"),
    ]


def _teachers(setting: Setting, cluster: ClusterSpec) -> list[Flow]:
    """Swaps from pinned host memory. A teacher that is alone in its slot stays there."""
    if setting.spec == "local" or not setting.teachers:
        return []
    alone = [teacher.arch for teacher in setting.teachers]
    swapped = sum(
        teacher.shard(setting.parallel, 0).total for teacher in setting.teachers if alone.count(teacher.arch) > 1
    )
    size = swapped * setting.itemsize * setting.workload.updates
    return [
        Flow(
            "teacher_swaps",
            "teacher",
            size,
            cluster.ceilings.pcie_gb_s,
            "PCIe",
            "teachers x their shard's bytes x updates, from host memory",
        )
    ]


def _moments(setting: Setting, cluster: ClusterSpec) -> list[Flow]:
    size = 2 * offloaded_bytes(setting, 0) * setting.workload.updates
    formula = "8 bytes x parameters that the rank updates, there and back, an update"
    return [Flow("offloaded_moments", "update", size, cluster.ceilings.pcie_gb_s, "PCIe", formula)]


def _sync(setting: Setting, cluster: ClusterSpec) -> list[Flow]:
    """New weights to the rollout engines: every rank gathers the whole model, or every server gets a copy."""
    whole = setting.count.parameters * setting.itemsize
    if setting.engine_here:
        own = setting.count.shard(setting.parallel, 0).total * setting.itemsize
        extent = max(setting.parallel.tensor, setting.parallel.expert)
        formula = "whole model less the own shard, gathered by every rank"
        return [_flow(cluster, extent, "weight_sync", "sync", max(0.0, whole - own), formula)]
    if not cluster.rollout_gpus:
        return []
    size = whole / cluster.rollout_tensor
    formula = "whole model / rollout_tensor, into every server GPU"
    return [Flow("weight_sync", "sync", size, cluster.network_gb_s, "network", formula)]

"""Layouts that fit: a search over tensor x pipeline x context x expert x recomputation x micro-batch, the cheapest
first."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_mopd.config import ParallelSpec, check_layout
from megatron_mopd.plan.cluster import ClusterSpec, with_gpus
from megatron_mopd.plan.compute import step_flops
from megatron_mopd.plan.count import built_shard
from megatron_mopd.plan.faults import FULL, memory_share
from megatron_mopd.plan.memory import Setting, fullest
from megatron_mopd.plan.traffic import flows
from megatron_mopd.student.architecture import Architecture, check_architecture
from megatron_mopd.yaml_config import ConfigError

MICRO_BATCHES = (1, 2, 4)
"""Tried as `optim.max_tokens_per_microbatch`, times the longest answer with its prompt."""
CONTEXTS = (1, 2, 4, 8)
SHORTEST_SHARE = 4096
"""Tokens of the longest answer that a context rank should have: with fewer its matrix products get small."""
MOST_GPUS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    setting: Setting
    share: float
    """Of a GPU's memory."""
    memory_gb: float
    """Without the reserve."""
    seconds: float
    """Scoring and update by ceilings, arithmetic and links one after the other, with the pipeline's bubble: to rank
    layouts by, no forecast."""

    @property
    def fits(self) -> bool:
        return self.share <= FULL


def layouts(arch: Architecture, gpus: int, gpus_per_node: int, longest: int) -> Iterator[ParallelSpec]:
    """Every layout that the ranks and the model allow, for answers of up to `longest` tokens with their prompts.
    Tensor parallelism stays inside a node: it sends most."""
    heads = math.gcd(arch.num_heads, arch.num_kv_heads)
    tensors = _divisors(heads if arch.is_moe else math.gcd(heads, arch.ffn_size))
    degrees = itertools.product(
        (tensor for tensor in tensors if tensor <= gpus_per_node),
        _divisors(arch.num_layers),
        (context for context in CONTEXTS if context == 1 or longest >= context * SHORTEST_SHARE),
        _divisors(arch.num_experts) if arch.is_moe else (1,),
        (False, True),
    )
    for tensor, pipeline, context, expert, recompute in degrees:
        layout = ParallelSpec(tensor=tensor, pipeline=pipeline, context=context, expert=expert, recompute=recompute)
        if _is_valid(arch, layout, gpus):
            yield layout


def _is_valid(arch: Architecture, layout: ParallelSpec, gpus: int) -> bool:
    try:
        check_layout(layout, gpus)
        check_architecture(arch, layout)
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def search(base: Setting, cluster: ClusterSpec) -> list[Suggestion]:
    """All layouts of `cluster.gpus` ranks: those that fit, fastest first; after them the others, smallest first."""
    found = []
    for layout in layouts(base.count.arch, cluster.gpus, cluster.gpus_per_node, base.workload.longest):
        if any(not _is_valid(teacher.arch, layout, cluster.gpus) for teacher in base.teachers):
            continue
        data_ranks = cluster.gpus // (layout.tensor * layout.pipeline * layout.context)
        if data_ranks > max(1, base.workload.rollouts // base.workload.updates):
            continue  # ranks without an answer to learn from
        seen = set()
        for times in MICRO_BATCHES:
            setting = replace(base, parallel=layout, ranks=cluster.gpus, max_tokens=times * base.workload.longest)
            if setting.packing not in seen:
                seen.add(setting.packing)
                found.append(_judge(setting, cluster))
    return sorted(found, key=lambda each: (not each.fits, each.seconds if each.fits else each.memory_gb))


def _judge(setting: Setting, cluster: ClusterSpec) -> Suggestion:
    memory = fullest(setting)[1]
    rate = cluster.tflops(setting.config.model.dtype) * 1e12 * setting.ranks
    seconds = 0.0
    if rate:
        flops = step_flops(setting)
        bubble = 1 + (setting.parallel.pipeline - 1) / setting.packing.count
        moved = sum(flow.seconds for flow in flows(setting, cluster) if flow.phase != "sync")
        seconds = (flops.teacher + flops.update) / rate * bubble + moved
    return Suggestion(
        setting=setting, share=memory_share(cluster, memory), memory_gb=memory.total / 1e9, seconds=seconds
    )


def distinct(suggestions: list[Suggestion], count: int) -> list[Suggestion]:
    """The first `count` with layouts of their own."""
    first: dict[tuple[int, ...], Suggestion] = {}
    for each in suggestions:
        parallel = each.setting.parallel
        first.setdefault((parallel.tensor, parallel.pipeline, parallel.context, parallel.expert), each)
    return list(first.values())[:count]


def verify(setting: Setting) -> None:
    """Build what a user would start: Megatron's configuration, and one rank of the first, second and last stage on the
    meta device, whose parameters must be those that the plan counts with.

    Raises ConfigError where the layout is not valid, RuntimeError where the count is wrong (a defect).
    """
    from megatron_mopd.student.model import transformer_config

    arch, parallel = setting.count.arch, setting.parallel
    check_layout(parallel, setting.ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron deprecates its own defaults
        transformer_config(arch, parallel, getattr(torch, setting.config.model.dtype), training=True)
    for stage in sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1}):
        built, cut = built_shard(arch, parallel, setting.ranks, stage), setting.count.shard(parallel, stage)
        if built != cut:
            raise RuntimeError(f"{parallel}, stage {stage}: Megatron builds {built}, the plan counts {cut}")


def fewest_gpus(base: Setting, cluster: ClusterSpec) -> int | None:
    """The fewest GPUs, by doubling whole nodes, on which some layout fits; None if not even `MOST_GPUS`."""
    gpus = cluster.gpus
    while gpus < MOST_GPUS:
        gpus = max(2 * gpus, cluster.gpus_per_node)
        found = search(base, with_gpus(cluster, gpus))
        if found and found[0].fits:
            return gpus
    return None

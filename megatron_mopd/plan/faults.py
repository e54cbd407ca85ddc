"""What a plan finds wrong with a run: memory of GPUs, hosts and servers that is too small, each with a remedy."""

from __future__ import annotations

from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.figure import GB
from megatron_mopd.plan.memory import Setting, StageMemory, offloaded_bytes
from megatron_mopd.plan.rollout_memory import SERVER_FRACTION, server_memory

FULL = 0.9
"""Share of a GPU's memory from which a plan warns."""


def memory_share(cluster: ClusterSpec, memory: StageMemory) -> float:
    """Of what a GPU (on a CPU: a rank's part of the machine) has; 0 where that is not known."""
    if not cluster.memory_gb:
        return 0.0
    if cluster.is_cpu:
        return memory.total * cluster.gpus / GB / cluster.memory_gb
    answering = memory.always + servers_bytes(cluster, memory)
    return (max(memory.total, answering) / GB + cluster.reserve_gb) / cluster.memory_gb


def servers_bytes(cluster: ClusterSpec, memory: StageMemory) -> float:
    """What servers on the same GPU take of it while they answer; they give it up for the rest of a step."""
    free = ((cluster.memory_gb or 0) - cluster.reserve_gb) * GB - memory.before_update
    return memory.server_share * max(0.0, free)


def host_teacher_bytes(setting: Setting, ranks_per_node: int) -> float:
    """Of one node: every rank keeps its shard of every teacher. Equal shards of two teachers are kept once; a plan
    cannot know them and counts none."""
    stages = range(setting.parallel.pipeline)
    shard = max((sum(t.shard(setting.parallel, s).total for t in setting.teachers) for s in stages), default=0)
    return shard * setting.itemsize * ranks_per_node


def host_moment_bytes(setting: Setting, ranks_per_node: int) -> float:
    """Of one node, with `optim.offload`."""
    return ranks_per_node * max(offloaded_bytes(setting, stage) for stage in range(setting.parallel.pipeline))


def warnings_of(setting: Setting, cluster: ClusterSpec, memory: StageMemory) -> list[str]:
    found = []
    share = memory_share(cluster, memory)
    if share > FULL:
        need = share * (cluster.memory_gb or 0)
        found.append(
            f"memory: {need:.1f} GB of {cluster.memory_gb:g} GB ({share:.0%}) is more than {FULL:.0%}; "
            f"{_remedy(setting, cluster, memory)}"
        )
    teachers = host_teacher_bytes(setting, cluster.ranks_per_node) / GB
    moments = host_moment_bytes(setting, cluster.ranks_per_node) / GB
    if cluster.host_memory_gb and teachers + moments > FULL * cluster.host_memory_gb:
        what = "the teachers" + (f" and {moments:.1f} GB of AdamW's moments" if moments else "")
        found.append(
            f"host memory: {what} take {teachers + moments:.1f} GB of a node's {cluster.host_memory_gb:g} GB; "
            "set teacher_memory.host_gb and folder, raise parallel.tensor, pipeline or expert, or use more nodes"
        )
    found += _colocated(setting, cluster, memory)
    if cluster.rollout_gpus and cluster.memory_gb:
        room = server_memory(
            setting.count, setting.workload, cluster.rollout_tensor, GB * cluster.memory_gb, setting.itemsize
        )
        if room.tokens < setting.workload.longest:
            found.append(
                f"rollout servers: a copy has room for {max(0, room.tokens):,.0f} tokens, one answer may take "
                f"{setting.workload.longest:,}; raise --rollout-tensor"
            )
    return found


def _colocated(setting: Setting, cluster: ClusterSpec, memory: StageMemory) -> list[str]:
    sglang = setting.config.rollout.sglang
    if not memory.server_share or sglang is None or sglang.launch is None:
        return []
    gpu_bytes = servers_bytes(cluster, memory) / SERVER_FRACTION
    room = server_memory(setting.count, setting.workload, sglang.launch.tensor, gpu_bytes, setting.itemsize)
    if room.tokens >= setting.workload.longest:
        return []
    return [
        f"servers on the same GPUs: a copy has room for {room.tokens:,.0f} tokens, one answer may take "
        f"{setting.workload.longest:,}; raise rollout.sglang.launch.tensor or --mem-fraction-static"
    ]


def _remedy(setting: Setting, cluster: ClusterSpec, memory: StageMemory) -> str:
    """What the largest part suggests that can be made smaller."""
    if memory.server_share and memory.always + servers_bytes(cluster, memory) > memory.total:
        return "lower --mem-fraction-static in rollout.sglang.launch.arguments"
    again = setting.parallel.recompute
    choices = {
        "the in-process engine keeps a whole student on every GPU: use `--rollout-gpus`": memory.rollout_weights,
        "lower rollout.batch_size": memory.rollout_cache,
        "set parallel.recompute": 0.0 if again else memory.activations,
        "raise parallel.context, or lower optim.max_tokens_per_microbatch": memory.activations if again else 0.0,
        "score fewer answers at once (optim.updates_per_step)": memory.teacher_scores,
        "use more GPUs: the optimizer is sharded over data parallel; or set optim.offload": (
            0.0 if setting.config.optim.offload else memory.optimizer
        ),
        "raise parallel.expert, tensor or pipeline (`--suggest` searches)": memory.weights + memory.gradients,
    }
    return max(choices, key=lambda text: choices[text])

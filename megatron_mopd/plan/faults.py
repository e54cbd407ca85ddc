"""What a plan finds wrong with a run: memory of GPUs, hosts and servers that is too small, each with a remedy."""

from __future__ import annotations

from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.figure import GB
from megatron_mopd.plan.memory import Setting, StageMemory
from megatron_mopd.plan.rollout_memory import server_memory

FULL = 0.9
"""Share of a GPU's memory from which a plan warns."""


def memory_share(cluster: ClusterSpec, memory: StageMemory) -> float:
    """Of what a GPU (on a CPU: a rank's part of the machine) has; 0 where that is not known."""
    if not cluster.memory_gb:
        return 0.0
    if cluster.is_cpu:
        return memory.total * cluster.gpus / GB / cluster.memory_gb
    return (memory.total / GB + cluster.reserve_gb) / cluster.memory_gb


def host_teacher_bytes(setting: Setting, ranks_per_node: int) -> float:
    """Of one node: every rank keeps its shard of every teacher. Equal shards of two teachers are kept once; a plan
    cannot know them and counts none."""
    stages = range(setting.parallel.pipeline)
    shard = max((sum(t.shard(setting.parallel, s).total for t in setting.teachers) for s in stages), default=0)
    return shard * setting.itemsize * ranks_per_node


def warnings_of(setting: Setting, cluster: ClusterSpec, memory: StageMemory) -> list[str]:
    found = []
    share = memory_share(cluster, memory)
    if share > FULL:
        need = share * (cluster.memory_gb or 0)
        found.append(
            f"memory: {need:.1f} GB of {cluster.memory_gb:g} GB ({share:.0%}) is more than {FULL:.0%}; "
            f"{_remedy(setting, memory)}"
        )
    host = host_teacher_bytes(setting, cluster.ranks_per_node) / GB
    if cluster.host_memory_gb and host > FULL * cluster.host_memory_gb:
        found.append(
            f"host memory: the teachers take {host:.1f} GB of a node's {cluster.host_memory_gb:g} GB; "
            "raise parallel.tensor, pipeline or expert, or use fewer ranks a node"
        )
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


def _remedy(setting: Setting, memory: StageMemory) -> str:
    """What the largest part suggests that can be made smaller."""
    again = setting.parallel.recompute
    choices = {
        "the in-process engine keeps a whole student on every GPU: use `--rollout-gpus`": memory.rollout_weights,
        "lower rollout.batch_size": memory.rollout_cache,
        "set parallel.recompute": 0.0 if again else memory.activations,
        "raise parallel.context, or lower optim.max_tokens_per_microbatch": memory.activations if again else 0.0,
        "score fewer answers at once (optim.updates_per_step)": memory.teacher_scores,
        "use more GPUs: the optimizer is sharded over data parallel": memory.optimizer,
        "raise parallel.expert, tensor or pipeline (`--suggest` searches)": memory.weights + memory.gradients,
    }
    return max(choices, key=lambda text: choices[text])

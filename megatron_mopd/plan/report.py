"""A plan as sections of figures, each with how it was obtained, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.faults import host_moment_bytes, host_teacher_bytes, memory_share, servers_bytes, warnings_of
from megatron_mopd.plan.figure import GB, Figure, How, Section
from megatron_mopd.plan.memory import GRADIENT_BYTES, Setting, StageMemory, fullest
from megatron_mopd.plan.rollout_memory import server_memory
from megatron_mopd.plan.times import StepTime, step_time


@dataclass(frozen=True, slots=True)
class Report:
    sections: tuple[Section, ...]
    warnings: tuple[str, ...]

    def section(self, title: str) -> Section:
        return next(section for section in self.sections if section.title == title)


def make_report(setting: Setting, cluster: ClusterSpec, efficiency: float = 1.0) -> Report:
    stage, memory = fullest(setting)
    time = step_time(setting, cluster, efficiency)
    sections = [
        _model(setting),
        _layout(setting, cluster),
        _memory(setting, cluster, stage, memory),
        _host(setting, cluster),
        _traffic(time),
        _compute(setting, cluster, time, efficiency),
    ]
    if cluster.rollout_gpus:
        sections.insert(4, _servers(setting, cluster))
    return Report(tuple(sections), tuple(warnings_of(setting, cluster, memory)))


def _model(setting: Setting) -> Section:
    count = setting.count
    built = f"Megatron's GPTModel on the meta device, {count.built_layers} of {len(count.layers)} layers built"
    return Section(
        "model",
        (
            Figure("parameters", "parameters", count.parameters, "", "counted", built),
            Figure(
                "active_parameters",
                "active, that one token meets",
                count.active_parameters,
                "",
                "counted",
                f"all but {count.arch.num_experts - count.arch.experts_per_token} of {count.arch.num_experts} experts"
                if count.arch.is_moe
                else "all",
            ),
            Figure("teachers", "teachers", len(setting.teachers), "", "given", "the configuration"),
        ),
    )


def _layout(setting: Setting, cluster: ClusterSpec) -> Section:
    parallel, packing, work = setting.parallel, setting.packing, setting.workload
    shard = max((setting.count.shard(parallel, stage) for stage in range(parallel.pipeline)), key=lambda s: s.total)
    given: tuple[tuple[str, str, float], ...] = (
        ("gpus", "ranks that train", setting.ranks),
        ("rollout_gpus", "GPUs that only answer", cluster.rollout_gpus),
        ("nodes", "nodes", cluster.nodes),
        ("tensor", "tensor", parallel.tensor),
        ("pipeline", "pipeline", parallel.pipeline),
        ("context", "context", parallel.context),
        ("expert", "expert", parallel.expert),
    )
    longest = "the packing of a step, all answers at their longest"
    return Section(
        "layout",
        (
            *(Figure(key, label, value, "", "given", "configuration and options") for key, label, value in given),
            Figure("data", "data", setting.data_ranks, "", "formula", "ranks / (tensor x pipeline x context)"),
            Figure(
                "shard_parameters",
                "parameters of the fullest rank",
                shard.total,
                "",
                "counted",
                "rank on the meta device",
            ),
            Figure("microbatches", "micro-batches of an update", packing.count, "", "counted", longest),
            Figure("microbatch_tokens", "tokens of the largest, whole", packing.tokens, "", "counted", longest),
            Figure("rollouts", "answers of a step", work.rollouts, "", "given", "the configuration"),
            Figure("step_tokens", "tokens of a step", work.tokens, "", work.lengths_how, work.lengths_source),
        ),
    )


_PARTS: tuple[tuple[str, str, str], ...] = (
    ("weights", "student: weights", "parameters of the shard x bytes"),
    ("gradients", "student: gradients", f"{GRADIENT_BYTES} bytes (fp32) x parameters of the shard"),
    ("optimizer", "student: optimizer", "distributed over data and context ranks, experts over their own"),
    ("teacher_slots", "teachers: one slot a shape", "parameters of the shard x bytes x teacher_memory.buffers"),
    ("rollout_weights", "in-process engine: a whole student", "all parameters x bytes on every rank"),
    ("rollout_cache", "answering: cache", "batch_size sequences at their longest, while the cache grows"),
    ("rollout_prefill", "answering: prompts and logits", "prefill of up to 16,384 tokens, logits in fp32"),
    ("teacher_scores", "update: teachers' scores", "of all trained tokens of an update, as the bank keeps them"),
    ("teacher_heads", "update: teachers' output layers", "all teachers, for the full vocabulary"),
    ("teacher_forward", "scoring: working set", "twice the allowance for one layer"),
    ("activations", "update: activations", "the ledger of plan/activations.py x tokens x micro-batches in flight"),
    ("working", "update: gradients of one layer's activations", "allowance"),
    ("loss", "update: output layer and loss", "rows, gradient, blocks of logits (kernels/README.md)"),
    ("sync", "sync: a layer whole", "one layer gathered from its parts"),
    ("optimizer_step", "optimizer step", "denominators of AdamW on the CPU; with optim.offload, pieces of the moments"),
)


def _memory(setting: Setting, cluster: ClusterSpec, stage: int, memory: StageMemory) -> Section:
    figures = [
        Figure(f"{key}_gb", label, getattr(memory, key) / GB, "GB", "formula", source)
        for key, label, source in _PARTS
        if getattr(memory, key)
    ]
    phases = memory.phases
    phase = max(phases, key=lambda name: phases[name])
    reserve = 0.0 if cluster.is_cpu else cluster.reserve_gb
    if reserve:
        figures.append(Figure("reserve_gb", "CUDA, NCCL, fragments", reserve, "GB", "assumed", "reserve_gb"))
    total, answering = memory.total / GB + reserve, 0.0
    if servers := servers_bytes(cluster, memory) / GB:
        answering = memory.always / GB + servers + reserve
        at_start = f"{memory.server_share:g} (--mem-fraction-static) of what is free when they start"
        figures.append(Figure("servers_gb", "servers on these GPUs, answering", servers, "GB", "formula", at_start))
    phase = "servers, answering" if answering > total else phase
    total = max(total, answering)
    source = f"what is always there + the fullest phase ({phase})" + (" + the reserve" if reserve else "")
    figures.append(Figure("memory_gb", "together, at most", total, "GB", "formula", source))
    how: How = "given" if cluster.gpu_memory_gb else "ceiling"
    if cluster.memory_gb:
        figures.append(Figure("gpu_memory_gb", "a GPU has", cluster.memory_gb, "GB", how, cluster.ceilings.source))
        share = memory_share(cluster, memory)
        figures.append(Figure("memory_share", "share", 100 * share, "%", "formula", "together / a GPU has"))
    notes = [f"of pipeline stage {stage}, the fullest"] if setting.parallel.pipeline > 1 else []
    if not cluster.is_cpu:
        notes.append("activations on GPUs are by reading the code of Transformer Engine, not measured")
    if setting.count.arch.is_moe and setting.parallel.expert > 1:
        notes.append("balanced routing: a rank that is sent twice the average of tokens needs twice their activations")
    return Section("memory of one GPU" if not cluster.is_cpu else "memory of one rank", tuple(figures), tuple(notes))


def checkpoint_bytes(setting: Setting) -> float:
    """`model/` and `state/` hold the weights, `state/` fp32 weights and moments too (`sharded_state.bytes_needed`)."""
    return setting.count.parameters * (2 * setting.itemsize + 12)


def _host(setting: Setting, cluster: ClusterSpec) -> Section:
    keep = setting.config.checkpoint.keep_last
    one = checkpoint_bytes(setting) / GB
    figures = [
        Figure("checkpoint_gb", "a checkpoint", one, "GB", "formula", "parameters x (2 x bytes + 12)"),
        Figure(
            "run_folder_gb", "a run's folder", (keep + 1) * one, "GB", "formula", "keep_last, and one being written"
        ),
    ]
    if setting.config.rollout.routing_replay == "R3":
        arch, tokens = setting.count.arch, setting.workload.tokens
        size = 2 * arch.num_layers * arch.experts_per_token * tokens / GB
        share = size / setting.data_ranks * cluster.ranks_per_node
        source = "2 bytes x layers x k x tokens of every rank's data-parallel share"
        figures.insert(0, Figure("host_experts_gb", "R3: experts in a node's memory", share, "GB", "formula", source))
        source = "of all of a step's answers, until they are shared out"
        figures.insert(1, Figure("main_experts_gb", "R3: experts on the first rank", size, "GB", "formula", source))
    if setting.teachers:
        size = host_teacher_bytes(setting, cluster.ranks_per_node) / GB
        source = "every rank its shard of every teacher (pinned on GPUs); equal shards are kept once, none assumed"
        figures.insert(0, Figure("host_teachers_gb", "teachers in a node's memory", size, "GB", "formula", source))
    if moments := host_moment_bytes(setting, cluster.ranks_per_node) / GB:
        source = "8 bytes (fp32) x parameters that a node's ranks update, pinned"
        figures.insert(
            0, Figure("host_moments_gb", "AdamW's moments in a node's memory", moments, "GB", "formula", source)
        )
    return Section("host and storage", tuple(figures))


def _servers(setting: Setting, cluster: ClusterSpec) -> Section:
    memory = server_memory(
        setting.count, setting.workload, cluster.rollout_tensor, GB * (cluster.memory_gb or 0), setting.itemsize
    )
    of = "0.88 of the GPU (assumed, as SGLang's mem_fraction_static) less the weights"
    return Section(
        "rollout servers",
        (
            Figure("server_weights_gb", "weights", memory.weights / GB, "GB", "formula", "all / rollout_tensor"),
            Figure("server_cache_gb", "cache", memory.cache / GB, "GB", "formula", of),
            Figure(
                "server_tokens", "tokens in the cache of a copy", memory.tokens, "", "formula", "2 x layers x K x bytes"
            ),
            Figure("server_sequences", "answers at once in a copy", memory.sequences, "", "formula", "of mean length"),
        ),
    )


def _traffic(time: StepTime) -> Section:
    return Section(
        "bytes that one GPU sends or gets in a step",
        tuple(
            Figure(
                f"{flow.key}_gb",
                f"{flow.key.replace('_', ' ')}, over {flow.link}",
                flow.bytes / GB,
                "GB",
                "formula",
                flow.formula + (f"; at the ceiling of {flow.gb_s:g} GB/s: {flow.seconds:.3g} s" if flow.gb_s else ""),
            )
            for flow in time.flows
        ),
    )


def _compute(setting: Setting, cluster: ClusterSpec, time: StepTime, efficiency: float) -> Section:
    flops, steps = time.flops, setting.config.steps
    rows = [
        Figure(
            f"{name}_pflop", f"{name}: arithmetic", value / 1e15, "PFLOP", "formula", "plan/compute.py, a whole step"
        )
        for name, value in (("rollout", flops.rollout), ("teacher", flops.teacher), ("update", flops.update))
        if value
    ]
    if time.bottleneck is None:
        return Section("time", tuple(rows), ("no ceilings are known of this device: no times",))
    at = f"{efficiency:g} x data sheet" if efficiency != 1 else "data sheet"
    for phase in ("rollout", "teacher", "update", "sync"):
        own = [each for each in time.resources if each.phase == phase]
        if own:
            slowest = max(own, key=lambda each: each.seconds)
            rows.append(
                Figure(
                    f"{phase}_seconds", f"{phase}: at least", slowest.seconds, "s", "ceiling", f"{slowest.name}, {at}"
                )
            )
    gpus = setting.ranks + cluster.rollout_gpus
    hours = time.step * steps * gpus / 3600
    rows += [
        Figure("step_seconds", "a step: at least", time.step, "s", "ceiling", "its phases one after the other"),
        Figure("run_hours", f"{steps} steps: at least", time.step * steps / 3600, "h", "ceiling", "without evaluation"),
        Figure("gpu_hours", "GPU-hours: at least", hours, "GPU h", "ceiling", f"{gpus} GPUs"),
    ]
    if cluster.price_per_gpu_hour is not None:
        price = f"{cluster.price_per_gpu_hour:g} per GPU-hour, given"
        rows.append(Figure("cost", "cost: at least", hours * cluster.price_per_gpu_hour, "", "ceiling", price))
    b = time.bottleneck
    notes = [f"bottleneck by these ceilings: {b.phase}, {b.name}, {b.seconds:,.2f} s of {time.step:,.2f} s a step"]
    if not setting.engine_here and setting.config.generates and not cluster.rollout_gpus:
        shared = setting.config.rollout.sglang is not None and setting.config.rollout.sglang.sync.colocated
        who = "servers on these GPUs answer before it" if shared else "nobody answers: --rollout-gpus gives servers"
        notes.append(f"{who}; the time of the answers is missing")
    if efficiency == 1:
        notes.append("no run reaches its ceilings; --efficiency F assumes a share of them")
    return Section("time", tuple(rows), tuple(notes))

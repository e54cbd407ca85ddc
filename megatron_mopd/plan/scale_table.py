"""What the method needs at other sizes, on paper: models of 30B, 235B and 1T parameters, 3 to 40 teachers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mopd.config import (
    DomainSpec,
    ModelSpec,
    ObjectiveSpec,
    OptimSpec,
    RolloutSpec,
    RunConfig,
    SourceSpec,
    TeacherSpec,
)
from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.count import ModelCount, count_model
from megatron_mopd.plan.faults import host_teacher_bytes
from megatron_mopd.plan.memory import Setting
from megatron_mopd.plan.published import published
from megatron_mopd.plan.report import checkpoint_bytes
from megatron_mopd.plan.suggest import Suggestion, search
from megatron_mopd.plan.workload import workload_of

TEACHERS = (3, 10, 40)
SIZES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("qwen3-30b-a3b", (8, 16, 32, 64, 128, 256, 512, 1024)),
    ("qwen3-235b-a22b", (64, 128, 256, 512, 1024)),
    ("1t-a32b", (384, 768, 1536)),  # its 384 experts divide no power of two beyond 128
)
PROMPTS, LONGEST_PROMPT, LONGEST_RESPONSE = 2048, 2048, 30720


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    model: str
    gpus: int
    best: Suggestion | None
    """None: no layout fits."""
    host_gb: tuple[float, ...]
    """Teachers in a node's memory, for each of TEACHERS."""
    swap_seconds: tuple[float, ...]
    """A step's swaps at PCIe's ceiling, likewise."""
    checkpoint_gb: float


def table_config(teachers: int) -> RunConfig:
    """2,048 answers a step of up to 32,768 tokens with their prompts; MOPD Eq. 4; one domain a teacher."""
    names = [f"t{index}" for index in range(teachers)]
    source = SourceSpec(jsonl="data.jsonl")
    domain = DomainSpec(
        source=source, verifier="none", max_prompt_tokens=LONGEST_PROMPT, max_response_tokens=LONGEST_RESPONSE
    )
    return RunConfig(
        run_dir="",
        stage="mopd",
        steps=50,
        prompts_per_step=PROMPTS,
        model=ModelSpec(hf_config="published"),
        teachers={name: TeacherSpec(checkpoint="self") for name in names},
        domains={name: replace(domain, teacher=name) for name in names},
        objective=ObjectiveSpec(kind="sampled"),
        optim=OptimSpec(lr=2e-6),
        rollout=RolloutSpec(),
    )


def table_setting(count: ModelCount, teachers: int) -> Setting:
    config = table_config(teachers)
    return Setting(
        config=config,
        count=count,
        teachers=(count,) * teachers,
        workload=workload_of(config, 0.5),
        parallel=config.parallel,
        ranks=1,
        max_tokens=LONGEST_PROMPT + LONGEST_RESPONSE,
        spec="transformer_engine",
        engine_here=False,
    )


def scale_row(model: str, count: ModelCount, gpus: int) -> Row:
    cluster = ClusterSpec(gpus=gpus)
    few = table_setting(count, TEACHERS[0])
    found = search(few, cluster)
    best = found[0] if found and found[0].fits else None
    host: tuple[float, ...] = ()
    swaps: tuple[float, ...] = ()
    if best is not None:
        shard = max(count.shard(best.setting.parallel, s).total for s in range(best.setting.parallel.pipeline))
        one = host_teacher_bytes(best.setting, cluster.ranks_per_node) / TEACHERS[0] / 1e9
        host = tuple(teachers * one for teachers in TEACHERS)
        swaps = tuple(teachers * shard * 2 / (1e9 * cluster.ceilings.pcie_gb_s) for teachers in TEACHERS)
    return Row(
        model=model,
        gpus=gpus,
        best=best,
        host_gb=host,
        swap_seconds=swaps,
        checkpoint_gb=checkpoint_bytes(few) / 1e9,
    )


def scale_rows() -> list[Row]:
    rows = []
    for model, sizes in SIZES:
        count = count_model(published(model).arch, whole=False)
        rows += [scale_row(model, count, gpus) for gpus in sizes]
    return rows


def as_markdown(rows: list[Row]) -> str:
    """The table, under what it assumes."""
    names = " / ".join(map(str, TEACHERS))
    lines = [
        f"| model | GPUs | TP x PP x CP x EP | GB a GPU | host GB a node, {names} teachers | swaps, s a step | "
        "update, s | checkpoint, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.model} | {row.gpus:,} |"
        if row.best is None:
            lines.append(f"{start} none fits | | | | | {row.checkpoint_gb:,.0f} |")
            continue
        parallel = row.best.setting.parallel
        layout = f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} x {parallel.expert}"
        layout += "" if parallel.recompute else ", keeps activations"
        host = " / ".join(f"{size:,.0f}" for size in row.host_gb)
        swaps = " / ".join(f"{seconds:.2g}" for seconds in row.swap_seconds)
        memory = row.best.memory_gb + ClusterSpec(gpus=row.gpus).reserve_gb
        lines.append(
            f"{start} {layout} | {memory:.1f} | {host} | {swaps} | {row.best.seconds:,.0f} | {row.checkpoint_gb:,.0f} |"
        )
    return "\n".join(lines)

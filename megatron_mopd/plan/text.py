"""A plan on a terminal: one line a figure, with how it was obtained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_mopd.plan.cluster import ClusterSpec
from megatron_mopd.plan.figure import Figure
from megatron_mopd.plan.report import Report
from megatron_mopd.plan.simulate import Split, Timeline
from megatron_mopd.plan.suggest import Suggestion

_LABEL, _VALUE = 46, 18


def number(value: float) -> str:
    """Whole numbers in full, others with three digits."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def report_lines(report: Report) -> Iterator[str]:
    for section in report.sections:
        if not section.figures and not section.notes:
            continue
        yield f"\n{section.title}"
        for figure in section.figures:
            yield _line(figure)
        yield from (f"  ({note})" for note in section.notes)
    if report.warnings:
        yield ""
        yield from (f"warning: {warning}" for warning in report.warnings)


def _line(figure: Figure) -> str:
    value = f"{number(figure.value)} {figure.unit}".strip()
    return f"  {figure.label:{_LABEL}} {value:>{_VALUE}}  {figure.how}: {figure.source}"


def suggestion_lines(suggestions: Sequence[Suggestion], cluster: ClusterSpec, fewest: int | None) -> Iterator[str]:
    first = suggestions[0].setting
    what = "servers answer on GPUs of their own" if not first.engine_here else "engine in the process"
    what += "; moments in host memory" if first.config.optim.offload else ""
    yield f"\nlayouts for {cluster.gpus} GPUs of {cluster.memory_gb or 0:g} GB ({what}); TransformerConfig constructed"
    if not suggestions[0].fits:
        at = (
            f"{fewest} GPUs are the fewest, by doubling, that fit"
            if fewest
            else "no number of GPUs that was tried fits"
        )
        yield f"  none fits into 90% of a GPU; {at}. The smallest:"
    for each in suggestions:
        parallel = each.setting.parallel
        gb = each.share * (cluster.memory_gb or 0)
        yield (
            f"  {gb:6.1f} GB ({each.share:4.0%})  at least {number(each.seconds)} s a step, ceilings   "
            f"parallel: {{tensor: {parallel.tensor}, pipeline: {parallel.pipeline}, context: {parallel.context}, "
            f"expert: {parallel.expert}, "
            f"recompute: {str(parallel.recompute).lower()}}}   "
            f"optim: {{max_tokens_per_microbatch: {each.setting.max_tokens}"
            f"{', offload: true' if each.setting.config.optim.offload else ''}}}"
        )
    yield "  (ranked by arithmetic, links and pipeline bubble at data-sheet ceilings: measure before you trust it)"


def split_lines(found: Sequence[Split], colocated: Timeline | None, lag: int, nodes: int) -> Iterator[str]:
    yield f"\n{nodes} nodes shared out, lag {lag}: log-normal answer lengths (assumed), ceilings; seconds are at least"
    yield f"  {'train:rollout':>14} {'s a step':>10} {'train idle':>11} {'rollout idle':>13} {'GPUs at work':>13}"
    for split in found:
        line = split.timeline
        ratio = f"{split.train_nodes}:{split.rollout_nodes}"
        yield (
            f"  {ratio:>14} {number(line.step_seconds):>10} {line.train_idle:>11.0%} {line.rollout_idle:>13.0%} "
            f"{split.gpu_seconds_share:>13.0%}"
        )
    if colocated is not None:
        yield f"  {'same GPUs':>14} {number(colocated.step_seconds):>10} {'0%':>11} {'0%':>13} {'100%':>13}"
    if found:
        best = found[0]
        yield f"  fastest: {best.train_nodes} nodes train, {best.rollout_nodes} answer"
    else:
        yield "  no split works: the layout divides no number of nodes, or a server has no room for an answer"


def as_json(report: Report) -> dict[str, Any]:
    """Every figure under its key, and all of them with unit and origin."""
    flat = {figure.key: figure.value for section in report.sections for figure in section.figures}
    detail = {
        section.title: {
            figure.key: {"value": figure.value, "unit": figure.unit, "how": figure.how, "source": figure.source}
            for figure in section.figures
        }
        for section in report.sections
    }
    notes = {section.title: list(section.notes) for section in report.sections if section.notes}
    return {**flat, "warnings": list(report.warnings), "figures": detail, "notes": notes}


def suggestion_json(each: Suggestion) -> dict[str, Any]:
    parallel = each.setting.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "recompute": parallel.recompute,
        "max_tokens_per_microbatch": each.setting.max_tokens,
        "engine_in_process": each.setting.engine_here,
        "offload": each.setting.config.optim.offload,
        "memory_gb": each.memory_gb,
        "memory_share": each.share,
        "fits": each.fits,
        "seconds_at_ceilings": each.seconds,
    }


def split_json(split: Split) -> dict[str, Any]:
    line = split.timeline
    return {
        "train_nodes": split.train_nodes,
        "rollout_nodes": split.rollout_nodes,
        "step_seconds": line.step_seconds,
        "train_idle": line.train_idle,
        "rollout_idle": line.rollout_idle,
    }

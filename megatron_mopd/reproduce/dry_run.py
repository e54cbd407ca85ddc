"""`--dry-run`: the graph as a table, with what each node costs and for how many seeds it is cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table

from megatron_mopd.reproduce.config import TEACHERS
from megatron_mopd.reproduce.cost import Cost, node_cost
from megatron_mopd.reproduce.graph import Node
from megatron_mopd.reproduce.store import StoredNode


def cost_table(nodes: Mapping[str, Node], stored: Mapping[str, StoredNode], wanted: Sequence[str]) -> Table:
    """A row per node, for all seeds: they differ in nothing that costs. Seconds are measured, mean over seeds."""
    by_reference: dict[str, list[str]] = {}
    for name in wanted:
        by_reference.setdefault(_reference(name), []).append(name)
    rows = [_row(nodes[names[0]], names, nodes, stored) for names in by_reference.values()]
    seeds = max(map(len, by_reference.values()), default=0)
    table = Table(title=f"Nodes in order, each for {seeds} seed{'s' * (seeds != 1)}", title_justify="left", box=SIMPLE)
    table.add_column("node", no_wrap=True)
    table.add_column("command", no_wrap=True)
    table.add_column("needs", overflow="fold")
    for column in ("steps", "rollouts", "tokens at most", "seconds", "cached"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        counts = [f"{value:,}" if value else "" for value in (row.cost.steps, row.cost.rollouts, row.cost.most_tokens)]
        seconds = "?" if row.seconds is None else f"{row.seconds:.0f}"
        table.add_row(row.reference, row.kind, row.needs, *counts, seconds, f"{row.cached} of {row.seeds}")
    table.caption = _totals(rows)
    table.caption_justify = "left"
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    reference: str
    kind: str
    needs: str
    cost: Cost
    """Of one seed."""
    seconds: float | None
    """Mean over the seeds that are made; None where none is."""
    cached: int
    seeds: int


def _row(node: Node, names: Sequence[str], nodes: Mapping[str, Node], stored: Mapping[str, StoredNode]) -> _Row:
    measured = [seconds for name in names if (seconds := stored[name].record().get("seconds")) is not None]
    return _Row(
        reference=_reference(node.name),
        kind=node.kind,
        needs=_needs(node, nodes),
        cost=node_cost(node),
        seconds=sum(measured) / len(measured) if measured else None,
        cached=sum(stored[name].is_done for name in names),
        seeds=len(names),
    )


def _totals(rows: Sequence[_Row]) -> str:
    """What is left to make, in nodes, rollouts and seconds of one worker."""
    left = [(row, row.seeds - row.cached) for row in rows if row.cached < row.seeds]
    count, nodes = sum(number for _, number in left), sum(row.seeds for row in rows)
    rollouts = sum(number * row.cost.rollouts for row, number in left)
    seconds = sum(number * row.seconds for row, number in left if row.seconds is not None)
    unknown = sum(number for row, number in left if row.seconds is None)
    known = f"about {seconds:.0f} s of one worker" if seconds else "seconds not known"
    if seconds and unknown:
        known += f" and {unknown} nodes that were never measured"
    return f"{count} of {nodes} nodes to make: {rollouts:,} rollouts, {known}"


def _needs(node: Node, nodes: Mapping[str, Node]) -> str:
    needed = list(dict.fromkeys(_reference(name) for name in node.inputs.values()))
    teachers = {_reference(name) for name, other in nodes.items() if other.kind == "run"}
    teachers = {name for name in teachers if name.startswith(f"{TEACHERS}.")}
    if len(teachers) > 1 and teachers <= set(needed):
        needed = [*(name for name in needed if name not in teachers), f"{TEACHERS}.*"]
    return ", ".join(needed)


def _reference(name: str) -> str:
    return name.split("/", 1)[1]

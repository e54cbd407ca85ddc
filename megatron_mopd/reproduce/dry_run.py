"""`--dry-run`: the graph as a table, with what each node costs and whether it is cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE
from rich.table import Table

from megatron_mopd.reproduce.config import TEACHERS
from megatron_mopd.reproduce.cost import node_cost
from megatron_mopd.reproduce.graph import Node
from megatron_mopd.reproduce.store import StoredNode


def cost_table(nodes: Mapping[str, Node], stored: Mapping[str, StoredNode], wanted: Sequence[str]) -> Table:
    """Seconds are measured: of the node itself, or of the same node of another seed, marked with ~."""
    seconds = {name: stored[name].record().get("seconds") for name in wanted}
    known: dict[str, float] = {}
    for name, value in seconds.items():
        if value is not None:
            known.setdefault(_reference(name), value)
    table = Table(title="Nodes in order", title_justify="left", box=SIMPLE)
    table.add_column("node", no_wrap=True)
    table.add_column("command", no_wrap=True)
    table.add_column("needs", overflow="fold")
    for column in ("steps", "rollouts", "tokens at most", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    open_seconds, unknown = 0.0, 0
    for name in wanted:
        node, done = nodes[name], stored[name].is_done
        cost, guess = node_cost(node), known.get(_reference(name))
        measured = seconds[name]
        if not done:
            open_seconds += guess or 0.0
            unknown += guess is None
        shown = f"{measured:.0f}" if measured is not None else f"~{guess:.0f}" if guess is not None else "?"
        counts = [f"{value:,}" if value else "" for value in (cost.steps, cost.rollouts, cost.most_tokens)]
        table.add_row(name, node.kind, _needs(node, nodes), *counts, shown, "cached" if done else "to make")
    to_make = sum(not stored[name].is_done for name in wanted)
    table.caption = (
        f"{to_make} of {len(wanted)} nodes to make, {open_seconds:.0f} s by what is known, {unknown} unknown"
    )
    table.caption_justify = "left"
    return table


def _needs(node: Node, nodes: Mapping[str, Node]) -> str:
    needed = list(dict.fromkeys(_reference(name) for name in node.inputs.values()))
    teachers = {_reference(name) for name, other in nodes.items() if other.kind == "run"}
    teachers = {name for name in teachers if name.startswith(f"{TEACHERS}.")}
    if len(teachers) > 1 and teachers <= set(needed):
        needed = [*(name for name in needed if name not in teachers), f"{TEACHERS}.*"]
    return ", ".join(needed)


def _reference(name: str) -> str:
    return name.split("/", 1)[1]

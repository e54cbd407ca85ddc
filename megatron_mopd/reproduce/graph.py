"""Nodes and the order in which they can be made. Pure: reads no file and knows nothing of what a node does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_mopd.yaml_config import ConfigError

Kind = Literal["run", "sample", "merge", "eval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One command of this program: its file, and which other nodes stand behind some of the file's keys."""

    name: str
    """seed<n>/<reference>, for example seed0/base, seed0/teachers.math, seed0/mopd, seed0/mopd.eval."""
    kind: Kind
    tree: Mapping[str, Any]
    """The command's file as a plain mapping, every default filled in. At the keys of `inputs` stands a placeholder."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Key path in the file (or `--checkpoint`) -> the node whose output goes there."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the command."""


def in_order(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Every node after its inputs, otherwise in the given order. ConfigError for a missing node and for a cycle."""
    by_name = {node.name: node for node in nodes}
    placed: dict[str, Node] = {}

    def place(node: Node, path: tuple[str, ...]) -> None:
        if node.name in placed:
            return
        if node.name in path:
            cycle = (*path[path.index(node.name) :], node.name)
            raise ConfigError(f"methods: {' needs '.join(cycle)}: a cycle; let one of them start from another node")
        for key, name in node.inputs.items():
            if name not in by_name:
                raise ConfigError(f"{node.name}: its {key} is the node '{name}', which does not exist")
            place(by_name[name], (*path, node.name))
        placed[node.name] = node

    for node in by_name.values():
        place(node, ())
    return tuple(placed.values())


def with_inputs(nodes: Mapping[str, Node], wanted: Iterable[str]) -> set[str]:
    """The names in `wanted` and of everything that they need."""
    found: set[str] = set()
    open_names = list(wanted)
    while open_names:
        name = open_names.pop()
        if name not in found:
            found.add(name)
            open_names += nodes[name].inputs.values()
    return found

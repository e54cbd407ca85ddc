"""The folders of the nodes below the comparison's run folder, and what each of them says it is.

    run_dir/seed0/mopd-3f2a91c0/       the name, and the first digits of the node's hash
        node.yaml                      the file that the command was given
        log.txt                        what the command said
        node.json                      written last, at once: ingredients, hash, seconds, compute

A changed node has another folder: the old result stays until `--prune`, and is found again when the change is undone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.reproduce.fingerprint import FileDigests, Ingredients, changes, ingredients
from megatron_mopd.reproduce.graph import Node
from megatron_mopd.yaml_config import ConfigError

RECORD = "node.json"
OUTPUTS = {
    "run": "checkpoints/latest/manifest.json",
    "sample": "dataset.jsonl",
    "merge": "model/config.json",
    "eval": "result.json",
}
"""What a finished node of each kind has in its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNode:
    """A node of the graph and its place on disk."""

    node: Node
    made_of: Ingredients
    folder: Path

    @property
    def is_done(self) -> bool:
        return (self.folder / RECORD).exists() and (self.folder / OUTPUTS[self.node.kind]).exists()

    @property
    def output(self) -> Path:
        """What other nodes' files name."""
        name = {"run": "checkpoints/latest", "sample": "dataset.jsonl", "merge": "model", "eval": "result.json"}
        return self.folder / name[self.node.kind]

    def record(self) -> dict[str, Any]:
        """What node.json says; {} before the node is done. ConfigError for a damaged one."""
        return read_json(self.folder / RECORD)

    def why(self) -> str | None:
        """Why the node has to be made although one of its name was made before; None if there was none."""
        if (self.folder / RECORD).exists():
            return None if self.is_done else f"{self.folder / OUTPUTS[self.node.kind]} is missing"
        others = [folder for folder in _versions(self.folder) if (folder / RECORD).exists()]
        if not others:
            return None
        newest = max(others, key=lambda folder: (folder / RECORD).stat().st_mtime_ns)
        return "; ".join(changes(read_json(newest / RECORD)["made_of"], self.made_of, self.node))


def place(nodes: Sequence[Node], run_dir: Path) -> dict[str, StoredNode]:
    """Name -> node with its folder. `nodes` are in order: every node after its inputs. Raises ConfigError."""
    digests = FileDigests(run_dir / "hashes.json")
    hashes: dict[str, str] = {}
    stored = {}
    for node in nodes:
        made_of = ingredients(node, hashes, digests)
        hashes[node.name] = made_of.hash
        stored[node.name] = StoredNode(node=node, made_of=made_of, folder=run_dir / f"{node.name}-{made_of.hash[:8]}")
    digests.save()
    return stored


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error}); delete its folder to make the node again") from None
    assert isinstance(tree, dict)
    return tree


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """At once: a reader finds the old file or the new one, and never a part."""
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    fresh.replace(path)


def prune(stored: Mapping[str, StoredNode], run_dir: Path) -> list[Path]:
    """Delete the folders of nodes that are not in `stored`; returns them."""
    kept = {item.folder for item in stored.values()}
    doomed = [folder for folder in _all_folders(run_dir) if folder not in kept]
    for folder in doomed:
        shutil.rmtree(folder)
    return doomed


def _versions(folder: Path) -> Iterator[Path]:
    name = folder.name.rsplit("-", 1)[0]
    yield from folder.parent.glob(f"{name}-????????")


def _all_folders(run_dir: Path) -> list[Path]:
    found = run_dir.glob("seed*/*-????????")
    return sorted(folder for folder in found if folder.is_dir())

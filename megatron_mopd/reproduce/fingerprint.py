"""What a node is made of: its configuration, its inputs, and the content of the files that it reads. And its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.config import RunConfig
from megatron_mopd.merge.config import MergeConfig
from megatron_mopd.reproduce.graph import Node
from megatron_mopd.yaml_config import ConfigError, build, to_tree

IGNORED = ("run_dir", "out", "log", "checkpoint")
"""Top-level keys that change where and how often something is written, and nothing about the result."""
EVALUATED = ("domains", "evaluation", "parallel", "rollout")
"""Of an evaluation's file: the top-level keys that its figures depend on. The others are those of some training."""
FILES = ("jsonl", "held_out", "dataset", "perplexity", "file")
FOLDERS = ("hf_config", "checkpoint", "base")
"""Keys whose value is a file, or a folder with a model. A folder that does not exist is a name on the Hub."""
COMMAND = "command"
"""Key whose value is a verifier's program and its arguments: a script of yours among them is part of the result."""
SMALL = 1 << 16
"""Bytes up to which a file is read every time; the digest of a larger one is remembered with its size and time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredients:
    """Plain values, for JSON. Two nodes of equal ingredients are the same node."""

    kind: str
    config: dict[str, Any]
    arguments: list[str]
    inputs: dict[str, str]
    """Key path -> hash of the node that stands there."""
    files: dict[str, str]
    """Path -> digest of its content."""

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class FileDigests:
    """Digests of files, remembered in one JSON file between calls."""

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError):  # not there, or damaged: every file is read again
            self._known = json.loads(path.read_text(encoding="utf-8"))
        self._session: dict[str, str] = {}

    def digest(self, path: Path) -> str:
        """sha256 of the content of a file, or of the names and contents of the files in a folder."""
        key = str(path.absolute())
        if key not in self._session:
            if path.is_dir():
                inside = sorted(child for child in path.iterdir() if child.is_file() and not child.name.startswith("."))
                parts = [f"{child.name} {self.digest(child)}" for child in inside]
                self._session[key] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
            else:
                self._session[key] = self._file(path, key)
        return self._session[key]

    def _file(self, path: Path, key: str) -> str:
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if status.st_size <= SMALL:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        known = self._known.get(key)
        if known is not None and known[:2] == stamp:
            return str(known[2])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[key] = [*stamp, found]
        return found

    def save(self) -> None:
        if not self._known:
            return
        fresh = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self._known), encoding="utf-8")
            fresh.replace(self._path)
        except OSError as error:
            raise ConfigError(f"run_dir: {self._path} cannot be written: {error.strerror}; choose another") from None


def ingredients(node: Node, hashes: Mapping[str, str], digests: FileDigests) -> Ingredients:
    """Of a node whose inputs have the given hashes (node name -> hash). ConfigError for a file that is missing."""
    config = _what_matters(node)
    files: dict[str, str] = {}
    for path, value in _leaves(config, ""):
        name = path.rsplit(".", 1)[-1]
        if name == COMMAND and isinstance(value, list):
            files |= {part: digests.digest(Path(part)) for part in value if Path(part).is_file()}
        if path in node.inputs or not isinstance(value, str) or name not in (*FILES, *FOLDERS):
            continue
        file = Path(value).expanduser()
        if name in FILES and not file.is_file():
            raise ConfigError(f"{node.name}: {path}: {value}: no such file; make it, or name another one")
        for found in (file, file / "model") if name in FOLDERS else (file,):
            if found.exists():
                files[str(found)] = digests.digest(found)
    return Ingredients(
        kind=node.kind,
        config=config,
        arguments=list(node.arguments),
        inputs={path: hashes[name] for path, name in node.inputs.items()},
        files=files,
    )


def _what_matters(node: Node) -> dict[str, Any]:
    """The node's file without what the result does not depend on, and without values that are the default: so that
    a key which a later version of this program adds does not make every result an old one."""
    if node.kind == "merge":
        config = _without_defaults(build(MergeConfig, node.tree))
    else:
        config = _without_defaults(build(RunConfig, node.tree))
    if node.kind != "eval":
        return {key: value for key, value in config.items() if key not in IGNORED} | _orders(config)
    evaluation = {key: value for key, value in config.get("evaluation", {}).items() if key != "every"}
    kept = {key: value for key, value in config.items() if key in EVALUATED}
    return kept | {"evaluation": evaluation, "model": {"dtype": node.tree["model"]["dtype"]}}


def _orders(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The order of the domains (a cascade's turns), teachers and models, which the hash's sorted keys do not show.

    Named only where it is not the alphabet's.
    """
    names = {key: list(config.get(key, {})) for key in ("domains", "teachers", "models")}
    return {f"order_of_{key}": found for key, found in names.items() if found != sorted(found)}


def _without_defaults(value: Any) -> Any:
    """As `to_tree`, without fields that have their default value."""
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return to_tree(value)
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if item != default:
            kept = _without_defaults(item)
            tree |= kept if field.metadata.get("rest") else {field.name: kept}
    return tree


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def changes(before: Mapping[str, Any], now: Ingredients, node: Node) -> list[str]:
    """How what a node was made of (`as_json`) differs from what it would be made of now; one phrase a difference."""
    found = []
    for path, value in now.files.items():
        known = before["files"].get(path)
        if known is None:
            found.append(f"{path} is read now")
        elif known != value:
            found.append(f"the content of {path} has changed")
    found += [f"{path} is not read any more" for path in before["files"] if path not in now.files]
    old, new = dict(_leaves(before["config"], "")), dict(_leaves(now.config, ""))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            found.append(f"{key} was {old.get(key)!r}, is {new.get(key)!r}")
    if before["arguments"] != list(now.arguments):
        found.append(f"arguments were {before['arguments']}, are {now.arguments}")
    for path, name in node.inputs.items():
        if before["inputs"].get(path) != now.inputs[path]:
            found.append(f"{name} has changed")
    return found

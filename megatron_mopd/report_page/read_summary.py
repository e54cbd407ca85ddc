"""`summary.json` -> Study. Whatever is wrong with the file is a ConfigError that names the file and the key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.report_page.study import COMPUTE, Method, Model, ScalingPoint, Study, Teacher
from megatron_mopd.reproduce.statistics import Estimate
from megatron_mopd.yaml_config import ConfigError

VERSION = 1
_REMEDY = "let `mopd reproduce` or `mopd demo` write it again"


def read_summary(folder: Path) -> Study:
    """The study in `folder`/summary.json. Raises ConfigError: not readable, another version, a key missing or bad."""
    path = folder / "summary.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error}); {_REMEDY}") from None
    root = _Node(path, "", content)
    if root.mapping().get("version") != VERSION:
        raise ConfigError(f"{path}: version: not {VERSION}, the one this program reads; {_REMEDY}")
    scaling = root.get("scaling")
    return Study(
        source=str(folder),
        title=root["title"].text(),
        domains=root["domains"].words(),
        seeds=tuple(node.integer() for node in root["seeds"].elements()),
        base=_model(root["base"]),
        teachers=tuple(_teacher(name, node) for name, node in root["teachers"].items()),
        methods=tuple(_method(name, node, folder) for name, node in root["methods"].items()),
        scaling=tuple(_scaling_point(node) for node in scaling.elements()) if scaling else (),
    )


def _teacher(name: str, node: _Node) -> Teacher:
    taught = node.get("domain")
    return Teacher(name=name, domains=taught.words() if taught else (), model=_model(node), compute=_compute(node))


def _method(name: str, node: _Node, folder: Path) -> Method:
    scores = {domain: entry.get("score") for domain, entry in node["domains"].items()}
    runs = node.get("runs")
    return Method(
        name=name,
        label=node["label"].text(),
        family=node["family"].text(),
        score=_estimate(node["score"]),
        domain_scores={domain: _estimate(score) for domain, score in scores.items() if score},
        model=_model(node),
        compute=_compute(node),
        runs={entry.seed(): _run_folder(entry.text(), folder) for _, entry in runs.items()} if runs else {},
    )


def _run_folder(written: str, folder: Path) -> Path:
    """As written, or, if the study was moved or is named from elsewhere, the longest end of that path inside it."""
    parts = Path(written).parts
    ends = [folder / Path(*parts[start:]) for start in range(len(parts)) if parts[start] != "/"]
    return next((end for end in ends if end.exists()), Path(written))


def _scaling_point(node: _Node) -> ScalingPoint:
    count = node["teachers"].integer()
    if count < 1:
        raise node["teachers"].error("not a number of teachers")
    return ScalingPoint(
        method=node["method"].text(),
        label=node["label"].text(),
        teachers=count,
        score=_estimate(node["score"]),
    )


def _model(node: _Node) -> Model:
    perplexity = node.get("perplexity")
    accuracies = {domain: entry.get("accuracy") for domain, entry in node["domains"].items()}
    return Model(
        accuracy={domain: _estimate(entry) for domain, entry in accuracies.items() if entry},
        perplexity=_estimate(perplexity) if perplexity else None,
        out_of_domain=_estimates(node.get("out_of_domain")),
        benchmarks=_estimates(node.get("benchmarks")),
    )


def _estimates(node: _Node | None) -> dict[str, Estimate]:
    return {name: _estimate(entry) for name, entry in node.items()} if node else {}


def _compute(node: _Node) -> dict[str, float]:
    compute = node.get("compute")
    entries = {key: compute.get(key) for key in COMPUTE} if compute else {}
    return {key: entry.number() for key, entry in entries.items() if entry}


def _estimate(node: _Node) -> Estimate:
    interval, seeds = node.get("interval"), node.get("per_seed")
    mean = node.get("mean")
    bounds = [bound.number() for bound in interval.elements()] if interval else None
    if interval and bounds is not None and (len(bounds) != 2 or not bounds[0] <= bounds[1]):
        raise interval.error("not [low, high]")
    measured = [node for _, node in seeds.items() if node.value is not None] if seeds else []
    return Estimate(
        mean=mean.number() if mean else math.nan,
        interval=(bounds[0], bounds[1]) if bounds else None,
        per_seed={node.seed(): node.number() for node in measured},
    )


@dataclass(frozen=True, slots=True)
class _Node:
    """A value of the file, and where it stands."""

    path: Path
    key: str
    value: Any

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {self.key or 'top level'}: {what}; {_REMEDY}")

    def mapping(self) -> Mapping[str, Any]:
        if not isinstance(self.value, dict):
            raise self.error("not a mapping")
        return self.value

    def _child(self, key: str, value: Any) -> _Node:
        return _Node(self.path, f"{self.key}.{key}" if self.key else key, value)

    def __getitem__(self, key: str) -> _Node:
        if key not in self.mapping():
            raise self._child(key, None).error("missing")
        return self._child(key, self.value[key])

    def get(self, key: str) -> _Node | None:
        """None where the key is missing or null."""
        return self[key] if self.mapping().get(key) is not None else None

    def items(self) -> Iterator[tuple[str, _Node]]:
        return ((key, self._child(key, value)) for key, value in self.mapping().items())

    def elements(self) -> Iterator[_Node]:
        if not isinstance(self.value, list):
            raise self.error("not a list")
        return (self._child(str(index), value) for index, value in enumerate(self.value))

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.error("not a string")
        return self.value

    def words(self) -> tuple[str, ...]:
        """Of a list of strings, or of one string."""
        return (self.value,) if isinstance(self.value, str) else tuple(node.text() for node in self.elements())

    def integer(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            raise self.error("not a whole number")
        return self.value

    def seed(self) -> int:
        """The last word of the key."""
        name = self.key.rpartition(".")[2]
        if not name.isdecimal():
            raise self.error("not under a seed")
        return int(name)

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.error("not a number")
        return float(self.value)

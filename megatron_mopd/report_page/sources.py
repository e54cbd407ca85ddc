"""RUN... -> what there is to report on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mopd.report_page.curves import Curve, read_log
from megatron_mopd.report_page.read_summary import read_summary
from megatron_mopd.report_page.study import Study
from megatron_mopd.yaml_config import ConfigError

RUN_FAMILY = "run"
"""Family of a run that is no method of a study."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveSet:
    """Curves that are drawn together."""

    title: str
    curves: tuple[Curve, ...]
    study: Study | None
    """What the lines of base and teachers are taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    studies: tuple[Study, ...]
    curve_sets: tuple[CurveSet, ...]
    """One per study with curves, and one for all runs that were named themselves."""

    @property
    def title(self) -> str:
        titles = [study.title for study in self.studies]
        return titles[0] if len(titles) == 1 else "Multi-teacher on-policy distillation"

    @property
    def families(self) -> dict[str, str]:
        """Method or run -> family, in order of first appearance."""
        families: dict[str, str] = {}
        for study in self.studies:
            for method in study.methods:
                families.setdefault(method.name, method.family)
            for point in study.scaling:
                families.setdefault(point.method, "mopd")
        for group in self.curve_sets:
            for curve in group.curves:
                families.setdefault(curve.name, curve.family)
        return families


def read_sources(folders: Sequence[Path]) -> Sources:
    """Raises ConfigError: no folder, one named twice, nothing of ours in it, or a file of it that cannot be read."""
    studies: list[Study] = []
    runs: list[Path] = []
    for index, folder in enumerate(folders):
        if folder.resolve() in [earlier.resolve() for earlier in folders[:index]]:
            raise ConfigError(f"{folder}: named twice; name each folder once")
        if (folder / "summary.json").is_file():
            studies.append(read_summary(folder))
        elif (folder / "metrics.jsonl").is_file():
            runs.append(folder)
        else:
            raise ConfigError(
                f"{folder}: {'no summary.json or metrics.jsonl in it' if folder.is_dir() else 'no such folder'}; "
                "name a folder that `mopd run`, `mopd demo` or `mopd reproduce` wrote"
            )
    sets = [_curves_of_study(study) for study in studies]
    if runs:
        sets.append(CurveSet(title="runs", curves=_curves_of_runs(runs), study=None))
    return Sources(studies=tuple(studies), curve_sets=tuple(group for group in sets if group.curves))


def _curves_of_study(study: Study) -> CurveSet:
    curves = []
    for method in study.methods:
        logs = tuple(read_log(folder) for folder in method.runs.values() if (folder / "metrics.jsonl").is_file())
        if logs:
            curves.append(Curve(name=method.name, label=method.label, family=method.family, logs=logs))
    return CurveSet(title=study.title, curves=tuple(curves), study=study)


def _curves_of_runs(folders: Sequence[Path]) -> tuple[Curve, ...]:
    """Each under the end of its path: as much of it as tells them apart."""
    paths = [folder.resolve().parts for folder in folders]
    ends = (["/".join(parts[-length:]) for parts in paths] for length in range(1, max(map(len, paths)) + 1))
    labels = next(names for names in ends if len(set(names)) == len(names))
    return tuple(
        Curve(name=label, label=label, family=RUN_FAMILY, logs=(read_log(folder),))
        for label, folder in zip(labels, folders, strict=True)
    )

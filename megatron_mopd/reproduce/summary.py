"""summary.json: the comparison's figures, as the report reads them, with intervals over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mopd.evaluation.results import EvalResult, Score
from megatron_mopd.report import mean, normalised
from megatron_mopd.reproduce.config import BASE, TEACHERS, ReproduceConfig
from megatron_mopd.reproduce.cost import own_nodes
from megatron_mopd.reproduce.plan import scaled_name
from megatron_mopd.reproduce.statistics import Estimate
from megatron_mopd.reproduce.store import StoredNode, read_json

VERSION = 1
COMPUTE = ("generated_tokens", "trained_tokens", "teacher_tokens", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Everything that was measured, seed by seed; the pure part of the summary works on it."""

    domains: Mapping[str, str]
    """domain -> its teacher."""
    results: Mapping[tuple[int, str], EvalResult]
    """(seed, base | teachers.NAME | METHOD) -> its evaluation."""
    compute: Mapping[tuple[int, str], Mapping[str, float]]
    """(seed, the same names) -> own cost."""

    def accuracy(self, seed: int, model: str, domain: str) -> float:
        return self.results[seed, model].domains[domain].accuracy

    def score(self, seed: int, model: str, domain: str) -> float:
        """Normalised by the base and the domain's teacher of the same seed."""
        teacher = self.accuracy(seed, f"{TEACHERS}.{self.domains[domain]}", domain)
        return normalised(self.accuracy(seed, model, domain), self.accuracy(seed, BASE, domain), teacher)

    def headroom_recovered(self, seed: int, model: str, domains: Iterable[str]) -> float:
        """What the model gained on the base over what the domains' teachers did, both summed over the domains.

        The mean score weighs every domain alike, one with next to no headroom too, of which a student may seem to have
        kept ten times as much as there was; here such a domain hardly counts. nan where the teachers gained nothing.
        """
        gained, there = 0.0, 0.0
        for domain in domains:
            base = self.accuracy(seed, BASE, domain)
            gained += self.accuracy(seed, model, domain) - base
            there += self.accuracy(seed, f"{TEACHERS}.{self.domains[domain]}", domain) - base
        return gained / there if there > 1e-9 else math.nan

    def mean_score(self, seed: int, model: str, domains: Iterable[str]) -> float:
        """Mean over the domains in which the teacher is better than the base; nan where it is in none."""
        return mean({domain: self.score(seed, model, domain) for domain in domains})


def read_figures(
    domains: Mapping[str, str], stored: Mapping[str, StoredNode], seeds: Sequence[int], models: Sequence[str]
) -> Figures:
    """Of models whose nodes and evaluations are done."""
    results, compute = {}, {}
    nodes = {name: item.node for name, item in stored.items()}
    for seed in seeds:
        for model in models:
            name = f"seed{seed}/{model}"
            results[seed, model] = EvalResult.from_json(read_json(stored[f"{name}.eval"].output))
            own = [name] if model == BASE or model.startswith(TEACHERS) else own_nodes(nodes, model, seed)
            records = [stored[node].record()["compute"] for node in own]
            compute[seed, model] = {key: math.fsum(record[key] for record in records) for key in COMPUTE}
    return Figures(domains=domains, results=results, compute=compute)


def lost_leads(figures: Figures) -> list[str]:
    """Where a teacher is no better than the base in its domain: a normalised score there means nothing, or the
    opposite of what it seems to say."""
    found = []
    for seed in sorted({seed for seed, _ in figures.results}):
        for domain, teacher in figures.domains.items():
            own = figures.accuracy(seed, f"{TEACHERS}.{teacher}", domain)
            base = figures.accuracy(seed, BASE, domain)
            if own <= base:
                found.append(
                    f"seed {seed}: teacher {teacher} has {own:.3f} in {domain}, the base {base:.3f}: no lead to keep, "
                    "so this domain and seed have no normalised score; train the teacher for longer"
                )
    return found


def summarise(
    config: ReproduceConfig,
    figures: Figures,
    stored: Mapping[str, StoredNode],
    seeds: Sequence[int],
    methods: Sequence[str],
) -> dict[str, Any]:
    """The tree of summary.json, of the methods that are complete for all `seeds`."""

    def over_seeds(figure: Callable[[int], float]) -> dict[str, Any]:
        return Estimate.of({seed: figure(seed) for seed in seeds}).as_json()

    def accuracies(model: str) -> dict[str, Any]:
        return {
            name: {"accuracy": over_seeds(partial(figures.accuracy, model=model, domain=name))}
            for name in figures.domains
        }

    def compute(model: str) -> dict[str, float]:
        return {key: math.fsum(figures.compute[seed, model][key] for seed in seeds) / len(seeds) for key in COMPUTE}

    def method(name: str) -> dict[str, Any]:
        scores = accuracies(name)
        for domain, entry in scores.items():
            entry["score"] = over_seeds(partial(figures.score, model=name, domain=domain))
        return {
            "label": config.label(name),
            "family": config.methods[name].family,
            "score": over_seeds(partial(figures.mean_score, model=name, domains=figures.domains)),
            "domains": scores,
            "rollouts": config.rollouts(name),
            **other_abilities(figures, name, seeds),
            "compute": compute(name),
            "runs": {str(seed): str(stored[f"seed{seed}/{name}"].folder) for seed in seeds},
        }

    return {
        "version": VERSION,
        "title": config.title,
        "domains": list(figures.domains),
        "seeds": list(seeds),
        "base": {"domains": accuracies(BASE), **other_abilities(figures, BASE, seeds), "compute": compute(BASE)},
        "teachers": {
            name: {
                "domain": _taught(figures, name),
                "domains": accuracies(f"{TEACHERS}.{name}"),
                **other_abilities(figures, f"{TEACHERS}.{name}", seeds),
                "compute": compute(f"{TEACHERS}.{name}"),
                "runs": {str(seed): str(stored[f"seed{seed}/{TEACHERS}.{name}"].folder) for seed in seeds},
            }
            for name in config.teachers
        },
        "methods": {name: method(name) for name in methods},
        "scaling": scaling(config, figures, seeds, methods),
    }


def summary_path(run_dir: Path, seeds: int) -> Path:
    """summary.json, unless the one that is there is of more seeds: hours of results, which a quick look with
    `--seeds` must not replace."""
    path = run_dir / "summary.json"
    if len(read_json(path).get("seeds", [])) > seeds:
        return run_dir / f"summary-{seeds}-seed{'s' * (seeds > 1)}.json"
    return path


def _taught(figures: Figures, teacher: str) -> str | list[str] | None:
    """Its domain; a list where it has several, None where it has none."""
    domains = [domain for domain, name in figures.domains.items() if name == teacher]
    return (domains[0] if len(domains) == 1 else domains) or None


def other_abilities(figures: Figures, model: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Benchmarks, perplexity and out-of-domain accuracy; null where the evaluation has none."""
    results = {seed: figures.results[seed, model] for seed in seeds}
    perplexities = {seed: result.perplexity for seed, result in results.items() if result.perplexity is not None}

    def accuracies(tasks: Callable[[EvalResult], Mapping[str, Score]]) -> dict[str, Any] | None:
        names = list(tasks(next(iter(results.values()))))
        per_seed = {name: {seed: tasks(result)[name].accuracy for seed, result in results.items()} for name in names}
        return {name: Estimate.of(values).as_json() for name, values in per_seed.items()} or None

    return {
        "benchmarks": accuracies(lambda result: result.benchmarks),
        "perplexity": Estimate.of(perplexities).as_json() if perplexities else None,
        "out_of_domain": accuracies(lambda result: result.out_of_domain),
    }


def scaling(
    config: ReproduceConfig, figures: Figures, seeds: Sequence[int], complete: Sequence[str]
) -> list[dict[str, Any]] | None:
    """What each method with its first n domains recovers of the headroom, over those domains only; points that are not
    made yet are left out."""
    if config.scaling is None:
        return None
    names = list(figures.domains)
    points = []
    for method in config.scaling.methods:
        for count in sorted(config.scaling.teachers):
            model = method if count == len(names) else scaled_name(method, count)
            if method in complete and all((seed, model) in figures.results for seed in seeds):
                scores = {seed: figures.headroom_recovered(seed, model, names[:count]) for seed in seeds}
                estimate = Estimate.of(scores).as_json()
                points.append({"method": method, "label": config.label(method), "teachers": count, "score": estimate})
    return points

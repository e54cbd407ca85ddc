"""Tables of a study as data; `html.py` and `markdown.py` write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mopd.report import mean
from megatron_mopd.report_page.published import ABLATIONS, BASE, BENCHMARKS, DOMAINS, TABLE, TEACHER, Published
from megatron_mopd.report_page.study import COMPUTE, UNKNOWN, Method, Model, Study
from megatron_mopd.report_page.study_figures import compact
from megatron_mopd.reproduce.statistics import Estimate

NONE = "–"  # noqa: RUF001 (an en dash, as tables have it)


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    interval: str = ""
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    caption: str
    groups: tuple[tuple[str, int], ...]
    """Heading above the columns -> how many of them; the first column is that of the names and has none."""
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    rules: tuple[int, ...] = ()
    """Rows with a line above them."""


def score_table(study: Study) -> Table:
    """Normalised scores beside the published ones; published methods that the study does not have come last."""
    best = {domain: _best([method.domain_scores.get(domain) for method in study.methods]) for domain in study.domains}
    best_mean = _best([method.score for method in study.methods])
    rows = []
    for method in study.methods:
        scores = [_cell(method.domain_scores.get(domain), best[domain]) for domain in study.domains]
        published = TABLE.get(method.name) or ABLATIONS.get(method.name)
        rows.append((Cell(method.label), _cell(method.score, best_mean), *scores, *_published_cells(published)))
    own = {method.name for method in study.methods}
    others = [row for name, row in TABLE.items() if name not in own]
    for published in others:
        nothing = [Cell(NONE)] * (len(study.domains) + 1)
        rows.append((Cell(published.label), *nothing, *_published_cells(published)))
    return Table(
        caption=(
            "Normalised score, (x - base) / (teacher - base): 0 is the base, 1 the domain's teacher. "
            f"{_intervals(study)} Bold: the best of a column. Published: arXiv 2606.30406, Qwen3-30B-A3B, one run a "
            "method, no intervals; its MOPD row is the sampled (policy gradient) objective, its top-k row is from the "
            "ablation."
        ),
        groups=(("this study", len(study.domains) + 1), ("published", len(DOMAINS) + 1)),
        columns=("method", "mean", *study.domains, "mean", *DOMAINS),
        rows=tuple(rows),
        rules=(len(study.methods),) if others else (),
    )


def accuracy_table(study: Study) -> Table:
    """Held-out accuracy of the base, of each teacher on every domain, and of the methods."""
    models = [("base", study.base), *((f"teacher {teacher.name}", teacher.model) for teacher in study.teachers)]
    first = len(models)
    models += [(method.label, method.model) for method in study.methods]
    ours = [model for _, model in models[first:]]
    best = {domain: _best([model.accuracy.get(domain) for model in ours]) for domain in study.domains}
    best_mean = _best([_mean_accuracy(model, study.domains) for model in ours])
    rows = [
        (
            Cell(name),
            _cell(_mean_accuracy(model, study.domains), best_mean if row >= first else None),
            *(_cell(model.accuracy.get(domain), best[domain] if row >= first else None) for domain in study.domains),
        )
        for row, (name, model) in enumerate(models)
    ]
    return Table(
        caption=f"Accuracy on held-out prompts. {_intervals(study)} Bold: the best method of a column.",
        groups=(),
        columns=("model", "mean", *study.domains),
        rows=tuple(rows),
        rules=(1, first) if study.teachers else (first,),
    )


def benchmark_table(study: Study) -> Table:
    """Accuracy of the base, the teachers and the methods on the public benchmarks that were evaluated."""
    models = [("base", study.base), *((f"teacher {teacher.name}", teacher.model) for teacher in study.teachers)]
    first = len(models)
    models += [(method.label, method.model) for method in study.methods]
    names = list(dict.fromkeys(name for _, model in models for name in model.benchmarks))
    best = {name: _best([model.benchmarks.get(name) for _, model in models[first:]]) for name in names}
    return Table(
        caption=f"Accuracy on public benchmarks. {_intervals(study)} Bold: the best method of a column.",
        groups=(),
        columns=("model", *names),
        rows=tuple(
            (Cell(label), *(_cell(model.benchmarks.get(name), best[name] if row >= first else None) for name in names))
            for row, (label, model) in enumerate(models)
        ),
        rules=(1, first) if study.teachers else (first,),
    )


def published_table() -> Table:
    """The published accuracies, from which the published scores follow."""
    rows = [BASE, TEACHER, *TABLE.values(), *ABLATIONS.values()]
    return Table(
        caption=(
            "Published accuracy in per cent (arXiv 2606.30406, Table 2; the top-k row from its ablation of the math "
            "teacher). The student is Qwen3-30B-A3B; AIME is the mean of 32 answers, the others are single runs."
        ),
        groups=(),
        columns=("model", *BENCHMARKS, "normalised"),
        rows=tuple(
            (Cell(row.label), *(Cell(f"{value:.2f}") for value in row.accuracy), Cell(_number(row.score())))
            for row in rows
        ),
        rules=(2, 2 + len(TABLE)),
    )


def compute_table(study: Study) -> Table:
    keys = list(COMPUTE)
    costs = [(method.label, method.compute) for method in study.methods]
    costs += [(f"training teacher {teacher.name}", teacher.compute) for teacher in study.teachers]
    return Table(
        caption="Cost of each method, mean over seeds. A method's own; what the teachers cost stands in their rows.",
        groups=(),
        columns=("", *COMPUTE.values()),
        rows=tuple(
            (Cell(name), *(Cell(compact(cost[key]) if key in cost else NONE) for key in keys)) for name, cost in costs
        ),
        rules=(len(study.methods),),
    )


def forgetting_table(study: Study) -> Table:
    tasks = list(dict.fromkeys(name for method in study.methods for name in method.model.out_of_domain))
    models = [("base", study.base), *((method.label, method.model) for method in study.methods)]
    return Table(
        caption=f"What training did to the rest: text and tasks that nothing was trained on. {_intervals(study)}",
        groups=(),
        columns=("model", "perplexity", "over the base's", *tasks),
        rows=tuple(
            (
                Cell(name),
                _cell(model.perplexity, None, digits=2),
                _cell(model.perplexity_over(study.base) if model is not study.base else None, None),
                *(_cell(model.out_of_domain.get(task), None) for task in tasks),
            )
            for name, model in models
        ),
        rules=(1,),
    )


def scaling_table(study: Study) -> Table:
    counts = sorted({point.teachers for point in study.scaling})
    labels = {point.method: point.label for point in study.scaling}
    scores = {(point.method, point.teachers): point.score for point in study.scaling}
    return Table(
        caption=(
            "Headroom recovered over the number of teachers: the student's gain on the base over the teachers', both "
            f"summed over the domains. {_intervals(study)}"
        ),
        groups=(("teachers", len(counts)),),
        columns=("method", *(str(count) for count in counts)),
        rows=tuple(
            (Cell(label), *(_cell(scores.get((method, count)), None) for count in counts))
            for method, label in labels.items()
        ),
    )


def _intervals(study: Study) -> str:
    if len(study.seeds) < 2:
        return "One seed, so no intervals."
    return f"Mean of {len(study.seeds)} seeds [95% interval]."


def _mean_accuracy(model: Model, domains: Sequence[str]) -> Estimate:
    """Of the mean over the domains, seed by seed; without an interval where the seeds are not given."""
    if not all(domain in model.accuracy for domain in domains):
        return UNKNOWN
    rows = [model.accuracy[domain] for domain in domains]
    seeds = [seed for seed in rows[0].per_seed if all(seed in row.per_seed for row in rows)] if rows else []
    if len(seeds) > 1:
        return Estimate.of({seed: sum(row.per_seed[seed] for row in rows) / len(rows) for seed in seeds})
    return Estimate(mean=mean({domain: row.mean for domain, row in zip(domains, rows, strict=True)}))


def _best(estimates: Sequence[Estimate | None]) -> float | None:
    known = [estimate.mean for estimate in estimates if estimate is not None and estimate.known]
    return max(known) if len(known) > 1 else None


def _cell(estimate: Estimate | None, best: float | None, digits: int = 3) -> Cell:
    if estimate is None or not estimate.known:
        return Cell(NONE)
    bounds = estimate.interval
    interval = f"[{_number(bounds[0], digits)}, {_number(bounds[1], digits)}]" if bounds else ""
    text = _number(estimate.mean, digits)
    return Cell(text, interval, best is not None and text == _number(best, digits))  # what reads the same is the same


def _published_cells(published: Published | None) -> list[Cell]:
    if published is None:
        return [Cell(NONE)] * (len(DOMAINS) + 1)
    return [Cell(_number(value)) for value in (published.score(), *published.domain_scores().values())]


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}"


def headline(methods: Sequence[Method]) -> str:
    """The methods from the best score down, in one sentence; '' without a score."""
    ranked = sorted((method for method in methods if method.score.known), key=lambda method: -method.score.mean)
    parts = []
    for method in ranked[:3]:
        cell = _cell(method.score, None)
        parts.append(f"{method.label} {cell.text}{' ' + cell.interval if cell.interval else ''}")
    return f"Highest mean normalised scores: {', '.join(parts)}." if len(parts) > 1 else "".join(parts)

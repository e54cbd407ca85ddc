"""What a step has to do: how many answers of how many tokens, and how they fall into micro-batches."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from megatron_mopd.config import RunConfig
from megatron_mopd.metrics import read_records
from megatron_mopd.packing import plan_microbatches
from megatron_mopd.plan.figure import How
from megatron_mopd.token_layout import padded_length

MEAN_SHARE = 0.5
"""Assumed mean length of prompts and answers, as a share of what the configuration allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainLoad:
    name: str
    teacher: str | None
    rollouts: int
    """Answers of a step."""
    longest_prompt: int
    longest_response: int
    prompt: float
    """Mean tokens."""
    response: float
    """Mean tokens."""

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_response

    @property
    def mean(self) -> float:
        return self.prompt + self.response


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    domains: tuple[DomainLoad, ...]
    updates: int
    """Optimizer updates of a step."""
    lengths_how: How
    lengths_source: str

    @property
    def rollouts(self) -> int:
        return sum(domain.rollouts for domain in self.domains)

    @property
    def tokens(self) -> float:
        """Prompts and answers of a step."""
        return sum(domain.rollouts * domain.mean for domain in self.domains)

    @property
    def response_tokens(self) -> float:
        return sum(domain.rollouts * domain.response for domain in self.domains)

    @property
    def longest(self) -> int:
        return max(domain.longest for domain in self.domains)

    @property
    def attended(self) -> float:
        """Sum over the tokens of a step of the tokens that each attends to: half the square of the mean length, which
        is too little where lengths differ much."""
        return sum(domain.rollouts * domain.mean**2 / 2 for domain in self.domains)


def workload_of(config: RunConfig, response_share: float | None = None) -> Workload:
    """The steps of `config`. Mean answer lengths: those that its run has logged, else a share of the longest."""
    logged = {} if response_share is not None else _logged_lengths(config)
    share = MEAN_SHARE if response_share is None else response_share
    domains = []
    # With one domain after another, the plan is that of its longest one having all prompts.
    mixed = config.domain_schedule == "mixed"
    shares = config.domain_shares(0) if mixed else dict.fromkeys(config.domains, 1.0)
    before = 0.0  # rounded at the sums, so that all prompts are shared out
    for name, spec in config.domains.items():
        begin, before = before, before + shares[name] if mixed else 0.0
        prompts = round((begin + shares[name]) * config.prompts_per_step) - round(begin * config.prompts_per_step)
        domains.append(
            DomainLoad(
                name=name,
                teacher=spec.teacher,
                rollouts=max(1, prompts) * config.rollout.samples_per_prompt,
                longest_prompt=spec.max_prompt_tokens,
                longest_response=spec.max_response_tokens,
                prompt=spec.max_prompt_tokens * MEAN_SHARE,
                response=logged.get(name, spec.max_response_tokens * share),
            )
        )
    if config.domain_schedule == "sequential":
        domains = [max(domains, key=lambda domain: domain.longest)]
    how: How = "given" if response_share is not None else "measured" if logged else "assumed"
    source = f"{config.run_dir}/metrics.jsonl, last steps" if logged else f"{share:g} of max_response_tokens"
    return Workload(
        domains=tuple(domains),
        updates=config.optim.updates_per_step,
        lengths_how=how,
        lengths_source=f"answers: {source}; prompts: assumed {MEAN_SHARE:g} of max_prompt_tokens",
    )


def _logged_lengths(config: RunConfig, last: int = 20) -> dict[str, float]:
    path = Path(config.run_dir) / "metrics.jsonl"
    if not path.is_file():
        return {}
    records = read_records(path)[-last:]
    lengths = {}
    for name in config.domains:
        values = [record[f"response_tokens/{name}"] for record in records if f"response_tokens/{name}" in record]
        if values:
            lengths[name] = sum(values) / len(values)
    return lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Micro-batches of one update on one data-parallel rank."""

    count: int
    tokens: int
    """Of the largest one, over all context ranks."""
    rank_tokens: int
    """Of the largest one, on one context rank."""
    rows: int
    """Trained tokens of the largest one, on the context rank with most."""
    update_rows: int
    """Trained tokens of all of them, likewise."""
    sequences: int
    """Of the largest one."""


@functools.cache
def pack_longest(
    workload: Workload, order: tuple[str | None, ...], ranks: int, max_tokens: int, context: int = 1
) -> Packing:
    """The micro-batches when every answer is as long as it may be: what memory must hold. By the packing of a step.

    Of `context` ranks each holds an equal share of the tokens, and the one in the middle of long answers nothing else.
    """
    lengths, rows, teachers = [], [], []
    for domain in workload.domains:
        count = max(1, domain.rollouts // workload.updates)
        lengths += [padded_length(domain.longest, context)] * count
        rows += [domain.longest_response] * count
        teachers += [domain.teacher] * count
    plans = plan_microbatches(lengths, teachers, order, ranks, max_tokens)
    of_rank = [0] * ranks
    largest, largest_rows, sequences = 0, 0, 0
    for plan in plans:
        for rank, members in enumerate(plan.members):
            tokens = sum(lengths[i] for i in members)
            trained = sum(min(rows[i], lengths[i] // context) for i in members)
            of_rank[rank] += trained
            largest, largest_rows = max(largest, tokens), max(largest_rows, trained)
            sequences = max(sequences, len(members))
    return Packing(
        count=len(plans),
        tokens=largest,
        rank_tokens=largest // context,
        rows=largest_rows,
        update_rows=max(of_rank),
        sequences=sequences,
    )

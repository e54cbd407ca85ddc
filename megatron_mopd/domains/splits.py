"""Which questions are kept out of training: the held-out and validation splits of every domain, and the benchmarks.

Two questions are the same when the chat template renders them to the same text, whatever the domain they come from
and its system prompt. Training sees none of the questions here; the mixer leaves them out and counts them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mopd.config import BenchmarkSpec, DomainSpec, RunConfig, Split
from megatron_mopd.domains.ifeval import read_instructions
from megatron_mopd.domains.source import (
    Item,
    JsonlSource,
    ReasoningGymSource,
    Source,
    derive_seed,
    read_jsonl,
    split_off_tenth,
)
from megatron_mopd.tokenizer import Message, Tokenizer
from megatron_mopd.types import Prompt
from megatron_mopd.yaml_config import ConfigError

PATIENCE = 1000
"""Unusable candidates in a row after which a source counts as empty."""
_TENTH: dict[Split, int] = {"held_out": 0, "validation": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Distinct questions that training must not see."""

    items: tuple[tuple[int, Item], ...]
    """(index in its source, item) of those that are answered."""
    hashes: frozenset[str]
    """Of these and of the rest of their file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Questions as the model gets them."""

    prompts: tuple[Prompt, ...]
    too_long: int
    """Questions that are left out because they exceed `max_prompt_tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSources:
    training: Source
    splits: Mapping[Split, Source | None]
    """None: a file without a line for this split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Everything of a run that is kept out of training."""

    domains: Mapping[str, Mapping[Split, Questions]]
    benchmarks: Mapping[str, Mapping[str, Questions]]
    """'benchmarks' or 'out_of_domain' -> name -> its questions."""

    @property
    def hashes(self) -> frozenset[str]:
        of_domains = (questions.hashes for splits in self.domains.values() for questions in splits.values())
        of_benchmarks = (questions.hashes for tasks in self.benchmarks.values() for questions in tasks.values())
        return frozenset[str]().union(*of_domains, *of_benchmarks)


def question_hash(item: Item, tokenizer: Tokenizer) -> str:
    """sha256 of the question as the chat template renders it, without a system prompt of the domain's."""
    return hashlib.sha256(tokenizer.render_text(item.messages).encode()).hexdigest()


def chat_of(item: Item, spec: DomainSpec) -> list[Message]:
    """The item behind the domain's system prompt."""
    if spec.system_prompt is None:
        return list(item.messages)
    return [{"role": "system", "content": spec.system_prompt}, *item.messages]


def render_prompt(
    item: Item, spec: DomainSpec, *, domain: str, identity: str, answer: str, question: str, tokenizer: Tokenizer
) -> Prompt | None:
    """The item behind the domain's system prompt, tokenised; None when it exceeds `max_prompt_tokens`.

    `question` is its `question_hash`.
    """
    token_ids = tokenizer.render(chat_of(item, spec))
    if len(token_ids) > spec.max_prompt_tokens:
        return None
    return Prompt(
        id=identity,
        domain=domain,
        question=question,
        token_ids=token_ids,
        answer=answer,
        max_response_tokens=spec.max_response_tokens,
        record=item.record,
    )


def render_questions(
    questions: Questions, spec: DomainSpec, *, domain: str, prefix: str, tokenizer: Tokenizer
) -> PromptSet:
    """The prompts of a split, with the ids '<prefix>/<index>'. ConfigError when none is short enough."""
    rendered = [
        render_prompt(
            item,
            spec,
            domain=domain,
            identity=f"{prefix}/{index}",
            answer=item.answer,
            question=question_hash(item, tokenizer),
            tokenizer=tokenizer,
        )
        for index, item in questions.items
    ]
    prompts = tuple(prompt for prompt in rendered if prompt is not None)
    return PromptSet(prompts=prompts, too_long=len(rendered) - len(prompts))


def find_splits(config: RunConfig, sources: Mapping[str, DomainSources], tokenizer: Tokenizer) -> Splits:
    """The questions to evaluate on. They depend on `evaluation.seed` and not on the run's.

    A validation question is none of any domain's held-out ones.
    """
    spec = config.evaluation
    held_out = {name: _distinct(source.splits["held_out"], spec.prompts, tokenizer) for name, source in sources.items()}
    known = frozenset[str]().union(*(questions.hashes for questions in held_out.values()))
    validation = {
        name: _distinct(source.splits.get("validation"), spec.validation_prompts, tokenizer, known)
        for name, source in sources.items()
    }
    groups = {"benchmarks": spec.benchmarks, "out_of_domain": spec.out_of_domain}
    return Splits(
        domains={name: {"held_out": held_out[name], "validation": validation[name]} for name in sources},
        benchmarks={
            group: {name: _benchmark(task, group, name, config, tokenizer) for name, task in tasks.items()}
            for group, tasks in groups.items()
        },
    )


def _distinct(
    source: Source | None, count: int, tokenizer: Tokenizer, excluded: frozenset[str] = frozenset()
) -> Questions:
    """The first `count` distinct questions, fewer where they stop coming; of a file all hashes."""
    if source is None or count == 0:
        return Questions(items=(), hashes=frozenset())
    wanted = source.size or count
    found: dict[str, tuple[int, Item]] = {}
    index = repeated = 0
    patience = source.size or PATIENCE  # a file is read to its end, however often it repeats itself
    while len(found) < wanted and repeated < patience and index < (source.size or index + 1):
        item = source.item(index)
        key = question_hash(item, tokenizer)
        if key in found or key in excluded:
            repeated += 1
        else:
            repeated = 0
            found[key] = (index, item)
        index += 1
    return Questions(items=tuple(found.values())[:count], hashes=frozenset(found))


def _benchmark(task: BenchmarkSpec, group: str, name: str, config: RunConfig, tokenizer: Tokenizer) -> Questions:
    """All questions of a file, or as many as are asked for; nothing is split off, as nothing trains on them."""
    key = f"evaluation.{group}.{name}.source"
    seed = derive_seed(config.evaluation.seed, "held out")
    source: Source
    if task.source.reasoning_gym is not None:
        source = ReasoningGymSource(task.source.reasoning_gym, task.source.params, seed, key)
        count = task.prompts or config.evaluation.prompts
    else:
        assert task.source.jsonl is not None
        items = _read(task.source.jsonl, name, task, needs_answer(task), key)
        source = JsonlSource(items, seed)
        count = task.prompts or len(items)
    return _distinct(source, count, tokenizer)


def needs_answer(spec: DomainSpec) -> bool:
    """Whether the verifier compares with the reference answer."""
    return spec.verifier in ("math", "exact")


def open_sources(name: str, config: RunConfig) -> DomainSources:
    """A domain's training stream, and where its splits come from. Raises ConfigError."""
    domain, evaluation = config.domains[name], config.evaluation
    spec, key = domain.source, f"domains.{name}.source"
    training_seed = derive_seed(config.seed, "training", name)
    seeds: dict[Split, int] = {"held_out": derive_seed(evaluation.seed, "held out")}
    if evaluation.validation_prompts:
        seeds["validation"] = derive_seed(evaluation.seed, "validation")
    if spec.reasoning_gym is not None:
        task, params = spec.reasoning_gym, spec.params
        return DomainSources(
            training=ReasoningGymSource(task, params, training_seed, key),
            splits={split: ReasoningGymSource(task, params, seed, key) for split, seed in seeds.items()},
        )
    assert spec.jsonl is not None
    answers = config.reads_answers or needs_answer(domain)
    items = _read(spec.jsonl, name, domain, answers, key)
    files = {split: getattr(spec, split) for split in seeds}
    kept = {split: _read(file, name, domain, answers, key) for split, file in files.items() if file}
    _check_overlap(key, {spec.jsonl: items} | {files[split]: part for split, part in kept.items()})
    total = len(items)
    for split in seeds:
        if split not in kept:
            items, kept[split] = split_off_tenth(items, _TENTH[split])
    if not items:
        raise ConfigError(
            f"{key}: all {total} prompts of {spec.jsonl} fall into the held-out tenth;"
            " add lines, or name another file in held_out"
        )
    return DomainSources(
        training=JsonlSource(items, training_seed),
        splits={split: JsonlSource(kept[split], seed) if kept[split] else None for split, seed in seeds.items()},
    )


def _read(file: str, name: str, spec: DomainSpec, answers: bool, key: str) -> list[Item]:
    check = read_instructions if spec.verifier == "ifeval" else None
    return read_jsonl(Path(file), name, needs_answer=answers, check=check, key=key)


def _check_overlap(key: str, files: Mapping[str, Sequence[Item]]) -> None:
    """Raise ConfigError when a question is in two of a domain's files: one of them would silently lose it."""
    seen: dict[str, str] = {}
    for file, items in files.items():
        shared = sorted({item.key for item in items if item.key in seen})
        if shared:
            first = shared[0] if len(shared[0]) <= 60 else f"{shared[0][:60]}..."
            raise ConfigError(
                f"{key}: {len(shared)} questions of {file} are also in {seen[shared[0]]}, one is {first!r};"
                " a question belongs to training or to one evaluation file: remove it from the other"
            )
        seen |= {item.key: file for item in items}

"""Draws the prompts of a step from all domains, in exact shares, alike on every rank and after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mopd.config import RunConfig
from megatron_mopd.domains.ifeval import read_instructions
from megatron_mopd.domains.source import (
    Item,
    JsonlSource,
    ReasoningGymSource,
    Source,
    derive_seed,
    read_jsonl,
    split_held_out,
    unit_interval,
)
from megatron_mopd.tokenizer import Message, Tokenizer
from megatron_mopd.types import Prompt
from megatron_mopd.yaml_config import ConfigError

PATIENCE = 1000
"""Unusable candidates in a row after which a domain counts as empty."""


@dataclass
class DomainState:
    """How far one domain has been read. All that a resume needs."""

    cursor: int = 0
    """Index of the next candidate in the source."""
    credit: float = 0.0
    """Prompts that this domain is owed: its share of all draws so far, less what it got."""
    drawn: int = 0
    too_long: int = 0
    held_out_skipped: int = 0


class DomainMixer:
    """Every rank builds one from the same configuration and draws the same prompts."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer):
        self._shares = config.domain_shares
        self._feeds = {name: _Feed(name, config, tokenizer) for name in config.domains}
        self._states = {name: DomainState() for name in config.domains}

    def draw(self, count: int, step: int = 0) -> list[Prompt]:
        """The next `count` prompts, domains interleaved, in the shares of `step`.

        Each prompt goes to the domain that is owed most, so shares are exact whenever count * share is whole
        for all, and the rest is carried over: drawing 20 twice is drawing 40. Raises ConfigError for a domain
        that has no usable prompt left.
        """
        prompts = []
        shares = self._shares(step)
        for _ in range(count):
            for name, share in shares.items():
                self._states[name].credit += share
            # Rounded, so that a tie in spite of the last bit goes to the domain that is named first.
            chosen = max(self._states, key=lambda name: round(self._states[name].credit, 9))
            self._states[chosen].credit -= 1.0
            prompts.append(self._feeds[chosen].next(self._states[chosen]))
        return prompts

    def held_out(self, domain: str) -> list[Prompt]:
        """The domain's evaluation prompts: distinct, never trained on, the same whatever the run's seed.

        `evaluation.prompts` of them, fewer where the source has no more.
        """
        prompts = self._feeds[domain].held_out()
        if not prompts:
            raise ConfigError(
                f"domains.{domain}.source: no held-out prompt within max_prompt_tokens;"
                " give a held_out file or more lines"
            )
        return prompts

    def check(self) -> None:
        """Raise ConfigError for a domain that has no usable prompt to train on, or none to evaluate with."""
        for name, feed in self._feeds.items():
            feed.next(DomainState())
            self.held_out(name)

    def counts(self) -> dict[str, dict[str, int]]:
        """Since the run began, by domain: prompts drawn, and candidates left out and why."""
        names = ("drawn", "too_long", "held_out_skipped")
        return {domain: {name: getattr(state, name) for name in names} for domain, state in self._states.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        return {name: asdict(state) for name, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises ConfigError when it is of other domains."""
        if set(state) != set(self._states):
            raise ConfigError(
                f"domains: the checkpoint has {', '.join(sorted(state))}, the configuration"
                f" {', '.join(sorted(self._states))}; resume with the same domains or start another run_dir"
            )
        self._states = {name: DomainState(**state[name]) for name in self._states}


class _Feed:
    """One domain: its training stream without the held-out questions, and its held-out prompts."""

    def __init__(self, name: str, config: RunConfig, tokenizer: Tokenizer):
        self._name, self._spec, self._tokenizer = name, config.domains[name], tokenizer
        self._seed, self._held_out_count = config.seed, config.evaluation.prompts
        self._wrong_share = self._spec.wrong_answers if config.reads_answers else 0.0
        self._sft = config.reads_answers
        self._training, self._evaluation = _open_sources(name, config, needs_answer=self._needs_answer)
        self._held_out_items: list[tuple[int, Item]] | None = None
        self._held_out_keys: frozenset[str] = frozenset()

    @property
    def _needs_answer(self) -> bool:
        return self._sft or self._spec.verifier in ("math", "exact")

    def next(self, state: DomainState) -> Prompt:
        """The next usable prompt; moves `state` past it and past those that were left out."""
        self._find_held_out()
        for _ in range(PATIENCE):
            index = state.cursor
            state.cursor += 1
            item = self._training.item(index)
            if item.key in self._held_out_keys:
                state.held_out_skipped += 1
                continue
            prompt = self._prompt(item, f"{self._name}/{index}", self._answer(item, index))
            if prompt is None:
                state.too_long += 1
                continue
            state.drawn += 1
            return prompt
        raise ConfigError(
            f"domains.{self._name}: {PATIENCE} prompts in a row cannot be used (in all {state.too_long}"
            f" longer than max_prompt_tokens={self._spec.max_prompt_tokens}, {state.held_out_skipped} held"
            " out for evaluation); raise max_prompt_tokens, widen the source, or lower evaluation.prompts"
        )

    def held_out(self) -> list[Prompt]:
        prompts = (
            self._prompt(item, f"{self._name}/held_out/{index}", item.answer) for index, item in self._find_held_out()
        )
        return [prompt for prompt in prompts if prompt is not None]

    def _find_held_out(self) -> list[tuple[int, Item]]:
        """Once: the questions to evaluate on. All of a held-out file is kept out of training, used or not."""
        if self._held_out_items is None:
            source = self._evaluation
            found = {} if source is None else dict(_distinct(source, source.size or self._held_out_count))
            self._held_out_keys = frozenset(found)
            self._held_out_items = list(found.values())[: self._held_out_count]
        return self._held_out_items

    def _prompt(self, item: Item, identity: str, answer: str) -> Prompt | None:
        """Rendered and tokenised; None when it is too long."""
        system: tuple[Message, ...] = ()
        if self._spec.system_prompt is not None:
            system = ({"role": "system", "content": self._spec.system_prompt},)
        token_ids = self._tokenizer.render([*system, *item.messages])
        if len(token_ids) > self._spec.max_prompt_tokens:
            return None
        return Prompt(
            id=identity,
            domain=self._name,
            token_ids=token_ids,
            answer=answer,
            max_response_tokens=self._spec.max_response_tokens,
            record=item.record,
        )

    def _answer(self, item: Item, index: int) -> str:
        """The reference answer; for the share `wrong_answers` of the items, the next one that differs."""
        if self._sft and not item.answer:
            raise ConfigError(
                f"domains.{self._name}.source: stage 'sft' needs reference answers and item {index} has none"
            )
        share = self._wrong_share
        if share == 0 or unit_interval(self._seed, "wrong answer", self._name, index) >= share:
            return item.answer
        for offset in range(1, PATIENCE + 1):
            other = self._training.item(index + offset).answer
            if other.strip() != item.answer.strip():
                return other
        raise ConfigError(
            f"domains.{self._name}.wrong_answers: all answers are {item.answer!r}, none is wrong; set it to 0"
        )


def _distinct(source: Source, count: int) -> Iterator[tuple[str, tuple[int, Item]]]:
    """(key, (index, item)) of the first `count` distinct questions, fewer where they stop coming."""
    seen: set[str] = set()
    index = repeated = 0
    while len(seen) < count and repeated < PATIENCE and index < (source.size or index + 1):
        item = source.item(index)
        if item.key in seen:
            repeated += 1
        else:
            repeated = 0
            seen.add(item.key)
            yield item.key, (index, item)
        index += 1


def _open_sources(name: str, config: RunConfig, needs_answer: bool) -> tuple[Source, Source | None]:
    """(training, held out); the latter depends on `evaluation.seed` and not on the run's seed."""
    spec = config.domains[name].source
    key = f"domains.{name}.source"
    training_seed = derive_seed(config.seed, "training", name)
    held_out_seed = derive_seed(config.evaluation.seed, "held out")
    if spec.reasoning_gym is not None:
        training = ReasoningGymSource(spec.reasoning_gym, spec.params, training_seed, key)
        held_out = ReasoningGymSource(spec.reasoning_gym, spec.params, held_out_seed, key)
        return training, held_out
    assert spec.jsonl is not None
    check = read_instructions if config.domains[name].verifier == "ifeval" else None
    items = read_jsonl(Path(spec.jsonl), name, needs_answer=needs_answer, check=check)
    if spec.held_out is not None:
        kept = read_jsonl(Path(spec.held_out), name, needs_answer=needs_answer, check=check)
    else:
        items, kept = split_held_out(items)
    if not items:
        raise ConfigError(
            f"{key}: all {len(kept)} prompts of {spec.jsonl} fall into the held-out tenth;"
            " add lines, or name another file in held_out"
        )
    return JsonlSource(items, training_seed), JsonlSource(kept, held_out_seed) if kept else None

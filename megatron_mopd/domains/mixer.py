"""Draws the prompts of a step from all domains, in exact shares, alike on every rank and after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from megatron_mopd.config import RunConfig, Split
from megatron_mopd.domains.dataset import Dataset
from megatron_mopd.domains.source import Item, unit_interval
from megatron_mopd.domains.splits import (
    PATIENCE,
    PromptSet,
    Splits,
    find_splits,
    open_sources,
    question_hash,
    render_prompt,
    render_questions,
)
from megatron_mopd.domains.stored_feed import StoredFeed
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import Prompt
from megatron_mopd.yaml_config import ConfigError


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

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, dataset: Dataset | None = None):
        """dataset: where the prompts to train on come from instead of the domains' sources."""
        self._shares = config.domain_shares
        self._config, self._tokenizer = config, tokenizer
        self._feeds = {name: _Feed(name, config, tokenizer) for name in config.domains}
        self._dataset = dataset
        self._stored = {name: StoredFeed(name, config, dataset) for name in config.domains} if dataset else {}
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
            prompts.append(self._next(chosen, self._states[chosen]))
        return prompts

    def _next(self, domain: str, state: DomainState) -> Prompt:
        if domain in self._stored:
            return self._stored[domain].next(state, self.reserved)
        return self._feeds[domain].next(state, self.reserved)

    def held_out(self, domain: str) -> list[Prompt]:
        """The domain's evaluation prompts: distinct, never trained on, the same whatever the run's seed.

        `evaluation.prompts` of them, fewer where the source has no more.
        """
        return list(self.split(domain, "held_out").prompts)

    def split(self, domain: str, split: Split) -> PromptSet:
        """The prompts of one split of a domain. Raises ConfigError when there is none."""
        if split == "validation" and not self._config.evaluation.validation_prompts:
            raise ConfigError(
                "evaluation.validation_prompts: is 0, so that training may have seen any other prompt;"
                " set it in the file of the run and train with it"
            )
        found = render_questions(
            self._splits.domains[domain][split],
            self._config.domains[domain],
            domain=domain,
            prefix=f"{domain}/{split}",
            tokenizer=self._tokenizer,
        )
        if not found.prompts:
            raise ConfigError(
                f"domains.{domain}.source: no {split.replace('_', '-')} prompt within max_prompt_tokens;"
                f" give a {split} file or more lines"
            )
        return found

    def questions(self, domain: str, split: Split) -> tuple[tuple[int, Item], ...]:
        """(index in its source, item) of the prompts of `split`, and of those that are too long for one."""
        return self._splits.domains[domain][split].items

    def benchmark(self, group: str, name: str) -> PromptSet:
        """The prompts of `evaluation.<group>.<name>`, group being 'benchmarks' or 'out_of_domain'."""
        found = render_questions(
            self._splits.benchmarks[group][name],
            getattr(self._config.evaluation, group)[name],
            domain=name,
            prefix=f"{group}.{name}",
            tokenizer=self._tokenizer,
        )
        if not found.prompts:
            raise ConfigError(f"evaluation.{group}.{name}: no prompt within max_prompt_tokens; raise it")
        return found

    def check(self) -> None:
        """Raise ConfigError for a domain that has no usable prompt to train on, and for a split without any."""
        for name in self._feeds:
            self._next(name, DomainState())
        self.check_splits()

    def check_splits(self) -> None:
        """Raise ConfigError for a domain or a benchmark without a prompt to evaluate with."""
        evaluation = self._config.evaluation
        for name in self._feeds:
            self.split(name, "held_out")
            if evaluation.validation_prompts:
                self.split(name, "validation")
        for group, tasks in self._splits.benchmarks.items():
            for name in tasks:
                self.benchmark(group, name)

    def counts(self) -> dict[str, dict[str, int]]:
        """Since the run began, by domain: prompts drawn, and candidates left out and why."""
        names = ("drawn", "too_long", "held_out_skipped")
        counts = {domain: {name: getattr(state, name) for name in names} for domain, state in self._states.items()}
        if self._dataset is not None:
            for domain, count in counts.items():  # in the file: before the run began
                count["wrong_left_out"] = self._dataset.cost.left_out.get(domain, 0)
        return counts

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

    @cached_property
    def _splits(self) -> Splits:
        sources = {name: feed.sources for name, feed in self._feeds.items()}
        return find_splits(self._config, sources, self._tokenizer)

    @cached_property
    def reserved(self) -> frozenset[str]:
        """`Prompt.question` of all that is evaluated on, in any domain or benchmark: never drawn."""
        return self._splits.hashes


class _Feed:
    """One domain's training stream, without the questions that are kept out of it."""

    def __init__(self, name: str, config: RunConfig, tokenizer: Tokenizer):
        self._name, self._spec, self._tokenizer = name, config.domains[name], tokenizer
        self._seed, self._sft = config.seed, config.reads_answers
        self._wrong_share = self._spec.wrong_answers if self._sft else 0.0
        self.sources = open_sources(name, config)
        self._training = self.sources.training

    def next(self, state: DomainState, reserved: frozenset[str]) -> Prompt:
        """The next usable prompt; moves `state` past it and past those that were left out."""
        for _ in range(PATIENCE):
            index = state.cursor
            state.cursor += 1
            item = self._training.item(index)
            question = question_hash(item, self._tokenizer)
            if question in reserved:
                state.held_out_skipped += 1
                continue
            prompt = render_prompt(
                item,
                self._spec,
                domain=self._name,
                identity=f"{self._name}/{index}",
                answer=self._answer(item, index),
                question=question,
                tokenizer=self._tokenizer,
            )
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

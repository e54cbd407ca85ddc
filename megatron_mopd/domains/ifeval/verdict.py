"""Strict and loose verdicts on a response, and IFEval's four accuracies over many (arXiv 2311.07911, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mopd.domains.ifeval.instructions import Instruction


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """For each instruction of a prompt, in order, whether it was followed."""

    strict: tuple[bool, ...]
    """By the response as it is."""
    loose: tuple[bool, ...]
    """By it or one of its variants: without *, without the first line, the last line, or both."""

    @property
    def reward(self) -> float:
        """Share of the instructions that were followed strictly; 1 exactly when all were."""
        return sum(self.strict) / len(self.strict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares in [0, 1]: of prompts with all instructions followed, and of instructions followed."""

    prompt_strict: float
    prompt_loose: float
    instruction_strict: float
    instruction_loose: float


def judge(response: str, instructions: Sequence[Instruction]) -> Verdict:
    """Judge the whole response: cut off any reasoning before."""
    variants = _variants(response)
    return Verdict(
        strict=tuple(instruction.followed_by(response) for instruction in instructions),
        loose=tuple(any(map(instruction.followed_by, variants)) for instruction in instructions),
    )


def accuracy(verdicts: Sequence[Verdict]) -> Accuracy:
    """Over at least one verdict (ValueError)."""
    if not verdicts:
        raise ValueError("accuracy needs at least one verdict")
    strict = [flag for verdict in verdicts for flag in verdict.strict]
    loose = [flag for verdict in verdicts for flag in verdict.loose]
    return Accuracy(
        prompt_strict=_mean([all(verdict.strict) for verdict in verdicts]),
        prompt_loose=_mean([all(verdict.loose) for verdict in verdicts]),
        instruction_strict=_mean(strict),
        instruction_loose=_mean(loose),
    )


def _mean(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def _variants(response: str) -> list[str]:
    """The response and its seven variants: (all, no first line, no last line, neither) x (as is, without *)."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [text.replace("*", "") for text in cut]

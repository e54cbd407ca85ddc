"""What nodes cost before they are run, and whether every method has the budget that it says."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megatron_mopd.reproduce.config import BASE, TEACHERS, MethodSpec
from megatron_mopd.reproduce.graph import Node, with_inputs
from megatron_mopd.yaml_config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Known from the files alone: upper bounds, as an answer may be short, and prompts too."""

    steps: int = 0
    rollouts: int = 0
    """Answers that a model samples; the reference answers of an SFT and those of a dataset are not."""
    most_tokens: int = 0
    """Prompt and response tokens of all steps, if every one were as long as it may be."""


def node_cost(node: Node) -> Cost:
    """Of a run or a sample; a merge and an evaluation count as nothing."""
    if node.kind not in ("run", "sample"):
        return Cost()
    tree = node.tree
    answers = tree["steps"] * tree["prompts_per_step"] * tree["rollout"]["samples_per_prompt"]
    weights = {name: domain["weight"] for name, domain in tree["domains"].items()}
    lengths = {
        name: domain["max_prompt_tokens"] + domain["max_response_tokens"] for name, domain in tree["domains"].items()
    }
    mean_length = sum(weights[name] * lengths[name] for name in weights) / sum(weights.values())
    reads = tree["stage"] == "sft" or tree["rollout"]["engine"] == "dataset"
    return Cost(
        steps=tree["steps"],
        rollouts=0 if reads else answers,
        most_tokens=math.ceil(answers * mean_length),
    )


def own_nodes(nodes: Mapping[str, Node], method: str, seed: int) -> set[str]:
    """Everything that a method needs besides the base and the teachers; what it shares with other methods too."""
    prefix = f"seed{seed}/"
    shared = {name for name in nodes if name == f"{prefix}{BASE}" or name.startswith(f"{prefix}{TEACHERS}.")}
    return with_inputs(nodes, [f"{prefix}{method}"]) - shared


def check_budget(
    nodes: Mapping[str, Node], methods: Mapping[str, MethodSpec], rollouts: Mapping[str, int], seed: int
) -> None:
    """Raise ConfigError for a method that generates more or fewer rollouts than `rollouts` (method -> number) says."""
    for method in methods:
        found = total_rollouts(nodes, own_nodes(nodes, method, seed))
        if found != rollouts[method]:
            raise ConfigError(
                f"methods.{method}: its files generate {found:,} rollouts, the budget is {rollouts[method]:,}; change "
                f"steps or prompts_per_step, or say methods.{method}.rollouts: {found}"
            )


def total_rollouts(nodes: Mapping[str, Node], names: Collection[str]) -> int:
    return sum(node_cost(nodes[name]).rollouts for name in names)


def drawing_more(nodes: Mapping[str, Node], methods: Collection[str], seed: int) -> list[str]:
    """Methods with `objective.dynamic_sampling` in one of their runs: what they generate is known afterwards only."""
    return [
        method
        for method in methods
        if any(nodes[name].tree.get("objective", {}).get("dynamic_sampling") for name in own_nodes(nodes, method, seed))
    ]


def budget_line(rollouts: Mapping[str, int], budget: int, more: Collection[str] = ()) -> str:
    """What `check_budget` has found to hold, in words. more: see `drawing_more`."""
    same = [name for name, count in rollouts.items() if count == budget]
    others = [f"{name} {count:,}" for name, count in rollouts.items() if count not in (0, budget)]
    none = [name for name, count in rollouts.items() if count == 0]
    parts = [f"{budget:,} rollouts each: {', '.join(same) or 'no method'}"]
    parts += [f"otherwise: {', '.join(others)}"] if others else []
    parts += [f"none: {', '.join(none)}"] if none else []
    parts += [f"at least, as dynamic sampling draws more: {', '.join(more)}"] if more else []
    return f"budget, checked: {'; '.join(parts)}"

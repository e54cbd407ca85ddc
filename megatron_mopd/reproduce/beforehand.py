"""Before the first node is made: every run's layout, lengths and data, so that no mistake waits behind an hour of work.

Imports torch, as making nodes does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from megatron_mopd.config import RunConfig
from megatron_mopd.environment import world_size
from megatron_mopd.hub import resolve_folder
from megatron_mopd.reproduce.graph import Node
from megatron_mopd.yaml_config import ConfigError, build

WHAT_IS_CHECKED = ("stage", "domains", "evaluation", "parallel", "rollout")
"""Two runs that agree in these are checked once; the seed changes which prompts come, not whether they fit."""


def check_all(nodes: Mapping[str, Node], wanted: Sequence[str]) -> None:
    """Raise ConfigError, naming the node, for what `mopd run` or `mopd sample` would refuse when its turn comes."""
    from megatron_mopd.preflight import check_beforehand

    seen = set()
    for name in wanted:
        node = nodes[name]
        if node.kind not in ("run", "sample"):
            continue
        looked_at = json.dumps({key: node.tree[key] for key in WHAT_IS_CHECKED}, sort_keys=True)
        if looked_at in seen:
            continue
        seen.add(looked_at)
        config = build(RunConfig, node.tree)
        try:
            model = resolve_folder(_model_source(nodes, node), "model.hf_config")
            check_beforehand(config, model, world_size(config.parallel))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


def _model_source(nodes: Mapping[str, Node], node: Node) -> str:
    """Where config.json and the tokenizer come from: from the run at the start of this one's chain of checkpoints."""
    while "model.checkpoint" in node.inputs:
        if node.tree["model"]["hf_config"]:
            break
        before = nodes[node.inputs["model.checkpoint"]]
        if before.kind == "merge":
            before = nodes[before.inputs["base"]]
        node = before
    model = node.tree["model"]
    return str(model["hf_config"] or model["checkpoint"])

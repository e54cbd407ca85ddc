"""What `transformers` says, in float32 from the same folder: the reference for both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_mopd.audit.views import View, padded
from megatron_mopd.types import Rollout


@torch.no_grad()
def reference_view(folder: Path, rollouts: Sequence[Rollout], device: torch.device) -> View:
    """Log-probs, routing and hidden states, one sequence at a time. Needs the whole model's memory on one rank."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device)
    model.eval()
    states: list[torch.Tensor] = []
    routed: list[torch.Tensor] = []
    hooks = [model.model.norm.register_forward_hook(_keep(states, None))]
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(_keep(states, None)))
        if hasattr(layer.mlp, "gate"):
            hooks.append(layer.mlp.gate.register_forward_hook(_keep(routed, 2)))
    logprobs, experts, hidden = [], [], []
    for rollout in rollouts:
        states.clear()
        routed.clear()
        ids = torch.from_numpy(rollout.token_ids).to(device)
        logits = model(ids[None], use_cache=False).logits[0].float()
        picked = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        logprobs.append(padded(picked.cpu().numpy(), len(ids)))
        hidden.append(torch.stack([s.reshape(len(ids), -1) for s in states], 1).float().cpu().numpy())
        if routed:
            experts.append(torch.stack(routed, 1).cpu().numpy().astype(np.int16))
    for hook in hooks:
        hook.remove()
    return View(logprobs=logprobs, experts=experts or None, hidden=hidden)


def _keep(into: list[torch.Tensor], index: int | None) -> Callable[..., None]:
    """A hook that collects the output of a module, or one of its outputs."""

    def hook(module: Any, arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) and index is None else output
        into.append(states if index is None else states[index])

    return hook

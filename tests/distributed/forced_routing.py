"""transformers' Qwen3-MoE with experts that are forced upon it: the reference of routing replay."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mopd.types import ExpertArray, Rollout


class ForcedModel:
    """Weights of the experts are the softmax of its own routers' logits, renormalised where the model does it."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        self.gates = [layer.mlp.gate for layer in self.model.model.layers]
        self.own: list[Tensor] = []
        """[T, k] of each layer of the last pass: what its router would have chosen."""
        self._forced: ExpertArray | None = None
        for index, gate in enumerate(self.gates):
            gate.forward = partial(self._route, index, gate)

    def logits(self, rollout: Rollout, experts: ExpertArray | None) -> Tensor:
        """[R, V] of the trained tokens; `experts` [T, layers, k], -1 where the router chooses."""
        self.own, self._forced = [], experts
        out = self.model(torch.from_numpy(rollout.token_ids)[None]).logits[0]
        return out[:-1][torch.from_numpy(rollout.loss_mask[1:])]

    @torch.no_grad()
    def own_experts(self, rollout: Rollout) -> ExpertArray:
        """[T, layers, k] what its routers choose."""
        self.logits(rollout, None)
        return torch.stack(self.own, dim=1).numpy().astype(np.int16)

    def _route(self, index: int, gate: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        probs = torch.softmax(logits, dim=-1, dtype=torch.float)
        chosen = own = probs.topk(gate.top_k, dim=-1).indices
        self.own.append(own)
        if self._forced is not None:
            forced = torch.from_numpy(self._forced[:, index]).long()
            chosen = torch.where(forced < 0, own, forced)
        values = probs.gather(1, chosen)
        if gate.norm_topk_prob:
            values = values / values.sum(dim=-1, keepdim=True)
        return logits, values, chosen

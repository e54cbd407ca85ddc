"""What the layers of a Megatron model do in a forward pass: their routing and their hidden states."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_mopd.parallel.runtime import World


@contextmanager
def watched(model: GPTModel, world: World, hidden: bool) -> Iterator[dict[tuple[str, int], list[np.ndarray]]]:
    """Collects what the layers of this stage do: 'experts' [S, k], 'margin' [S] and, if asked for, 'hidden' [S, H]."""
    seen: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)

    def keep(what: str, layer: int, values: Tensor) -> None:
        if world.tensor.size > 1:
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        seen[what, layer].append(values.cpu().numpy())

    def of_router(layer: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            chosen = output[1].to(torch.uint8)
            # Its probabilities are those of the chosen experts alone, and it keeps no logits.
            scores = module.gating(arguments[0]).view(len(chosen), -1).float().softmax(-1)
            taken = chosen.bool()
            lowest, highest = scores.masked_fill(~taken, 2.0).amin(-1), scores.masked_fill(taken, -1.0).amax(-1)
            # As floats, which gloo gathers; it takes no int16.
            keep("experts", layer, chosen.argsort(dim=-1, descending=True, stable=True)[:, : module.topk].float())
            keep("margin", layer, lowest - highest)

        return hook

    def of_states(layer: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            keep("hidden", layer, states.squeeze(1).float())

        return hook

    hooks = []
    for module in model.decoder.layers:
        layer = module.layer_number - 1
        if hasattr(module.mlp, "router"):
            hooks.append(module.mlp.router.register_forward_hook(of_router(layer)))
        if hidden:
            hooks.append(module.register_forward_hook(of_states(layer)))
    if hidden and model.decoder.final_layernorm is not None:
        hooks.append(model.decoder.final_layernorm.register_forward_hook(of_states(model.config.num_layers)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()

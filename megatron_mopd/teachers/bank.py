"""N frozen teachers, one slot: the weights are swapped into a Megatron model from host memory or a disk, one by one.

Identical shards are stored once. Every rank visits the same teachers in the same order, also when none of its own
rollouts goes to one of them (it then sends an empty micro-batch through): with expert or pipeline parallelism a
per-rank order would wait for ever.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
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
from megatron_mopd.teachers.copies import CopyReport, CopyThread
from megatron_mopd.teachers.slot import Place, Slot
from megatron_mopd.teachers.store import ShardStore, digest
from megatron_mopd.types import MicroBatch, TeacherScores
from megatron_mopd.yaml_config import ConfigError


@dataclass(frozen=True, slots=True)
class _Teacher:
    arch: Architecture
    shards: Mapping[str, str]
    """Megatron parameter name -> digest of this rank's shard, the key into the store."""


@dataclass(slots=True)
class _Swaps:
    """What was copied since it was last asked for, on this rank."""

    count: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of the above in which scoring stood still."""


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
        self._slots: dict[Architecture, Slot] = {}
        self._store = ShardStore(config.teacher_memory, world.rank, pin=world.device.type == "cuda")
        self._copies = CopyThread(world.device)
        self._pending: dict[tuple[Architecture, int], Future[CopyReport]] = {}
        self._swaps = _Swaps()
        self._teachers: dict[str, _Teacher] = {}
        for name, (arch, folder) in sources.items():
            slot = self._slot(arch)
            slot.open()
            load_hf(slot.model, arch, folder, world)
            self._teachers[name] = _Teacher(arch, self._keep(name, slot))
        for arch, slot in self._slots.items():
            of_slot = [teacher for teacher in self._teachers.values() if teacher.arch == arch]
            slot.release(set.intersection(*(set(self._in_place(teacher)) for teacher in of_slot)))

    @property
    def names(self) -> tuple[str, ...]:
        """The order in which every rank visits the teachers."""
        return tuple(self._teachers)

    @property
    def host_bytes(self) -> int:
        """Bytes of the distinct shards that this rank stores in memory."""
        return self._store.host_bytes

    def take_metrics(self) -> dict[str, float]:
        """Copies of this rank since the last call; {} where teachers are used where they lie (host memory, CPU)."""
        swaps, self._swaps = self._swaps, _Swaps()
        if not swaps.count:
            return {}
        return {
            "teacher_swap/count": swaps.count,
            "teacher_swap/bytes": swaps.num_bytes,
            "teacher_swap/seconds": swaps.seconds,
            "teacher_swap/waited_seconds": swaps.waited,
        }

    def score(self, batches: Sequence[MicroBatch]) -> list[TeacherScores]:
        """One entry per micro-batch, in order. Collective; one swap per teacher that any rank has work for."""
        scores: list[TeacherScores] = [TeacherScores()] * len(batches)
        routed = {batch.teacher for batch in batches}
        visits = [name for name in self._teachers if name in routed]
        for turn, name in enumerate(visits):
            model = self.swap_in(name)
            # After the last one comes the first one of the next step, while the student is updated.
            self._copy_ahead(visits[(turn + 1) % len(visits)])
            own = [index for index, batch in enumerate(batches) if batch.teacher == name]
            vocab_size = self._teachers[name].arch.vocab_size
            results = score(model, [batches[i] for i in own], vocab_size, self._world, self._config.objective)
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
            tied = slot.model.share_embeddings_and_output_weights and slot.model.pre_process
            key = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
            shard = self._store[teacher.shards[key]]
            weight = shard.tensor.to(self._world.device, non_blocking=True, copy=shard.file is not None)
            shard.forget(0, len(shard.tensor))
            heads[name] = weight.view(slot.parameters[key].shape)
        return heads

    def equals(self, name: str, model: GPTModel) -> bool:
        """Whether the teacher's weights are those of `model`, bit for bit, on every rank. Collective."""
        shards = self._teachers[name].shards
        own = dict(model.named_parameters())
        differ = own.keys() != shards.keys() or any(digest(own[key]) != shards[key] for key in shards)
        return not self._world.any(differ)

    def swap_in(self, name: str) -> GPTModel:
        """The slot's model with this teacher's weights in it. Waits for the copy, if one is needed."""
        teacher = self._teachers[name]
        slot = self._slots[teacher.arch]
        place = slot.buffers.place(name)
        if place.fill:
            self._start(name, slot, place)
        self._finish(teacher.arch, place.buffer)
        slot.buffers.active = place.buffer
        slot.activate(place.buffer, self._in_place(teacher))
        return slot.model

    def _copy_ahead(self, name: str) -> None:
        """Begin with the teacher whose turn is next, where there is a buffer for it that is not being read."""
        slot = self._slots[self._teachers[name].arch]
        place = slot.buffers.place_ahead(name)
        if place is not None:
            self._start(name, slot, place)

    def _start(self, name: str, slot: Slot, place: Place) -> None:
        teacher = self._teachers[name]
        self._finish(teacher.arch, place.buffer)
        slot.buffers.holds[place.buffer] = name
        in_place = self._in_place(teacher)
        copies = [
            (self._store[key], slot.target(place.buffer, parameter))
            for parameter, key in teacher.shards.items()
            if parameter not in in_place
        ]
        if copies:
            self._pending[teacher.arch, place.buffer] = self._copies.start(copies)

    def _finish(self, arch: Architecture, buffer: int) -> None:
        """Wait for the copy into a buffer, if one is under way; raises what went wrong in it."""
        pending = self._pending.pop((arch, buffer), None)
        if pending is None:
            return
        started = time.perf_counter()
        report = pending.result()
        self._swaps.waited += time.perf_counter() - started
        self._swaps.count += 1
        self._swaps.num_bytes += report.num_bytes
        self._swaps.seconds += report.seconds

    def _in_place(self, teacher: _Teacher) -> dict[str, Tensor]:
        """The parameters that need no copy: on a CPU, host memory is the device's."""
        if self._world.device.type != "cpu":
            return {}
        parameters = self._slots[teacher.arch].parameters
        shards = {name: self._store[key] for name, key in teacher.shards.items()}
        return {name: s.tensor.view(parameters[name].shape) for name, s in shards.items() if s.file is None}

    def _slot(self, arch: Architecture) -> Slot:
        if arch not in self._slots:
            model = build_model(arch, self._config.parallel, self._world, self._dtype, training=False)
            self._slots[arch] = Slot.of(model, self._config.teacher_memory.buffers)
        return self._slots[arch]

    def _keep(self, name: str, slot: Slot) -> dict[str, str]:
        """Store the loaded weights. Collective: a rank without room is a ConfigError on all of them."""
        shards, error = dict[str, str](), None
        try:
            shards = self._store.keep(name, slot.parameters)
        except ConfigError as failure:
            error = str(failure)
        errors = [text for text in self._world.all_gather_objects(error) if text]
        if errors:
            raise ConfigError(errors[0])
        return shards

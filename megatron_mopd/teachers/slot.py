"""A Megatron model that teachers of one architecture share, and which of them is in which of its buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """A buffer for a teacher, and whether its weights have to be copied into it."""

    buffer: int
    fill: bool


@dataclass(slots=True)
class Buffers:
    """The decisions alone: what is in which buffer, and where the next teacher goes."""

    holds: list[str | None]
    active: int | None = None
    """The buffer of the teacher that scores, or scored last."""

    def place(self, teacher: str) -> Place:
        """Where `teacher` is, or goes now: an unused buffer, else the one after the last active one."""
        if teacher in self.holds:
            return Place(self.holds.index(teacher), fill=False)
        unused = [index for index, name in enumerate(self.holds) if name is None]
        after = 0 if self.active is None else (self.active + 1) % len(self.holds)
        return Place(unused[0] if unused else after, fill=True)

    def place_ahead(self, teacher: str) -> Place | None:
        """Where `teacher` can be copied to while the active one scores; None: nowhere, or it is there already."""
        place = self.place(teacher)
        return place if place.fill and place.buffer != self.active else None


@dataclass(slots=True)
class Slot:
    """A frozen model whose parameters point into one of its buffers, or, on a CPU, straight into host memory."""

    model: GPTModel
    buffers: Buffers
    parameters: dict[str, torch.nn.Parameter]
    weights: list[Weights]
    """[buffer] parameter name -> device memory; only of the parameters that are copied."""

    @classmethod
    def of(cls, model: GPTModel, buffers: int) -> Slot:
        parameters = dict(model.named_parameters())
        own = {name: parameter.data for name, parameter in parameters.items()}
        return cls(model, Buffers([None] * buffers), parameters, [own, *({} for _ in range(buffers - 1))])

    def open(self) -> None:
        """Let the parameters be loaded: into the memory of the first buffer, whatever it held."""
        self.buffers.holds[0], self.buffers.active = None, None
        self.activate(0, {})

    def target(self, buffer: int, name: str) -> Tensor:
        """Where a parameter's copy goes; made when it is first asked for."""
        own = self.weights[buffer]
        if name not in own:
            own[name] = torch.empty_like(self.parameters[name].data)
        return own[name]

    def activate(self, buffer: int, in_place: Weights) -> None:
        """Point the parameters at `in_place` where it has them, else at the buffer."""
        for name, parameter in self.parameters.items():
            parameter.data = in_place[name] if name in in_place else self.target(buffer, name)

    def release(self, never_copied: set[str]) -> None:
        """Forget the memory of parameters that every teacher has in host memory that is also the device's."""
        for own in self.weights:
            for name in never_copied & own.keys():
                del own[name]

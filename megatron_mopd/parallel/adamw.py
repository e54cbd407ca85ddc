"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) in two forms, for Megatron's distributed optimizer to step with.

Both keep their step count in the param group, as the fused GPU optimizers do. Megatron's distributed-optimizer
checkpoints hold per parameter only what has the parameter's shape. torch's own AdamW keeps a scalar `step` per
parameter, which such a checkpoint loses and loading then misses (KeyError: 'step').
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.host_memory import host_arena

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 24
"""Elements whose moments are on the device at a time; twice, one piece being copied while the other is used."""


def adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    group: Mapping[str, Any],
) -> None:
    """Update `group["step"]`, counted from 1, of parameters and moments in place: a handful of foreach calls."""
    (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    denominator = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_addcdiv_(parameters, means, denominator, -lr / (1 - beta1**step))


class AdamW(torch.optim.Optimizer):
    """For the CPU, where it stands in for the fused one of Transformer Engine or apex."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **unused: Any,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if not self.state[p]:
                for moment in MOMENTS:
                    self.state[p][moment] = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        means, squares = ([self.state[p][moment] for p in parameters] for moment in MOMENTS)
        adamw_(parameters, gradients, means, squares, group)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Up to `PIECE` elements of one parameter, flat."""

    parameter: Tensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor]
    """In host memory."""
    group: Mapping[str, Any]


class OffloadedAdamW(AdamW):
    """The same numbers, with both moments in (pinned) host memory: 8 bytes a parameter less on the device.

    An update copies them there and back piece by piece, on a stream of its own, while the piece before is computed.
    The arithmetic stays on the device. Without CUDA the same code runs: `parallel/cpu.py` has streams and events that
    are always done.
    """

    def allocate(self) -> None:
        """Moments of zero for every parameter. Raises ConfigError where host memory cannot be pinned."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        count = sum(p.numel() for p in parameters)
        if not count:
            return
        pin = parameters[0].device.type == "cuda"
        arena = host_arena(4 * len(MOMENTS) * count, pin=pin, remedy="optim.offload: false").view(torch.float32)
        parts = iter(arena.split([p.numel() for p in parameters for _ in MOMENTS]))
        for p in parameters:
            self.state[p] = {moment: next(parts).view(p.shape) for moment in MOMENTS}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """As of `AdamW`."""
        if not self.state:
            self.allocate()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        pieces = list(self._pieces())
        if not pieces:
            return
        device = pieces[0].parameter.device
        buffers = torch.empty(2, len(MOMENTS), min(PIECE, max(p.parameter.numel() for p in pieces)), device=device)
        compute, copies = torch.cuda.current_stream(), torch.cuda.Stream()
        copies.wait_stream(compute)
        there = [torch.cuda.Event(), torch.cuda.Event()]

        def fetch(number: int) -> None:
            with torch.cuda.stream(copies):
                for target, source in zip(buffers[number % 2], pieces[number].moments, strict=True):
                    target[: len(source)].copy_(source, non_blocking=True)
                there[number % 2].record()

        fetch(0)
        for number, piece in enumerate(pieces):
            if number + 1 < len(pieces):
                fetch(number + 1)  # into the buffer whose last piece is queued to go back before it
            compute.wait_event(there[number % 2])
            mean, square = buffers[number % 2, :, : piece.parameter.numel()]
            adamw_([piece.parameter], [piece.gradient], [mean], [square], piece.group)
            copies.wait_stream(compute)
            with torch.cuda.stream(copies):
                for target, source in zip(piece.moments, (mean, square), strict=True):
                    target.copy_(source, non_blocking=True)
        copies.synchronize()  # whoever saves reads the host memory next

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's own would move the moments to the parameters' device."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in loaded.items() if key != "params"})
        if not state_dict["state"]:
            return
        if not self.state:
            self.allocate()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, moments in state_dict["state"].items():
            for name in MOMENTS:
                self.state[parameters[index]][name].copy_(moments[name])

    def _pieces(self) -> Iterator[_Piece]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                whole = (p.view(-1), p.grad.view(-1), *(self.state[p][moment].view(-1) for moment in MOMENTS))
                for parameter, gradient, mean, square in zip(*(t.split(PIECE) for t in whole), strict=True):
                    yield _Piece(parameter, gradient, (mean, square), group)

"""Logits of a block of tokens and rows and the gradients they send back, in the accumulation dtype.

Logits are never rounded to bf16: at a KL of 1e-3 that alone makes the reverse-KL gradient 96 % wrong.
bf16 operands are multiplied exactly and summed in fp32, on tensor cores where there are any.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.objective import FLOATS, accumulation_dtype
from kernels.shard import VocabShard

__all__ = ["LayerGradients", "OutputLayer", "accumulation_dtype", "check_layer"]


def check_layer(name: str, hidden: Tensor, weight: Tensor, shard: VocabShard) -> None:
    """ValueError unless hidden [T, H] and weight [rows, H] fit one another and the shard."""
    shapes = f"{name}hidden {tuple(hidden.shape)}, {name}weight {tuple(weight.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{shapes}: expected [T, H] and [rows, H]")
    if hidden.dtype != weight.dtype or hidden.dtype not in FLOATS:
        raise ValueError(f"{name}hidden is {hidden.dtype}, {name}weight {weight.dtype}: expected one floating dtype")
    if hidden.device != weight.device:
        raise ValueError(f"{name}hidden is on {hidden.device}, {name}weight on {weight.device}")
    shard.check_rows(weight.shape[0], shapes)


class OutputLayer:
    """The counted rows of one weight, and the hidden states it turns into logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.on_tensor_cores = hidden.is_cuda and hidden.dtype.itemsize == 2 and dtype == torch.float32
        self.hidden = hidden
        self.weight = weight[:rows]
        self._slab: tuple[slice, Tensor] | None = None

    def rows(self, slab: slice) -> Tensor:
        """[slab, H] of the weight as it is multiplied: in fp32 where there are no tensor cores, one slab at a time."""
        if self.on_tensor_cores or self.weight.dtype == self.dtype:
            return self.weight[slab]
        if self._slab is None or self._slab[0] != slab:
            self._slab = None  # first let go of the old one
            self._slab = (slab, self.weight[slab].to(self.dtype))
        return self._slab[1]

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, summed and returned in `dtype`."""
        if self.on_tensor_cores:
            return torch.mm(left.to(self.hidden.dtype), right, out_dtype=self.dtype)
        return torch.mm(left.to(self.dtype), right.to(self.dtype))

    def logits(self, slab: slice, chunk: slice) -> Tensor:
        """[C, rows of the slab], a fresh tensor that the caller may overwrite."""
        return self.multiply(self.hidden[chunk], self.rows(slab).t())


class LayerGradients:
    """dX = dz W and dW = dz^T X, collected block by block (slabs outside, chunks inside or the reverse).

    dX is summed in the accumulation dtype. dW of a slab is written once, in the weight's dtype, when the slab is
    done (`finish_slab`), or added to `main_grad`: no fp32 copy of the whole weight exists. Either can be off.
    """

    def __init__(
        self, layer: OutputLayer, full: Tensor, *, hidden: bool, weight: bool, main_grad: Tensor | None = None
    ) -> None:
        self.layer, self.want_hidden, self.want_weight, self.main_grad = layer, hidden, weight, main_grad
        self.hidden_sum: Tensor | None = None
        self.full = full
        self.weight_grad: Tensor | None = None
        self._slab_sum: Tensor | None = None

    def add(self, slab: slice, chunk: slice, dlogits: Tensor) -> None:
        """dlogits [C, rows of the slab], in the accumulation dtype or (on tensor cores) that of the hidden states."""
        layer = self.layer
        if self.want_hidden:
            part = layer.multiply(dlogits, layer.rows(slab))
            if self.hidden_sum is None and len(part) == len(layer.hidden):
                self.hidden_sum = part
            else:
                if self.hidden_sum is None:
                    self.hidden_sum = torch.zeros_like(layer.hidden, dtype=layer.dtype)
                self.hidden_sum[chunk] += part
        if self.want_weight:
            part = layer.multiply(dlogits.t(), layer.hidden[chunk])
            self._slab_sum = part if self._slab_sum is None else self._slab_sum.add_(part)

    def finish_slab(self, slab: slice) -> None:
        """No more of this slab's blocks will come."""
        part, self._slab_sum = self._slab_sum, None
        if part is None:
            return
        if self.main_grad is not None:
            self.main_grad[slab.start : slab.stop].add_(part)
        elif len(part) == len(self.layer.weight):
            self.weight_grad = pad(part, (0, 0, 0, len(self.full) - len(part))).to(self.full.dtype)
        else:
            if self.weight_grad is None:
                self.weight_grad = torch.zeros_like(self.full)
            self.weight_grad[slab.start : slab.stop] = part

    def take(self, other: LayerGradients, factor: Tensor) -> None:
        """The weight's part that `other` has summed over one slab of all rows and not finished, times `factor`."""
        if other._slab_sum is not None:
            self._slab_sum = other._slab_sum * factor
            self.finish_slab(slice(0, len(self._slab_sum)))

    def hidden_gradient(self) -> Tensor | None:
        """[T, H] in the dtype of the hidden states: this rank's share, to be summed over the vocab shards."""
        if not self.want_hidden:
            return None
        if self.hidden_sum is None:
            return torch.zeros_like(self.layer.hidden)
        return self.hidden_sum.to(self.layer.hidden.dtype)

    def weight_gradient(self) -> Tensor | None:
        """Shape and dtype of the local weight; complete, with zeros in the padded rows."""
        if not self.want_weight or self.main_grad is not None:
            return None
        return torch.zeros_like(self.full) if self.weight_grad is None else self.weight_grad

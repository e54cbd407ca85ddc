"""Logits of a block of tokens and rows and the gradients they send back, in the accumulation dtype.

Logits are never rounded to bf16: at a KL of 1e-3 that alone makes the reverse-KL gradient 96 % wrong.
bf16 operands are multiplied exactly and summed in fp32, on tensor cores where there are any.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import products_cpp
from kernels.objective import FLOATS, accumulation_dtype
from kernels.shard import VocabShard

__all__ = ["LayerGradients", "OutputLayer", "accumulation_dtype", "check_layer"]

WORTH_PACKING = 1 << 20
"""Weights from which bf16 products on a CPU are worth their packing: below, fp32 copies are small and as fast."""


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
    """The counted rows of one weight, and the hidden states it turns into logits.

    16-bit operands are multiplied as they are where that can give fp32 (`products`: tensor cores, or oneDNN's bf16
    kernel on a CPU); dlogits are then rounded to their dtype, which costs 0.2 % of the gradient at any divergence.
    Otherwise slabs of the weight are copied to fp32 and so are the dlogits.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.products = _products(hidden, weight, dtype)
        self.hidden = hidden
        self.weight = weight[:rows]
        self._slab: tuple[slice, Tensor] | None = None
        self._buffers: dict[torch.dtype, Tensor] = {}

    @property
    def dlogits_dtype(self) -> torch.dtype:
        return self.dtype if self.products == "copies" else self.hidden.dtype

    def room(self, logits: Tensor) -> Tensor:
        """Where dlogits of a block may be written that has these logits, which are not needed after it."""
        return logits if self.dlogits_dtype == logits.dtype else self._buffer(self.dlogits_dtype, *logits.shape)

    def logits(self, slab: slice, chunk: slice) -> Tensor:
        """[C, rows of the slab], which the caller may overwrite and the next call does."""
        hidden, rows = self.hidden[chunk], self.weight[slab]
        if self.products == "tensor_cores":
            return self._multiply(hidden, rows.t())
        out = self._buffer(self.dtype, len(hidden), len(rows))
        if self.products == "onednn":
            return products_cpp.nt(hidden, rows, out)
        return torch.mm(hidden.to(self.dtype), self._rows(slab).t(), out=out)

    def hidden_part(self, dlogits: Tensor, slab: slice, into: Tensor | None) -> Tensor:
        """dz W of a block [C, H], or added to `into`."""
        if self.products == "onednn":
            return products_cpp.nn(dlogits, self.weight[slab], into)
        part = self._multiply(dlogits, self._rows(slab))
        return part if into is None else into.add_(part)

    def weight_part(self, dlogits: Tensor, chunk: slice, into: Tensor | None) -> Tensor:
        """dz^T X of a block [rows of the slab, H], or added to `into`."""
        if self.products == "onednn":
            return products_cpp.tn(dlogits, self.hidden[chunk], into)
        part = self._multiply(dlogits.t(), self.hidden[chunk])
        return part if into is None else into.add_(part)

    def _buffer(self, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        """The same memory for every block: blocks of changing sizes would leave holes in the heap, and grow it."""
        size = rows * columns
        if dtype not in self._buffers or len(self._buffers[dtype]) < size:
            self._buffers[dtype] = torch.empty(size, dtype=dtype, device=self.hidden.device)
        return self._buffers[dtype][:size].view(rows, columns)

    def _rows(self, slab: slice) -> Tensor:
        """[slab, H] of the weight as it is multiplied: without 16-bit products in fp32, one slab at a time."""
        if self.products == "tensor_cores" or self.weight.dtype == self.dtype:
            return self.weight[slab]
        if self._slab is None or self._slab[0] != slab:
            self._slab = None  # first let go of the old one
            self._slab = (slab, self.weight[slab].to(self.dtype))
        return self._slab[1]

    def _multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right, summed and returned in `dtype`."""
        if self.products == "tensor_cores":
            return torch.mm(left, right, out_dtype=self.dtype)
        return torch.mm(left.to(self.dtype), right.to(self.dtype))


def _products(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Literal["tensor_cores", "onednn", "copies"]:
    if hidden.is_cuda and hidden.dtype.itemsize == 2 and dtype == torch.float32:
        return "tensor_cores"
    if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu" and weight.numel() >= WORTH_PACKING:
        return "onednn" if products_cpp.available() else "copies"
    return "copies"


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
        self.weight_factor: Tensor | None = None
        """[] that dW of a slab is multiplied by when it is done."""
        self.full = full
        self.weight_grad: Tensor | None = None
        self._slab_sum: Tensor | None = None

    def room(self, logits: Tensor) -> Tensor:
        return self.layer.room(logits)

    def add(self, slab: slice, chunk: slice, dlogits: Tensor) -> None:
        """dlogits [C, rows of the slab], best in the layer's `dlogits_dtype`."""
        layer = self.layer
        dlogits = dlogits.to(layer.dlogits_dtype)
        if self.want_hidden:
            if self.hidden_sum is None and len(dlogits) == len(layer.hidden):
                self.hidden_sum = layer.hidden_part(dlogits, slab, None)
            else:
                if self.hidden_sum is None:
                    self.hidden_sum = torch.zeros_like(layer.hidden, dtype=layer.dtype)
                layer.hidden_part(dlogits, slab, self.hidden_sum[chunk])
        if self.want_weight and self.main_grad is not None and self.weight_factor is None:
            layer.weight_part(dlogits, chunk, self.main_grad[slab])
        elif self.want_weight:
            self._slab_sum = layer.weight_part(dlogits, chunk, self._slab_sum)

    def finish_slab(self, slab: slice) -> None:
        """No more of this slab's blocks will come."""
        part, self._slab_sum = self._slab_sum, None
        if part is None:
            return
        if self.weight_factor is not None:
            part.mul_(self.weight_factor)
        if self.main_grad is not None:
            self.main_grad[slab].add_(part)
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

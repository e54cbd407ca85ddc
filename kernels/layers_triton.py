"""Blocks of `linear_divergence` on a GPU (sm_90), in Triton: sums and dlogits without a block of logits in memory.

`FusedBlocks` stands where `LayerBlocks` makes logits by cuBLAS and hands them to `rows_triton`. Six matrix products
as there; what is saved is the traffic and the memory of two fp32 logits. In the interpreter for fp32 and fp16 only:
its bf16 is a bit pattern that numpy would multiply as integers. Nothing here was timed on a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.layer_blocks import LayerBlocks, Teachers
from kernels.objective import Objective, active_runs, split
from kernels.output_layer import OutputLayer
from kernels.partials import combine
from kernels.rows_torch import EMPTY_SHARD_MAX
from kernels.triton_linear import linear_gradient_kernel, linear_sums_kernel

TILE = {"BM": 128, "BN": 128, "BK": 64}
"""Tokens, rows of the layers, and hidden units of a product: two fp32 accumulators just fit 8 warps' registers."""

SMALL_TILE = {"BM": 16, "BN": 32, "BK": 16}
"""The interpreter's."""

PARTS = 4
"""Pieces of a tile that the sums take at a time; with fewer some temporaries of `both` come close to spilling."""

WARPS, STAGES = 8, 4

PROGRAMS = 528
"""Fewer tiles of tokens than this (4 for each of 132 multiprocessors) share the vocabulary among several programs."""

BLOCK_TOKENS = 4096
BLOCK_ELEMENTS = 1 << 25
"""dlogits in a block: 64 MiB of bf16. Wide enough that adding a slab's share to dX costs less than its product."""


def fits(objective: Objective, teachers: Teachers, hidden: Tensor) -> bool:
    """Whether the kernels can do it: one teacher a row, no second pass, and dtypes for which products are exact."""
    if objective.kind == "jsd" or teachers.mixture:
        return False
    interpreted = triton.knobs.runtime.interpret
    usable = (torch.float32, torch.float16) if interpreted else (torch.bfloat16, torch.float16)
    return (hidden.device.type == "cpu") == interpreted and all(
        each.dtype in usable for each in (hidden, *teachers.hidden)
    )


def linear_sums(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float, *, both: bool
) -> Tensor:
    """[C, H], [rows, H], [C, HT], [rows, HT] -> [6 or 8, C] as `rows_torch.divergence_sums` of their logits.

    Float64 if the vocabulary was split among programs, else fp32.
    """
    layers = tuple(map(_dense, (hidden, weight, teacher_hidden, teacher_weight)))
    tokens, rows, tile = len(hidden), len(weight), _tile()
    if not (tokens and rows):
        sums = hidden.new_zeros((8 if both else 6, tokens), dtype=torch.float32)
        sums[0] = sums[2] = EMPTY_SHARD_MAX
        return sums
    token_tiles = triton.cdiv(tokens, tile["BM"])
    wanted = max(1, min(triton.cdiv(PROGRAMS, token_tiles), rows // tile["BN"]))
    width = triton.cdiv(triton.cdiv(rows, wanted), tile["BN"]) * tile["BN"]
    splits = triton.cdiv(rows, width)
    parts = hidden.new_empty((splits, 8 if both else 6, tokens), dtype=torch.float32)
    linear_sums_kernel[(token_tiles, splits)](
        *layers, parts, *(each.stride(0) for each in layers), tokens, rows, width, 1.0 / temperature,
        BOTH=both, H=hidden.shape[1], HT=teacher_hidden.shape[1], **tile, PARTS=PARTS, num_warps=WARPS,
        num_stages=STAGES,
    )  # fmt: skip
    return combine(parts)


def linear_gradient(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, temperature: float, rows: Tensor,
    dtype: torch.dtype, *, teacher: bool,
) -> Tensor:  # fmt: skip
    """dlogits [C, rows of the weight] in `dtype` as `rows_torch.divergence_gradient`; without `teacher` r2 is 0."""
    layers = tuple(map(_dense, (hidden, weight, teacher_hidden, teacher_weight)))
    tokens, columns, tile = len(hidden), len(weight), _tile()
    out = hidden.new_empty((tokens, columns), dtype=dtype)
    if tokens and columns:
        linear_gradient_kernel[(triton.cdiv(tokens, tile["BM"]), triton.cdiv(columns, tile["BN"]))](
            *layers, rows.contiguous(), out, *(each.stride(0) for each in layers), tokens, columns, 1.0 / temperature,
            TEACHER=teacher, H=hidden.shape[1], HT=teacher_hidden.shape[1], **tile, num_warps=WARPS,
            num_stages=STAGES,
        )  # fmt: skip
    return out


class FusedBlocks(LayerBlocks):
    """`LayerBlocks` whose sums and dlogits need no logits. Blocks are as large as 64 MiB of dlogits allow."""

    def __init__(
        self, student: OutputLayer, teachers: Teachers, chunk_tokens: int | None, weights: Tensor | None,
        objective: Objective,
    ) -> None:  # fmt: skip
        tokens, rows = len(student.hidden), len(student.weight)
        chunk = chunk_tokens or BLOCK_TOKENS
        step = TILE["BN"]
        slab = max(step, BLOCK_ELEMENTS // max(1, min(chunk, tokens)) // step * step)
        slabs = tuple(slice(start, min(start + slab, rows)) for start in range(0, max(rows, 1), slab))
        super().__init__(student, teachers, slabs, split(active_runs(weights, tokens), chunk), objective.temperature)
        self.both = objective.both

    def sums(self, slab: slice, chunk: slice) -> Tensor:
        return linear_sums(*self._block(slab, chunk), self.temperature, both=self.both)

    def dlogits(self, slab: slice, chunk: slice, rows: Tensor) -> Tensor:
        block, dtype = self._block(slab, chunk), self.layer.dlogits_dtype
        return linear_gradient(*block, self.temperature, rows, dtype, teacher=self.both)

    def _block(self, slab: slice, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head, part = self.owner(chunk)
        return self.layer.hidden[chunk], self.layer.weight[slab], head.hidden[part], head.weight[slab]


def _tile() -> dict[str, int]:
    return SMALL_TILE if triton.knobs.runtime.interpret else TILE


def _dense(layer: Tensor) -> Tensor:
    return layer if layer.stride(1) == 1 or layer.shape[1] <= 1 else layer.contiguous()

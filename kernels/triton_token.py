"""Triton: sums and gradient of the log-probability of given tokens, one vocabulary shard."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_lanes import LN2, NEG, below, exp, lane_max, lane_sum, load_masked, tile_columns


@triton.jit
def _recentre(Z, A, dm):
    a = exp(dm)
    return a * Z, a * (A + dm * Z)


@triton.jit
def _add_masked_columns(S, low, high, columns, m, Z, A, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns [low, high), bounds at multiples of a tile or at `columns`; logits may be -inf, or NaN, which stays."""
    tile = tile_columns(1, LANES, VEC)
    for i in range(low, high, LANES * VEC):
        z = load_masked(S, i + tile, i + tile < columns)
        m_new = tl.maximum(m, lane_max(z))
        Z, A = _recentre(Z, A, m - m_new)
        x = below(z, m_new[None, :, None])
        e = tl.exp2(x)
        Z += lane_sum(e)
        A += lane_sum(e * x) * LN2
        m = m_new
    return m, Z, A


@triton.jit
def token_sums_kernel(
    S, IDS, OWNED, OUT, stride, columns, rows, GROUPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):
    """Program (row): OUT [4, rows] = m, Z = sum e^x, A = sum e^x x, the logit of the token (0 if not owned).

    As `divergence_sums_kernel`: a row with -inf in it is read again by the loop that minds them.
    """
    row = tl.program_id(0).to(tl.int64)
    S += row * stride
    m = tl.full([LANES], NEG, tl.float32)
    Z = tl.zeros([LANES], tl.float32)
    A = tl.zeros([LANES], tl.float32)
    STEP: tl.constexpr = GROUPS * LANES * VEC
    tail = columns // STEP * STEP
    tile = tile_columns(GROUPS, LANES, VEC)
    for i in range(0, tail, STEP):
        z = tl.load(S + i + tile).to(tl.float32)
        m_new = tl.maximum(m, lane_max(z))
        Z, A = _recentre(Z, A, m - m_new)
        x = z - m_new[None, :, None]
        e = exp(x)
        Z += lane_sum(e)
        A += lane_sum(e * x)
        m = m_new
    finite = tl.sum(0.0 * A, 0) == 0.0
    m, Z, A = tl.where(finite, m, NEG), tl.where(finite, Z, 0.0), tl.where(finite, A, 0.0)
    m, Z, A = _add_masked_columns(S, 0, tl.where(finite, 0, tail), columns, m, Z, A, LANES, VEC)
    m, Z, A = _add_masked_columns(S, tail, columns, columns, m, Z, A, LANES, VEC)
    m_row = tl.max(m, 0)
    Z, A = _recentre(Z, A, m - m_row)
    owned = tl.load(OWNED + row) != 0
    chosen = tl.load(S + tl.load(IDS + row), mask=owned, other=0.0).to(tl.float32)
    OUT += row
    tl.store(OUT, m_row)
    tl.store(OUT + rows, tl.sum(Z, 0))
    tl.store(OUT + 2 * rows, tl.sum(A, 0))
    tl.store(OUT + 3 * rows, chosen)


@triton.jit
def token_gradient_kernel(
    S, IDS, OWNED, ROWS, OUT, stride, stride_out, columns, rows, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """Program (row, slab): OUT = r0 e^x + r1 1[j = id, owned], ROWS [3, rows] = m, r0, r1. OUT may be S."""
    row = tl.program_id(0).to(tl.int64)
    S += row * stride
    OUT += row * stride_out
    m = tl.load(ROWS + row)
    r0 = tl.load(ROWS + rows + row)
    r1 = tl.load(ROWS + 2 * rows + row)
    token = tl.where(tl.load(OWNED + row) != 0, tl.load(IDS + row), -1).to(tl.int32)
    for i in tl.static_range(BLOCKS):
        column = (tl.program_id(1) * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(S + column, mask=inside, other=0.0).to(tl.float32) - m
        gradient = r0 * exp(x) + tl.where(column == token, r1, 0.0)
        tl.store(OUT + column, gradient.to(OUT.dtype.element_ty), mask=inside)

"""Triton: sums and gradient of the divergences of one vocabulary shard.

Notation as in `partials`: x = z - m, y = t - n. One read of both logits for the sums, one read and one write for
the gradient, no collective. Summing F column by column keeps log1p(F/Z) accurate where student and
teacher nearly agree (KL relative error 2e-5 at 7e-5, against 1e-2 of log-sum-exps), and `excess` more so.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_lanes import (
    LN2,
    LOG2E,
    LOWEST,
    NEG,
    below,
    excess,
    exp,
    lane_max,
    lane_sum,
    load_masked,
    recentre,
    recentre_by,
    tile_columns,
)


@triton.jit
def _add_tile(m, n, Z, F, D, A, E, B, z, t, BOTH: tl.constexpr):
    """Finite logits only. D, A, E, B in bits, see `recentre_by`."""
    m_new = tl.maximum(m, lane_max(z))
    n_new = tl.maximum(n, lane_max(t))
    p, q = (m - m_new) * LOG2E, (n - n_new) * LOG2E
    Z, F, D, A, E, B = recentre_by(Z, F, D, A, E, B, p, q, p, q)
    x = (z - m_new[None, :, None]) * LOG2E
    y = (t - n_new[None, :, None]) * LOG2E
    e = tl.exp2(x)
    f = tl.exp2(y)
    Z += lane_sum(e)
    F += lane_sum(f - e)
    D += lane_sum(e * (x - y))
    A += lane_sum(e * x)
    if BOTH:
        E += lane_sum(f * (y - x))
        B += lane_sum(f * y)
    return m_new, n_new, Z, F, D, A, E, B


FAR = tl.constexpr(60.0)
"""Bits from a maximum up to its centre from which exponentials could vanish that count."""


@triton.jit
def _first_centre(P, tile):
    """Of a lane's first tile: its maximum in bits, on a grid of 2^-10 so that whole bits are added without rounding."""
    return tl.ceil(lane_max(tl.load(P + tile).to(tl.float32)) * (1024 * LOG2E)) * (1 / 1024)


@triton.jit
def _add_exact_tile(m, n, c, d, Z, F, D, A, E, B, z, t, BOTH: tl.constexpr):
    """As `_add_tile` about c and d bits, with F to 3e-5 of a divergence however small, in hardly more time.

    c and d begin at the maxima of the first tile, and when a maximum rises both do, by the same whole number of
    bits. So changes of centre are exact and cheap, and x and y take one fused multiply-add each; that pays for most
    of `excess`. A lane whose maxima have moved far apart meanwhile is summed again by the masked loop.
    """
    m = tl.maximum(m, lane_max(z))
    n = tl.maximum(n, lane_max(t))
    rise = tl.maximum(tl.fma(m, LOG2E, -c), tl.fma(n, LOG2E, -d))
    rise = tl.ceil(tl.maximum(rise, 0.0))
    c += rise
    d += rise
    a = tl.exp2(-rise)
    if BOTH:
        B = a * (B - rise * (Z + F))
        E = a * E
    A = a * (A - rise * Z)
    Z, F, D = a * Z, a * F, a * D
    x = tl.fma(z, LOG2E, -c[None, :, None])
    y = tl.fma(t, LOG2E, -d[None, :, None])
    e = tl.exp2(x)
    f = tl.exp2(y)
    u = y - x
    Z += lane_sum(e)
    F += lane_sum(excess(e, f, u))
    D -= lane_sum(e * u)
    A += lane_sum(e * x)
    if BOTH:
        E += lane_sum(f * u)
        B += lane_sum(f * y)
    return m, n, c, d, Z, F, D, A, E, B


@triton.jit
def _add_masked_columns(
    S, T, low, high, columns, m, n, Z, F, D, A, E, B, BOTH: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr
):
    """Columns [low, high), bounds at multiples of a tile or at `columns`; logits may be -inf, or NaN, which stays."""
    tile = tile_columns(1, LANES, VEC)
    for i in range(low, high, LANES * VEC):
        # Only the divisibility of `columns` is known to the compiler: it makes the masked loads 16 bytes wide.
        z = load_masked(S, i + tile, i + tile < columns)
        t = load_masked(T, i + tile, i + tile < columns)
        m_new = tl.maximum(m, lane_max(z))
        n_new = tl.maximum(n, lane_max(t))
        Z, F, D, A, E, B = recentre(Z, F, D, A, E, B, m, n, m_new, n_new)
        x = below(z, m_new[None, :, None])
        y = below(t, n_new[None, :, None])
        e = tl.exp2(x)
        f = tl.exp2(y)
        u = y - x
        Z += lane_sum(e)
        F += lane_sum(excess(e, f, u))
        D -= lane_sum(e * u)
        A += lane_sum(e * x)
        if BOTH:
            E += lane_sum(f * u)
            B += lane_sum(f * y)
        m, n = m_new, n_new
    return m, n, Z, F, D, A, E, B


@triton.jit
def _store_sums(OUT, stride, m, Z, n, F, D, A, E, B, inside, BOTH: tl.constexpr):
    tl.store(OUT, m, mask=inside)
    tl.store(OUT + stride, Z, mask=inside)
    tl.store(OUT + 2 * stride, n, mask=inside)
    tl.store(OUT + 3 * stride, F, mask=inside)
    tl.store(OUT + 4 * stride, D, mask=inside)
    tl.store(OUT + 5 * stride, A, mask=inside)
    if BOTH:
        tl.store(OUT + 6 * stride, E, mask=inside)
        tl.store(OUT + 7 * stride, B, mask=inside)


@triton.jit
def divergence_sums_kernel(
    S, T, OUT, stride_s, stride_t, columns, width, rows,
    BOTH: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Program (row, split): columns [split * width, (split + 1) * width) of a row -> OUT [splits, 6 or 8, rows].

    `width` is a multiple of LANES * VEC, or there is one split.

    The loop assumes finite logits. Where there was a -inf or a NaN the sums are not finite, and the row is read again
    by the masked loop, which minds them: masked logits are rare, and minding them always costs two instructions per
    column. So a finite logit more than 1e4 below its maximum counts as it is in the loop, as 1e4 below behind it.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    S += row * stride_s
    T += row * stride_t
    start = split * width
    stop = tl.minimum(start + width, columns)
    m = tl.full([LANES], NEG, tl.float32)
    n = tl.full([LANES], NEG, tl.float32)
    Z = tl.zeros([LANES], tl.float32)
    F, D, A, E, B = Z, Z, Z, Z, Z
    STEP: tl.constexpr = GROUPS * LANES * VEC
    tail = start + (stop - start) // STEP * STEP
    tile = tile_columns(GROUPS, LANES, VEC)
    # bf16 logits are a coarser rounding than that of F, and take three instructions a column to unpack.
    if S.dtype.element_ty == tl.float32:
        c, d = m, n
        if tail > start:
            c, d = _first_centre(S, start + tile), _first_centre(T, start + tile)
        for i in range(start, tail, STEP):
            z = tl.load(S + i + tile)
            t = tl.load(T + i + tile).to(tl.float32)
            m, n, c, d, Z, F, D, A, E, B = _add_exact_tile(m, n, c, d, Z, F, D, A, E, B, z, t, BOTH)
        if tail > start:
            p, q = tl.fma(m, 0.0 - LOG2E, c), tl.fma(n, 0.0 - LOG2E, d)
            Z, F, D, A, E, B = recentre_by(Z, F, D, A, E, B, p, q, p, q)
            D = tl.where(tl.maximum(p, q) < FAR, D, float("inf"))
    else:
        for i in range(start, tail, STEP):
            z = tl.load(S + i + tile).to(tl.float32)
            t = tl.load(T + i + tile).to(tl.float32)
            m, n, Z, F, D, A, E, B = _add_tile(m, n, Z, F, D, A, E, B, z, t, BOTH)
    finite = tl.sum(0.0 * D + 0.0 * A + 0.0 * E + 0.0 * B, 0) == 0.0
    m, n = tl.where(finite, m, NEG), tl.where(finite, n, NEG)
    Z, F, D = tl.where(finite, Z, 0.0), tl.where(finite, F, 0.0), tl.where(finite, D, 0.0)
    A, E, B = tl.where(finite, A, 0.0), tl.where(finite, E, 0.0), tl.where(finite, B, 0.0)
    again = tl.where(finite, start, tail)
    m, n, Z, F, D, A, E, B = _add_masked_columns(S, T, start, again, columns, m, n, Z, F, D, A, E, B, BOTH, LANES, VEC)
    m, n, Z, F, D, A, E, B = _add_masked_columns(S, T, tail, stop, columns, m, n, Z, F, D, A, E, B, BOTH, LANES, VEC)
    m_row, n_row = tl.max(m, 0), tl.max(n, 0)
    Z, F, D, A, E, B = recentre(Z, F, D, A, E, B, m, n, m_row, n_row)
    sums = 6 + 2 * BOTH
    _store_sums(
        OUT + split.to(tl.int64) * sums * rows + row, rows, m_row, tl.sum(Z, 0), n_row, tl.sum(F, 0),
        tl.sum(D, 0) * LN2, tl.sum(A, 0) * LN2, tl.sum(E, 0) * LN2, tl.sum(B, 0) * LN2, True, BOTH,
    )  # fmt: skip


@triton.jit
def merge_splits_kernel(PARTS, OUT, rows, splits, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    """[splits, 6 or 8, rows] -> [6 or 8, rows], in the order of the splits: the same bits every time."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    m = tl.full([BLOCK], NEG, tl.float32)
    n = tl.full([BLOCK], NEG, tl.float32)
    Z = tl.zeros([BLOCK], tl.float32)
    F, D, A, E, B = Z, Z, Z, Z, Z
    sums = 6 + 2 * BOTH
    for split in range(0, splits):
        P = PARTS + split * sums * rows + row
        m_part = tl.load(P, mask=inside, other=NEG)
        n_part = tl.load(P + 2 * rows, mask=inside, other=NEG)
        Z_part = tl.load(P + rows, mask=inside, other=0.0)
        F_part = tl.load(P + 3 * rows, mask=inside, other=0.0)
        D_part = tl.load(P + 4 * rows, mask=inside, other=0.0) * LOG2E
        A_part = tl.load(P + 5 * rows, mask=inside, other=0.0) * LOG2E
        E_part, B_part = E * 0.0, B * 0.0
        if BOTH:
            E_part = tl.load(P + 6 * rows, mask=inside, other=0.0) * LOG2E
            B_part = tl.load(P + 7 * rows, mask=inside, other=0.0) * LOG2E
        m_new, n_new = tl.maximum(m, m_part), tl.maximum(n, n_part)
        Z, F, D, A, E, B = recentre(Z, F, D, A, E, B, m, n, m_new, n_new)
        Z_part, F_part, D_part, A_part, E_part, B_part = recentre(
            Z_part, F_part, D_part, A_part, E_part, B_part, m_part, n_part, m_new, n_new
        )
        Z, F, D, A, E, B = Z + Z_part, F + F_part, D + D_part, A + A_part, E + E_part, B + B_part
        m, n = m_new, n_new
    _store_sums(OUT + row, rows, m, Z, n, F, D * LN2, A * LN2, E * LN2, B * LN2, inside, BOTH)


@triton.jit
def _store_gradient(
    S, T, OUT, m, n, r0, r1, r2, columns, TEACHER: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    for i in tl.static_range(BLOCKS):
        column = (tl.program_id(1) * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(S + column, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(T + column, mask=inside, other=0.0).to(tl.float32)
        # A -inf counts as LOWEST, as in the sums. In a row with a NaN r0 and r1 are NaN.
        x = tl.maximum(z - m, LOWEST)
        y = tl.maximum(t - n, LOWEST)
        gradient = exp(x) * (r0 * (x - y) + r1)
        if TEACHER:
            gradient += r2 * exp(y)
        tl.store(OUT + column, gradient.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def divergence_gradient_kernel(
    S, T, ROWS, OUT, stride_s, stride_t, stride_out, columns, rows, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """Program (row, slab): OUT = e^x (r0 (x - y) + r1) + r2 e^y with ROWS [5, rows] = m, n, r0, r1, r2.

    OUT may be S: a thread writes the columns that it has read. The branch is the same for a whole row; reverse
    KL takes the one without the teacher's exponential.
    """
    row = tl.program_id(0).to(tl.int64)
    S += row * stride_s
    T += row * stride_t
    OUT += row * stride_out
    ROWS += row
    m = tl.load(ROWS)
    n = tl.load(ROWS + rows)
    r0 = tl.load(ROWS + 2 * rows)
    r1 = tl.load(ROWS + 3 * rows)
    r2 = tl.load(ROWS + 4 * rows)
    if r2 == 0.0:
        _store_gradient(S, T, OUT, m, n, r0, r1, r2, columns, False, BLOCK, BLOCKS)
    else:
        _store_gradient(S, T, OUT, m, n, r0, r1, r2, columns, True, BLOCK, BLOCKS)

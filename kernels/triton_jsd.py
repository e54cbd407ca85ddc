"""Triton: sums and gradient of the generalised Jensen-Shannon divergence of one vocabulary shard.

p = e^(z - lse_s), q = e^(t - lse_t), mix = beta q + (1 - beta) p. Everything is made of p and q alone, so that a
rounding of theirs is a change of the distributions, to which the divergence is blind in first order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_lanes import NEG, exp, lane_sum, load_masked, tile_columns


@triton.jit
def _log_mix(p, q, beta):
    """-> mix and its logarithm, finite where both are 0."""
    mix = beta * q + (1.0 - beta) * p
    return mix, tl.log(tl.maximum(mix, 1e-37))


@triton.jit
def _weighted_log_ratio(p, log_p, mix, log_mix, gap):
    """p (log p - log mix); 0 where p is 0. gap: mix - p, not from the rounded mix.

    log mix - log p = 2 atanh s, s = gap / (mix + p): to 2e-7 of itself by three terms where s < 0.1, where a
    difference of logarithms would keep nothing of it.
    """
    s = gap / tl.maximum(mix + p, 1e-37)
    s2 = s * s
    series = s * (2.0 + s2 * (2.0 / 3.0 + s2 * (2.0 / 5.0)))
    return -p * tl.where(tl.abs(s) < 0.1, series, log_mix - log_p)


@triton.jit
def jsd_sums_kernel(
    S, T, ROWS, OUT, stride_s, stride_t, columns, width, rows, beta,
    GROUPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Program (row, split): ROWS [2, rows] = lse_s, lse_t -> OUT [splits, 2, rows]: K_P, K_Q of its columns."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    S += row * stride_s
    T += row * stride_t
    lse_s = tl.load(ROWS + row)
    lse_t = tl.load(ROWS + rows + row)
    K_P = tl.zeros([LANES], tl.float32)
    K_Q = tl.zeros([LANES], tl.float32)
    tile = tile_columns(GROUPS, LANES, VEC)
    start = split * width
    for i in range(start, tl.minimum(start + width, columns), GROUPS * LANES * VEC):
        inside = i + tile < columns
        log_p = load_masked(S, i + tile, inside) - lse_s
        log_q = load_masked(T, i + tile, inside) - lse_t
        p, q = exp(log_p), exp(log_q)
        mix, log_mix = _log_mix(p, q, beta)
        K_P += lane_sum(_weighted_log_ratio(p, log_p, mix, log_mix, beta * (q - p)))
        K_Q += lane_sum(_weighted_log_ratio(q, log_q, mix, log_mix, (1.0 - beta) * (p - q)))
    OUT += split.to(tl.int64) * 2 * rows + row
    tl.store(OUT, tl.sum(K_P, 0))
    tl.store(OUT + rows, tl.sum(K_Q, 0))


@triton.jit
def jsd_gradient_kernel(
    S, T, ROWS, OUT, stride_s, stride_t, stride_out, columns, rows, beta,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program (row, slab): OUT = scale (1 - beta) p (log p - log mix - K_P), ROWS [4, rows] = lse_s, lse_t, K_P, scale.

    OUT may be S: a thread writes the columns that it has read.
    """
    row = tl.program_id(0).to(tl.int64)
    S += row * stride_s
    T += row * stride_t
    OUT += row * stride_out
    lse_s = tl.load(ROWS + row)
    lse_t = tl.load(ROWS + rows + row)
    K_P = tl.load(ROWS + 2 * rows + row)
    scale = tl.load(ROWS + 3 * rows + row) * (1.0 - beta)
    for i in tl.static_range(BLOCKS):
        column = (tl.program_id(1) * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(S + column, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(T + column, mask=inside, other=0.0).to(tl.float32)
        log_p = tl.maximum(z, NEG) - lse_s
        p, q = exp(log_p), exp(t - lse_t)
        mix, log_mix = _log_mix(p, q, beta)
        gradient = scale * (_weighted_log_ratio(p, log_p, mix, log_mix, beta * (q - p)) - p * K_P)
        tl.store(OUT + column, gradient.to(OUT.dtype.element_ty), mask=inside)

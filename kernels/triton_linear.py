"""Triton: sums and gradient of the divergences from hidden states. Logits exist in registers only, in fp32.

A tile of logits is two matrix products of BM tokens with BN rows of the output layers, the teacher's after the
student's. So both accumulators live at once, which decides the tiles: what fits without spilling is found with
`python -m kernels.aot`. Notation as in `triton_divergence`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_lanes import LN2, LOG2E, LOWEST, NEG, at_least, excess, exp, recentre


@triton.jit
def _logits(
    X, W, token, token_inside, column, column_inside, stride_x, stride_w, scale,
    H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32 = scale * X W^T; columns outside have the logit 0."""
    k = tl.arange(0, BK)
    product = tl.zeros([BM, BN], tl.float32)
    # 32-bit offsets from one pointer take half the registers of a tile of pointers.
    x_at = token[:, None] * stride_x.to(tl.int32) + k[None, :]
    w_at = column[:, None] * stride_w.to(tl.int32) + k[None, :]
    for start in range(0, H, BK):
        if H % BK == 0:
            x = tl.load(X + (x_at + start), mask=token_inside[:, None], other=0.0)
            w = tl.load(W + (w_at + start), mask=column_inside[:, None], other=0.0)
        else:
            inside = (k < H - start)[None, :]
            x = tl.load(X + (x_at + start), mask=token_inside[:, None] & inside, other=0.0)
            w = tl.load(W + (w_at + start), mask=column_inside[:, None] & inside, other=0.0)
        product = tl.dot(x, w.T, product)
    return product * scale


@triton.jit
def _halves(tile):
    """[BM, BN] -> its left and right half."""
    return tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute(0, 2, 1).split()


@triton.jit
def _add(Z, F, D, A, E, B, z, t, m, n, BOTH: tl.constexpr, PARTS: tl.constexpr):
    """The sums with a tile of logits, half by half: temporaries of a whole tile would not fit beside it."""
    if PARTS > 1:
        z_left, z_right = _halves(z)
        t_left, t_right = _halves(t)
        Z, F, D, A, E, B = _add(Z, F, D, A, E, B, z_left, t_left, m, n, BOTH, PARTS // 2)
        Z, F, D, A, E, B = _add(Z, F, D, A, E, B, z_right, t_right, m, n, BOTH, PARTS // 2)
    else:
        x = at_least(LOWEST, z - m[:, None]) * LOG2E
        y = at_least(LOWEST, t - n[:, None]) * LOG2E
        e = tl.exp2(x)
        f = tl.exp2(y)
        u = y - x
        Z += tl.sum(e, 1)
        F += tl.sum(excess(e, f, u), 1)
        D -= tl.sum(e * u, 1)
        A += tl.sum(e * x, 1)
        if BOTH:
            E += tl.sum(f * u, 1)
            B += tl.sum(f * y, 1)
    return Z, F, D, A, E, B


@triton.jit
def linear_sums_kernel(
    X, W, XT, WT, OUT, stride_x, stride_w, stride_xt, stride_wt, tokens, columns, width, scale,
    BOTH: tl.constexpr, H: tl.constexpr, HT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program (tokens, split): columns [split * width, (split + 1) * width) -> OUT [splits, 6 or 8, tokens].

    X [tokens, H], W [columns, H], XT [tokens, HT], WT [columns, HT]; logits are times `scale`. Programs that run
    together share a split, so its rows of W come from memory once.
    """
    split = tl.program_id(1).to(tl.int64)
    first_token = tl.program_id(0).to(tl.int64) * BM
    X += first_token * stride_x
    XT += first_token * stride_xt
    W += split * width * stride_w
    WT += split * width * stride_wt
    token = tl.arange(0, BM)
    token_inside = first_token + token < tokens
    here = tl.minimum(width, columns - split.to(tl.int32) * width)
    m = tl.full([BM], NEG, tl.float32)
    n = tl.full([BM], NEG, tl.float32)
    Z = tl.zeros([BM], tl.float32)
    F, D, A, E, B = Z, Z, Z, Z, Z
    for start in range(0, here, BN):
        column = start + tl.arange(0, BN)
        inside = column < here
        z = _logits(X, W, token, token_inside, column, inside, stride_x, stride_w, scale, H, BM, BN, BK)
        t = _logits(XT, WT, token, token_inside, column, inside, stride_xt, stride_wt, scale, HT, BM, BN, BK)
        z = tl.where(inside[None, :], z, -float("inf"))
        t = tl.where(inside[None, :], t, -float("inf"))
        m_new = tl.maximum(m, tl.max(z, 1))
        n_new = tl.maximum(n, tl.max(t, 1))
        Z, F, D, A, E, B = recentre(Z, F, D, A, E, B, m, n, m_new, n_new)
        Z, F, D, A, E, B = _add(Z, F, D, A, E, B, z, t, m_new, n_new, BOTH, PARTS)
        m, n = m_new, n_new
    sums = 6 + 2 * BOTH
    OUT += split * sums * tokens + first_token + token
    tl.store(OUT, m, mask=token_inside)
    tl.store(OUT + tokens, Z, mask=token_inside)
    tl.store(OUT + 2 * tokens, n, mask=token_inside)
    tl.store(OUT + 3 * tokens, F, mask=token_inside)
    tl.store(OUT + 4 * tokens, D * LN2, mask=token_inside)
    tl.store(OUT + 5 * tokens, A * LN2, mask=token_inside)
    if BOTH:
        tl.store(OUT + 6 * tokens, E * LN2, mask=token_inside)
        tl.store(OUT + 7 * tokens, B * LN2, mask=token_inside)


@triton.jit
def linear_gradient_kernel(
    X, W, XT, WT, ROWS, OUT, stride_x, stride_w, stride_xt, stride_wt, tokens, columns, scale,
    TEACHER: tl.constexpr, H: tl.constexpr, HT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (tokens, columns): OUT [tokens, columns] = e^x (r0 (x - y) + r1), with TEACHER + r2 e^y; ROWS [5, tokens]
    = m, n, r0, r1, r2. Both logits are made again."""
    first_token = tl.program_id(0).to(tl.int64) * BM
    first_column = tl.program_id(1).to(tl.int64) * BN
    X += first_token * stride_x
    XT += first_token * stride_xt
    W += first_column * stride_w
    WT += first_column * stride_wt
    token, column = tl.arange(0, BM), tl.arange(0, BN)
    token_inside = first_token + token < tokens
    inside = first_column + column < columns
    z = _logits(X, W, token, token_inside, column, inside, stride_x, stride_w, scale, H, BM, BN, BK)
    t = _logits(XT, WT, token, token_inside, column, inside, stride_xt, stride_wt, scale, HT, BM, BN, BK)
    ROWS += first_token + token
    x = z - tl.load(ROWS, mask=token_inside, other=0.0)[:, None]
    y = t - tl.load(ROWS + tokens, mask=token_inside, other=0.0)[:, None]
    r0 = tl.load(ROWS + 2 * tokens, mask=token_inside, other=0.0)[:, None]
    r1 = tl.load(ROWS + 3 * tokens, mask=token_inside, other=0.0)[:, None]
    # A -inf counts as LOWEST, as in the sums. In a row with a NaN r0 and r1 are NaN.
    x, y = tl.maximum(x, LOWEST), tl.maximum(y, LOWEST)
    gradient = exp(x) * (r0 * (x - y) + r1)
    if TEACHER:
        gradient += tl.load(ROWS + 4 * tokens, mask=token_inside, other=0.0)[:, None] * exp(y)
    OUT += (first_token + token)[:, None] * columns + (first_column + column)[None, :]
    tl.store(OUT, gradient.to(OUT.dtype.element_ty), mask=token_inside[:, None] & inside[None, :])

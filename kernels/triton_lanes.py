"""What the Triton kernels share: tiles whose reductions stay inside a thread, and the change of centre.

A tile is [GROUPS, LANES, VEC]: a lane loads GROUPS times VEC neighbouring columns, 16 bytes at once. Reducing a
tile over its first and last axis needs no other thread, so a loop that keeps its sums per lane has neither a
shuffle nor a barrier in it; lanes meet once, after the loop.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

NEG = tl.constexpr(-1.0e30)
"""Stands for minus infinity: a maximum of nothing. Finite, so that differences of two of them are 0 and not NaN."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

LOWEST = tl.constexpr(-1.0e4)
"""Below its maximum a logit counts as this, also -inf: e^LOWEST is 0, and 0 * LOWEST too."""


@triton.jit
def exp(x):
    """e^x with one multiplication and the hardware's 2^x."""
    return tl.exp2(x * LOG2E)


@triton.jit
def lane_max(tile):
    """[GROUPS, LANES, VEC] -> [LANES]"""
    return tl.max(tl.max(tile, 2), 0)


@triton.jit
def lane_sum(tile):
    """[GROUPS, LANES, VEC] -> [LANES]"""
    return tl.sum(tl.sum(tile, 2), 0)


@triton.jit
def tile_columns(GROUPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of a tile: neighbouring lanes read neighbouring 16 bytes."""
    group = tl.arange(0, GROUPS)[:, None, None] * (LANES * VEC)
    lane = tl.arange(0, LANES)[None, :, None] * VEC
    return group + lane + tl.arange(0, VEC)[None, None, :]


@triton.jit
def at_least(low: tl.constexpr, x):
    """The larger one, in one instruction; NaN stays NaN."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_masked(pointer, columns, inside):
    """fp32 logits; NEG outside and for -inf."""
    return tl.where(inside, at_least(NEG, tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)), NEG)


@triton.jit
def below(z, m):
    """Bits from the maximum down to a masked logit, at most LOWEST: also where m is the maximum of nothing."""
    return tl.where(z <= NEG, LOWEST, at_least(LOWEST, z - m)) * LOG2E


_NEARLY_EQUAL = tl.constexpr(0.18)
"""Bits up to which the series below is right to 3e-5 of what a divergence is made of, 2^u - 1 - u log(2)."""

_EXCESS = tl.constexpr("""{
    .reg .pred near;
    .reg .f32 size, series, first;
    abs.f32 size, $3;
    setp.lt.f32 near, size, 0f3E3851EC;
    sub.f32 $0, $2, $1;
    fma.rn.f32 series, $3, 0f3C1D955C, 0f3D635847;
    fma.rn.f32 series, $3, series, 0f3E75FDF0;
    fma.rn.f32 series, $3, series, 0f3F317218;
    mul.f32 first, $1, $3;
    @near mul.f32 $0, first, series;
}""")
"""`excess`, with the comparison next to its use. From tl.where the compiler makes all comparisons of a tile first, and
packs the results into bit masks: two instructions a column more."""


@triton.jit
def _excess_interpreted(e, f, u):
    """The interpreter knows no PTX."""
    near = e * u * (0.6931471805599453 + u * (0.24022651 + u * (0.05550411 + u * 0.00961813)))
    return tl.where(tl.abs(u) < _NEARLY_EQUAL, near, f - e)


@triton.jit
def _excess_compiled(e, f, u):
    return tl.inline_asm_elementwise(_EXCESS, "=f,f,f,f", [e, f, u], dtype=tl.float32, is_pure=True, pack=1)


excess = _excess_interpreted if triton.knobs.runtime.interpret else _excess_compiled
"""(e, f, u) -> f - e for e = 2^x, f = 2^y, u = y - x.

f and e have rounding errors of 1e-7 of themselves; where they nearly agree, their difference has nothing else. There
it is e (2^u - 1) by its Taylor series.
"""


@triton.jit
def _moved(old, new):
    """How far x moves with its maximum, as in x at most LOWEST; what counts as LOWEST below nothing does not move."""
    return tl.where(old <= NEG, 0.0, at_least(LOWEST, old - new)) * LOG2E


@triton.jit
def recentre_by(Z, F, D, A, E, B, p, q, dm, dn):
    """Sums about (m, n) -> sums about (m - p, n - q), all in bits, where x moves by dm and y by dn: by p and q, too,
    but for what counts as LOWEST.

    All but Z and F are in bits: what stands beside an exponential is then the very number it is made of, and the
    rounding of x log2(e) perturbs the logits, to which the divergence is blind in first order.
    """
    a, b = tl.exp2(p), tl.exp2(q)
    W = Z + F
    E = b * (E + (dn - dm) * W)
    B = b * (B + dn * W)
    D = a * (D + (dm - dn) * Z)
    A = a * (A + dm * Z)
    F = b * F + excess(a, b, q - p) * Z
    return a * Z, F, D, A, E, B


@triton.jit
def recentre(Z, F, D, A, E, B, m, n, m_new, n_new):
    """Sums about the maxima (m, n) -> sums about (m_new, n_new), which are not lower."""
    p, q = (m - m_new) * LOG2E, (n - n_new) * LOG2E
    return recentre_by(Z, F, D, A, E, B, p, q, _moved(m, m_new), _moved(n, n_new))

// Both KL divergences and both entropies of a row, and the gradient of any mixture of the divergences.
#pragma once

#include "columns.h"

namespace {

// Sums of both distributions about (m, n). V is a vector of lanes, or one double.
template <class V, bool BOTH>
struct Sums {
  V z{}, f{}, d{}, a{}, e{}, b{};

  // About maxima that are higher by -ds and -dt; es = e^ds, et = e^dt, difference = et - es.
  inline void recentre(V ds, V dt, V es, V et, V difference) {
    if (BOTH) {
      V teacher = z + f;
      e = et * (e + (dt - ds) * teacher);
      b = et * (b + dt * teacher);
    }
    d = es * (d + (ds - dt) * z);
    a = es * (a + ds * z);
    f = et * f + difference * z;
    z = es * z;
  }

  inline void add(const Sums& other) {
    z += other.z, f += other.f, d += other.d, a += other.a;
    if (BOTH) e += other.e, b += other.b;
  }
};

template <bool BOTH>
struct DivergenceRow {
  vf m = splat(EMPTY), n = splat(EMPTY);
  Sums<vf, BOTH> tile, row;

  template <int U>
  inline void raise(const Step<U>& s, const Step<U>& t) {
    vf high_s = s.v[0], high_t = t.v[0];
#pragma GCC unroll 4
    for (int u = 1; u < U; u++) high_s = at_least(high_s, s.v[u]), high_t = at_least(high_t, t.v[u]);
    if (__builtin_expect(!any_greater(high_s, m, high_t, n), 1)) return;
    high_s = high_s > m ? high_s : m, high_t = high_t > n ? high_t : n;
    vf ds = below(m, high_s), dt = below(n, high_t), es = exponential(ds), et = exponential(dt);
    // Formed by subtraction, et - es would lose a small divergence.
    vf gap = dt - ds, near = es * exponential_minus_one(gap > 1.f ? splat(1.f) : gap);
    vf difference = (gap < 1.f) & (gap > -1.f) ? near : et - es;
    ds = moved(m, high_s), dt = moved(n, high_t);
    tile.recentre(ds, dt, es, et, difference);
    row.recentre(ds, dt, es, et, difference);
    m = high_s, n = high_t;
  }

  inline void accumulate(vf s, vf t) {
    vf x = below(s, m), y = below(t, n), difference = x - y;
    vf floor = at_least(splat(NEGLIGIBLE), x), whole = exponential(floor);
    vf e = zero_where(x, NEGLIGIBLE, whole);
    Power ratio = power(y - floor);
    // e^y - e^x = e^x (e^(y-x) - 1): a subtraction of rounded exponentials would lose all of a small KL.
    tile.z += e;
    tile.f += whole * (ratio.scale * ratio.rest + (ratio.scale - 1.f));
    tile.d += e * difference;
    tile.a += e * x;
    if (BOTH) {
      vf teacher = whole * (ratio.scale * ratio.rest + ratio.scale);
      tile.e -= teacher * difference;
      tile.b += teacher * y;
    }
  }

  inline void end_tile() {
    row.add(tile);
    tile = {};
  }

  void finish(float* out, long rows) {
    double high_s = EMPTY, high_t = EMPTY;
    for (int i = 0; i < W; i++) high_s = m[i] > high_s ? m[i] : high_s, high_t = n[i] > high_t ? n[i] : high_t;
    Sums<double, BOTH> all;
    for (int i = 0; i < W; i++) {
      Sums<double, BOTH> lane{row.z[i], row.f[i], row.d[i], row.a[i], row.e[i], row.b[i]};
      double es = exp(below(m[i], high_s)), et = exp(below(n[i], high_t));
      lane.recentre(moved(m[i], high_s), moved(n[i], high_t), es, et, et - es);
      all.add(lane);
    }
    const double found[8] = {high_s, all.z, high_t, all.f, all.d, all.a, all.e, all.b};
    for (int k = 0; k < (BOTH ? 8 : 6); k++) out[k * rows] = (float)found[k];
  }
};

template <class T, bool BOTH>
void divergence_row(const T* s, const T* t, long columns, float* out, long rows) {
  DivergenceRow<BOTH> sums;
  long at = 0;
  for (int steps = 1; at + STEP * W <= columns; at += STEP * W, steps++) {
    Step<STEP> vs = read<STEP>(s, at, columns), vt = read<STEP>(t, at, columns);
    sums.raise(vs, vt);
#pragma GCC unroll 4
    for (int u = 0; u < STEP; u++) sums.accumulate(vs.v[u], vt.v[u]);
    if (steps % STEPS_PER_TILE == 0) sums.end_tile();
  }
  for (; at < columns; at += W) {
    Step<1> vs = read<1>(s, at, columns), vt = read<1>(t, at, columns);
    sums.raise(vs, vt);
    sums.accumulate(vs.v[0], vt.v[0]);
  }
  sums.end_tile();
  sums.finish(out, rows);
}

// `out` may be the student's row: a vector is read before it is written, and never again.
template <class T, class O, bool TEACHER>
void divergence_gradient_row(const T* s, const T* t, long columns, const float* r, long rows, O* out) {
  vf m = splat(r[0]), n = splat(r[rows]), r0 = splat(r[2 * rows]), r1 = splat(r[3 * rows]), r2 = splat(r[4 * rows]);
  for (long at = 0; at < columns; at += W) {
    vf x = below(read<1>(s, at, columns).v[0], m), y = below(read<1>(t, at, columns).v[0], n);
    vf g = exponential(x) * (r0 * (x - y) + r1);
    if (TEACHER) g += r2 * exponential(y);
    write(out, at, columns, g);
  }
}

}  // namespace

// The Jensen-Shannon divergence of a row about known normalisers, and the log-probability of its token.
#pragma once

#include "columns.h"

namespace {

// u = log p - log mix and log q - log mix. Log-probabilities are cut at -80, so that e^(log q - log p) is finite.
struct Mixture {
  vf p, q, student, teacher;
  inline Mixture(vf log_p, vf log_q, float beta) {
    p = zero_where(log_p, -80.f, exponential(log_p)), q = zero_where(log_q, -80.f, exponential(log_q));
    vf gap = at_least(splat(-80.f), log_q) - at_least(splat(-80.f), log_p);
    student = -log_one_plus(beta * exponential_minus_one(gap));
    teacher = gap + student;
  }
};

template <class T>
void jsd_row(const T* s, const T* t, long columns, const float* r, long rows, float beta, float* out) {
  vf lse_s = splat(r[0]), lse_t = splat(r[rows]), tile_p{}, tile_q{}, sum_p{}, sum_q{};
  int steps = 1;
  for (long at = 0; at < columns; at += W, steps++) {
    Mixture mix(read<1>(s, at, columns).v[0] - lse_s, read<1>(t, at, columns).v[0] - lse_t, beta);
    tile_p += mix.p * mix.student, tile_q += mix.q * mix.teacher;
    if (steps % (STEP * STEPS_PER_TILE) == 0) sum_p += tile_p, sum_q += tile_q, tile_p = tile_q = vf{};
  }
  double p = 0, q = 0;
  for (int i = 0; i < W; i++) p += (double)sum_p[i] + tile_p[i], q += (double)sum_q[i] + tile_q[i];
  out[0] = (float)p, out[rows] = (float)q;
}

template <class T, class O>
void jsd_gradient_row(const T* s, const T* t, long columns, const float* r, long rows, float beta, O* out) {
  vf lse_s = splat(r[0]), lse_t = splat(r[rows]);
  float mean = r[2 * rows], scale = r[3 * rows] * (1.f - beta);
  for (long at = 0; at < columns; at += W) {
    Mixture mix(read<1>(s, at, columns).v[0] - lse_s, read<1>(t, at, columns).v[0] - lse_t, beta);
    write(out, at, columns, mix.p * (scale * (mix.student - mean)));
  }
}

struct TokenRow {
  vf m = splat(EMPTY), tile_z{}, tile_a{}, z{}, a{};

  inline void accumulate(vf v) {
    if (__builtin_expect(any_greater(v, m, v, m), 0)) {
      vf high = v > m ? v : m, d = below(m, high), e = exponential(d);
      tile_a = e * (tile_a + d * tile_z), tile_z = e * tile_z;
      a = e * (a + d * z), z = e * z;
      m = high;
    }
    vf x = below(v, m), e = zero_where(x, NEGLIGIBLE, exponential(x));
    tile_z += e, tile_a += e * x;
  }

  inline void end_tile() {
    z += tile_z, a += tile_a;
    tile_z = tile_a = vf{};
  }

  void finish(float* out, long rows) {
    double high = EMPTY, sum_z = 0, sum_a = 0;
    for (int i = 0; i < W; i++) high = m[i] > high ? m[i] : high;
    for (int i = 0; i < W; i++) {
      double d = below(m[i], high), e = exp(d);
      sum_z += e * z[i], sum_a += e * (a[i] + d * z[i]);
    }
    out[0] = (float)high, out[rows] = (float)sum_z, out[2 * rows] = (float)sum_a;
  }
};

template <class T>
void token_row(const T* s, long columns, long id, bool owned, float* out, long rows) {
  TokenRow sums;
  int steps = 1;
  for (long at = 0; at < columns; at += W, steps++) {
    sums.accumulate(read<1>(s, at, columns).v[0]);
    if (steps % (STEP * STEPS_PER_TILE) == 0) sums.end_tile();
  }
  sums.end_tile();
  sums.finish(out, rows);
  out[3 * rows] = owned ? to_float(s[id]) : 0.f;
}

template <class T, class O>
void token_gradient_row(const T* s, long columns, long id, bool owned, const float* r, long rows, O* out) {
  float m = r[0], scale = r[rows], hit = r[2 * rows];
  float chosen = 0.f;
  if (owned) {
    vf x = splat(to_float(s[id]) - m);
    chosen = exponential(x)[0] * scale + hit;
  }
  for (long at = 0; at < columns; at += W)
    write(out, at, columns, exponential(read<1>(s, at, columns).v[0] - splat(m)) * scale);
  if (owned) {
    O value[W];
    store(value, splat(chosen));
    out[id] = value[0];
  }
}

}  // namespace

// The columns of one row, a few vectors at a time, with the rest behind the last full vector.
#pragma once

#include "simd.h"

namespace {

constexpr float EMPTY = -1e30f;     // the maximum of nothing: finite, and lower than any logit
constexpr float LOWEST = -1e4f;     // below its maximum a logit counts as this, also -inf: e^LOWEST is 0, 0 * LOWEST too
constexpr float NEGLIGIBLE = -60.f; // e^-60 is nothing beside the 1 that the maximum adds to Z, yet e^60 is finite
constexpr int STEP = 4;              // vectors
constexpr int STEPS_PER_TILE = 32;

template <int U>
struct Step {
  vf v[U];
};

// The columns [at, at + U * W) of a row; minus infinity stands behind the last.
template <int U, class T>
inline Step<U> read(const T* row, long at, long columns) {
  Step<U> step;
  if (at + U * W <= columns) {
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) step.v[u] = load(row + at + u * W);
  } else {
    float buffer[U * W];
    for (int i = 0; i < U * W; i++) buffer[i] = at + i < columns ? to_float(row[at + i]) : -INFINITY;
    for (int u = 0; u < U; u++) step.v[u] = load(buffer + u * W);
  }
  return step;
}

// How far below `maximum`, in [LOWEST, 0]; NaN stays NaN.
inline vf below(vf v, vf maximum) { return at_least(splat(LOWEST), v - maximum); }
inline double below(double v, double maximum) { return v - maximum < LOWEST ? LOWEST : v - maximum; }

// The same for a maximum that was raised. Where there was none, what counts as LOWEST still does: it does not move.
inline vf moved(vf old, vf maximum) { return old == splat(EMPTY) ? vf{} : below(old, maximum); }
inline double moved(double old, double maximum) { return old == EMPTY ? 0.0 : below(old, maximum); }

// One vector of results; only the columns that exist are written.
template <class T>
inline void write(T* row, long at, long columns, vf v) {
  if (at + W <= columns) return store(row + at, v);
  T buffer[W];
  store(buffer, v);
  memcpy(row + at, buffer, (columns - at) * sizeof(T));
}

}  // namespace

// Vectors of floats, as wide as the flags of the compiler allow, and the functions that a softmax needs.
//
// GCC's vector extensions (clang has them too) keep one source for AVX-512, AVX2 and everything else; the few
// operations that they cannot express well are intrinsics below.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {  // nothing of one instruction set may be merged by a linker with that of another

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

inline vf splat(float value) { return value - vf{}; }

template <class V>
inline V load_as(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline vf load(const float* from) { return load_as<vf>(from); }
inline vf load(const bf16* from) { return (vf)(__builtin_convertvector(load_as<vh>(from), vu) << 16); }

inline void store(float* to, vf v) { memcpy(to, &v, sizeof v); }
inline void store(bf16* to, vf v) {  // to nearest even; NaN stays NaN
  vu u = (vu)v;
  u = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  u = (vu)(v == v) & u | ~(vu)(v == v) & 0x7fc0u;
  vh h = __builtin_convertvector(u, vh);
  memcpy(to, &h, sizeof h);
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  uint32_t bits = (uint32_t)value.bits << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// The larger one; `b` if either is NaN, so that `at_least(low, x)` lets a NaN in x through.
inline vf at_least(vf a, vf b) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// Whether a > b or c > d in any lane.
inline bool any_greater(vf a, vf b, vf c, vf d) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) | _mm512_cmp_ps_mask((__m512)c, (__m512)d, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)((a > b) | (c > d)));
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)((a > b) | (c > d)));
#else
  vi found = (a > b) | (c > d);
  int32_t any = 0;
  for (int i = 0; i < W; i++) any |= found[i];
  return any;
#endif
}

// x without the lanes where a <= b: those are zero.
inline vf zero_where(vf a, float b, vf x) { return (vf)(~(a <= splat(b)) & (vi)x); }

// e^v = scale (1 + rest), scale = 2^round(v / ln 2) and rest = e^f - 1 of the remainder |f| <= ln(2) / 2, to
// 3e-9 by a polynomial of degree six. Below v = -88.03 scale is zero; v must not exceed 88.
struct Power {
  vf scale, rest;
};

inline Power power(vf v) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  v = at_least(splat(-88.03f), v);
  vf shifted = v * 1.44269504f + magic;
  vf r = shifted - magic;
  vf f = v - r * 0.693359375f;  // ln 2 in two parts, the first exact in ten bits
  f = f + r * 2.12194440e-4f;
  vf p = 1.38142220e-3f * f + 8.36889877e-3f;
  p = p * f + 4.16684057e-2f;
  p = p * f + 1.66665191e-1f;
  p = p * f + 4.99999933e-1f;
  return {(vf)(((vu)shifted << 23) + 0x3f800000u), (p * f) * f + f};
}

inline vf exponential(vf v) {
  Power e = power(v);
  return e.scale * e.rest + e.scale;
}

// e^v - 1 with its relative accuracy near v = 0.
inline vf exponential_minus_one(vf v) {
  Power e = power(v);
  return e.scale * e.rest + (e.scale - 1.f);
}

// log(1 + v) for v > -1, with its relative accuracy near v = 0.
inline vf log_one_plus(vf v) {
  vf one_plus = v + 1.f;
  vi bits = (vi)one_plus - 0x3f3504f3;          // sqrt(1/2): the mantissa below lies in [sqrt(1/2), sqrt(2))
  vi exponent = bits >> 23;
  vf mantissa = (vf)((bits & 0x7fffff) + 0x3f3504f3);
  vf f = exponent == 0 ? v : mantissa - 1.f;    // v itself where 1 + v has rounded it
  vf p = -7.63859792e-2f * f + 1.27677734e-1f;
  p = p * f - 1.31615986e-1f;
  p = p * f + 1.42010315e-1f;
  p = p * f - 1.66231484e-1f;
  p = p * f + 2.00012500e-1f;
  p = p * f - 2.50008270e-1f;
  p = p * f + 3.33333315e-1f;
  vf square = f * f;
  return __builtin_convertvector(exponent, vf) * 0.693147181f + (f + square * (p * f - 0.5f));
}

}  // namespace

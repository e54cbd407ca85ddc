// The arithmetic of reverse_kl_sm90.cu, for nvcc and for any C++ compiler: tests run it on a CPU against float64.
//
// As in partials.py: m = max z, n = max t, x = z - m, y = t - n, Z = sum e^x, F = sum (e^y - e^x), D = sum e^x (x - y),
// A = sum e^x x;  KL = D/Z + log1p(F/Z);  dz_j = g p_j ((x - y) - D/Z), p_j = e^x / Z. x, y, D and A are in bits:
// `bits` is log2(e) over the temperature. -inf logits are read as kMasked; NaN stays NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define EVERYWHERE __host__ __device__ __forceinline__
#else
#define EVERYWHERE inline
#endif

namespace one_read {

constexpr float kEmpty = -1e30f;   // the maximum of nothing
constexpr float kMasked = -2e30f;  // for -inf: below kEmpty, so that e^(kMasked - maximum) is 0 and not 1
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kColumns = 8;  // of 16 bytes

struct Sums {
  float m, Z, n, F, D, A;
};

EVERYWHERE Sums none() { return {kEmpty, 0.f, kEmpty, 0.f, 0.f, 0.f}; }

EVERYWHERE float power(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// b - a for a = 2^p, b = 2^q, gap = q - p. Where they nearly agree, their difference is nothing but their roundings.
EVERYWHERE float excess(float a, float b, float gap) {
  const float near = a * gap * (0.69314718f + gap * (0.24022651f + gap * (0.05550411f + gap * 0.00961813f)));
  return fabsf(gap) < 0.18f ? near : b - a;
}

// The same sums about new maxima.
EVERYWHERE Sums recentred(const Sums& s, float m, float n, float bits) {
  const float dm = (s.m - m) * bits, dn = (s.n - n) * bits;
  const float a = power(dm), b = power(dn);
  return {m, a * s.Z, n, b * s.F + excess(a, b, dn - dm) * s.Z, a * (s.D + (dm - dn) * s.Z), a * (s.A + dm * s.Z)};
}

EVERYWHERE Sums merged(const Sums& left, const Sums& right, float bits) {
  const float m = fmaxf(left.m, right.m), n = fmaxf(left.n, right.n);
  const Sums l = recentred(left, m, n, bits), r = recentred(right, m, n, bits);
  return {m, l.Z + r.Z, n, l.F + r.F, l.D + r.D, l.A + r.A};
}

EVERYWHERE float as_float(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(word);
#else
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
#endif
}

// 8 bf16 -> fp32.
EVERYWHERE void unpack(const uint32_t (&words)[4], float (&values)[kColumns]) {
  for (int i = 0; i < 4; ++i) {
#ifdef __CUDA_ARCH__
    // The maximum of a pair is one instruction.
    const __nv_bfloat162 low = __float2bfloat162_rn(kMasked);
    const __nv_bfloat162 pair = __hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&words[i]), low);
    const uint32_t word = *reinterpret_cast<const uint32_t*>(&pair);
    values[2 * i] = as_float(word << 16);
    values[2 * i + 1] = as_float(word & 0xffff0000u);
#else
    const float pair[2] = {as_float(words[i] << 16), as_float(words[i] & 0xffff0000u)};
    for (int k = 0; k < 2; ++k) values[2 * i + k] = pair[k] < kMasked ? kMasked : pair[k];
#endif
  }
}

// Two fp32 -> bf16, rounded to nearest, the first in the low half.
EVERYWHERE uint32_t pack(float low, float high) {
#ifdef __CUDA_ARCH__
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
#else
  const float values[2] = {low, high};
  uint32_t halves[2];
  for (int k = 0; k < 2; ++k) {
    uint32_t word;
    std::memcpy(&word, &values[k], sizeof word);
    halves[k] = std::isnan(values[k]) ? 0x7fffu : (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  }
  return halves[0] | halves[1] << 16;
#endif
}

EVERYWHERE Sums with_columns(Sums s, const float (&z)[kColumns], const float (&t)[kColumns], float bits) {
  float m = s.m, n = s.n;
  for (int j = 0; j < kColumns; ++j) {
    m = fmaxf(m, z[j]);
    n = fmaxf(n, t[j]);
  }
  s = recentred(s, m, n, bits);
  for (int j = 0; j < kColumns; ++j) {
    const float x = (z[j] - m) * bits, y = (t[j] - n) * bits;
    const float e = power(x);
    s.Z += e;
    s.F += power(y) - e;
    s.D += e * (x - y);
    s.A += e * x;
  }
  return s;
}

// What the gradient of a row needs: scale = upstream log(2) / Z over the temperature, mean = D/Z.
struct Slope {
  float m, n, mean, scale, bits;
};

EVERYWHERE Slope slope(const Sums& s, float upstream, float bits) {
  return {s.m, s.n, s.D / s.Z, upstream * (bits * kLn2) * kLn2 / s.Z, bits};
}

// dz = g p (log p - log q - KL), where log p - log q - KL = (x - y) - D/Z.
EVERYWHERE float gradient(const Slope& r, float z, float t) {
  const float x = (z - r.m) * r.bits, y = (t - r.n) * r.bits;
  return r.scale * power(x) * ((x - y) - r.mean);
}

}  // namespace one_read

// Products of bf16 matrices with fp32 results on a CPU, for output layers: kernels/products_cpp.py has the definitions.
//
// The inner kernel is oneDNN's, which torch carries and uses for its own attention (AVX-512 or AMX, whichever the CPU
// has). It wants the right-hand side in pairs along the inner dimension, so all that happens here is to bring tiles
// into that form, a few hundred KiB at a time, and to walk over them so that they are still in the cache when used.
#include <stdlib.h>

#include <algorithm>
#include <atomic>

#include "simd.h"

namespace {

constexpr long COLUMNS = 64;   // of a packed tile: four vectors of results for each row
constexpr long ROWS = 256;     // of the left-hand side in one call
constexpr long INNER = 1024;   // terms in one call: a packed tile of 64 columns is 128 KiB
constexpr long LONG_INNER = 2048;
constexpr long STRIP = 32;     // pairs of rows that one thread packs at a time

typedef void (*Kernel)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                       const void* a, const void* b, float* c, bool packed);
typedef void (*Release)(bool packed);

inline uint32_t pair(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }
inline vu pairs(const uint16_t* low, const uint16_t* high) {
  return __builtin_convertvector(load_as<vh>(low), vu) | __builtin_convertvector(load_as<vh>(high), vu) << 16;
}

struct Buffer {
  explicit Buffer(size_t bytes) : data(aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  ~Buffer() { free(data); }
  uint32_t* pairs() const { return (uint32_t*)data; }
  void* data;
};

}  // namespace

// `Product` of kernels/products_cpp.py: c[m, n] = or += the product of a and b over k; ld* count elements.
struct Product {
  const uint16_t *a, *b;
  float* c;
  int64_t lda, ldb, ldc, m, n, k;
  int32_t add, threads;
  Kernel kernel;
  Release release;
};

namespace {

// rows [m, k] of `a` times a packed tile [k / 2][n][2] to c. The heights are powers of two below ROWS, because oneDNN
// compiles a kernel for each size that it meets.
void tile(const Product& p, const uint16_t* a, long lda, const uint32_t* b, float* c, long ldc, long m, long n, long k,
          bool add) {
  long i = 0;
  for (long height = ROWS; height; height /= 2)
    for (; i + height <= m; i += height)
      p.kernel(height, n, k, lda, n, ldc, add, a + i * lda, b, c + i * ldc, true);
}

// The last term of an odd number of them.
void last_term(float* c, long ldc, const uint16_t* a, long step_a, const uint16_t* b, long step_b, long m, long n,
               bool add) {
  for (long i = 0; i < m; i++) {
    const float left = to_float(bf16{a[i * step_a]});
    for (long j = 0; j < n; j++) {
      const float term = left * to_float(bf16{b[j * step_b]});
      c[i * ldc + j] = add ? c[i * ldc + j] + term : term;
    }
  }
}

// W vectors of W elements, rows against columns: swaps the off-diagonal quarters of ever smaller squares.
template <int D = W / 2>
void transpose_square(vi (&square)[W]) {
  vi left, right;  // which of the 2 W elements of a pair of rows come to lie in the upper and in the lower one
  for (int i = 0; i < W; i++) {
    left[i] = i & D ? W + i - D : i;
    right[i] = i & D ? W + i : i + D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (!(i & D)) {
      const vi upper = square[i], lower = square[i + D];
      square[i] = __builtin_shuffle(upper, lower, left);
      square[i + D] = __builtin_shuffle(upper, lower, right);
    }
  if constexpr (D > 1) transpose_square<D / 2>(square);
}

// to[p][j] = from[j][p] for p < rows, j < columns, in pairs; `load(p, j)` gives from[j][p] to from[j][p + W - 1].
template <class Load, class Element>
void transpose_pairs(uint32_t* to, long ld, long rows, long columns, Load load, Element element) {
  const long full_rows = rows / W * W, full_columns = columns / W * W;
  for (long j = 0; j < full_columns; j += W)  // few rows of `from` at a time, so that the CPU sees what comes next
    for (long p = 0; p < full_rows; p += W) {
      vi square[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) square[i] = load(p, j + i);
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) memcpy(to + (p + i) * ld + j, &square[i], sizeof(vi));
    }
  for (long p = 0; p < rows; p++)
    for (long j = p < full_rows ? full_columns : 0; j < columns; j++) to[p * ld + j] = element(p, j);
}

// to[p][j] = from[j][2p], from[j][2p + 1] for 2p < k, j < n.
void pack_transposed(uint32_t* to, const uint16_t* from, long ld, long n, long k) {
  transpose_pairs(
      to, n, k / 2, n, [&](long p, long j) { return load_as<vi>(from + j * ld + 2 * p); },
      [&](long p, long j) { return pair(from[j * ld + 2 * p], from[j * ld + 2 * p + 1]); });
}

// to[p][j] = from[2p][j], from[2p + 1][j].
void pack_pairs(uint32_t* to, const uint16_t* from, long ld, long n, long k) {
  for (long p = 0; p < k / 2; p++) {
    const uint16_t *low = from + 2 * p * ld, *high = low + ld;
    long j = 0;
    for (; j + W <= n; j += W) {
      const vu both = pairs(low + j, high + j);
      memcpy(to + p * n + j, &both, sizeof both);
    }
    for (; j < n; j++) to[p * n + j] = pair(low[j], high[j]);
  }
}

// to[j][p] = from[2p][j], from[2p + 1][j]: rows become columns.
void transpose(uint32_t* to, const uint16_t* from, long ld, long n, long k) {
  transpose_pairs(
      to, k / 2, n, k / 2,
      [&](long j, long p) { return (vi)pairs(from + 2 * p * ld + j, from + (2 * p + 1) * ld + j); },
      [&](long j, long p) { return pair(from[2 * p * ld + j], from[(2 * p + 1) * ld + j]); });
}

// Calls f(i) for all i < count; false if oneDNN refused, which leaves results unfinished.
template <class F>
bool parallel(const Product& p, long count, F f) {
  std::atomic<bool> fine{true};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (long i = 0; i < count; i++) {
      try {
        f(i);
      } catch (...) {
        fine = false;
      }
    }
    p.release(true);
  }
  return fine;
}

long blocks(long size, long block) { return (size + block - 1) / block; }

}  // namespace

extern "C" {

// c[m, n] = a[m, k] b[n, k]^T, as the transpose of b a^T: `b` is the weight and much larger, so that `a` is packed.
int product_nt(const Product* given) {
  const Product& p = *given;
  const long even = p.k / 2 * 2, tiles = blocks(p.m, COLUMNS);
  Buffer packed(even * tiles * COLUMNS * 2);
  bool fine = parallel(p, tiles, [&](long block) {
    const long i = block * COLUMNS, m = std::min(COLUMNS, p.m - i);
    pack_transposed(packed.pairs() + i * (even / 2), p.a + i * p.lda, p.lda, m, even);
  });
  return !(fine && parallel(p, blocks(p.n, ROWS), [&](long block) {
    const long j = block * ROWS, n = std::min(ROWS, p.n - j);
    Buffer result(n * COLUMNS * 4);
    for (long i = 0; i < p.m; i += COLUMNS) {
      const long m = std::min(COLUMNS, p.m - i);
      float* c = p.c + i * p.ldc + j;
      for (long k = 0; k < even; k += LONG_INNER) {
        const long terms = std::min(LONG_INNER, even - k);
        tile(p, p.b + j * p.ldb + k, p.ldb, packed.pairs() + i * (even / 2) + k / 2 * m, (float*)result.data, m, n, m,
             terms, k > 0);
      }
      const uint32_t* from = result.pairs();
      if (even)
        transpose_pairs(
            (uint32_t*)c, p.ldc, m, n, [&](long p, long j) { return load_as<vi>(from + j * m + p); },
            [&](long p, long j) { return from[j * m + p]; });
      if (even < p.k)
        last_term(c, p.ldc, p.a + i * p.lda + even, p.lda, p.b + j * p.ldb + even, p.ldb, m, n, even > 0);
    }
  }));
}

// c[m, n] = a[m, k] b[k, n]
int product_nn(const Product* given) {
  const Product& p = *given;
  const long even = p.k / 2 * 2, tiles = blocks(p.n, COLUMNS);
  Buffer packed(std::min(even, INNER) * tiles * COLUMNS * 2);
  bool fine = true, add = p.add;
  for (long k = 0; k < p.k && fine; k += INNER, add = true) {  // the outer loop, so that `a` is read once
    const long terms = std::min(INNER, even - k);
    const long strips = blocks(terms / 2, STRIP);
    fine = parallel(p, strips, [&](long strip) {
      const long first = strip * STRIP, count = std::min(STRIP, terms / 2 - first);
      for (long i = first; i < first + count; i++)
        for (long j = 0; j < p.n; j += COLUMNS) {
          const long n = std::min(COLUMNS, p.n - j);
          pack_pairs(packed.pairs() + j * (terms / 2) + i * n, p.b + (k + 2 * i) * p.ldb + j, p.ldb, n, 2);
        }
    });
    fine = fine && parallel(p, tiles, [&](long block) {
      const long j = block * COLUMNS, n = std::min(COLUMNS, p.n - j);
      if (terms > 0)
        tile(p, p.a + k, p.lda, packed.pairs() + j * (terms / 2), p.c + j, p.ldc, p.m, n, terms, add);
      if (even < p.k && k + INNER >= p.k)
        last_term(p.c + j, p.ldc, p.a + even, p.lda, p.b + even * p.ldb + j, 1, p.m, n, add || terms > 0);
    });
  }
  return !fine;
}

// c[m, n] = a[k, m]^T b[k, n]
int product_tn(const Product* given) {
  const Product& p = *given;
  const long even = p.k / 2 * 2, tiles = blocks(p.n, COLUMNS);
  Buffer packed(even * tiles * COLUMNS * 2);  // all of b, as every block of rows needs it
  bool fine = parallel(p, tiles, [&](long block) {
    const long j = block * COLUMNS, n = std::min(COLUMNS, p.n - j);
    pack_pairs(packed.pairs() + j * (even / 2), p.b + j, p.ldb, n, even);
  });
  return !(fine && parallel(p, blocks(p.m, ROWS), [&](long block) {
    const long i = block * ROWS, m = std::min(ROWS, p.m - i);
    Buffer buffer(std::min(even, INNER) * m * 2);
    float* c = p.c + i * p.ldc;
    bool add = p.add;
    for (long k = 0; k < even; k += INNER, add = true) {
      const long terms = std::min(INNER, even - k);
      transpose(buffer.pairs(), p.a + k * p.lda + i, p.lda, m, terms);
      for (long j = 0; j < p.n; j += COLUMNS) {
        const long n = std::min(COLUMNS, p.n - j);
        tile(p, (const uint16_t*)buffer.data, terms, packed.pairs() + j * (even / 2) + k / 2 * n, c + j, p.ldc, m, n,
             terms, add);
      }
    }
    if (even < p.k) last_term(c, p.ldc, p.a + even * p.lda + i, 1, p.b + even * p.ldb, 1, m, p.n, add);
  }));
}

}  // extern "C"

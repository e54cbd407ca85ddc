// What reverse_kl_sm90.cu does, one thread after the other on a CPU, with the same functions and in the same order.
#include <algorithm>
#include <vector>

#include "one_read.h"

using namespace one_read;

namespace {

constexpr int kCluster = 4, kThreads = 512, kWarps = kThreads / 32;

Sums over_warp(std::vector<Sums> lanes, float bits) {
  for (int step = 16; step; step >>= 1) {
    std::vector<Sums> next(32);
    for (int lane = 0; lane < 32; ++lane) next[lane] = merged(lanes[lane], lanes[lane ^ step], bits);
    lanes = next;
  }
  return lanes[0];
}

void load(const uint16_t* at, float (&values)[kColumns]) {
  uint32_t words[4];
  std::memcpy(words, at, sizeof words);
  unpack(words, values);
}

Sums over_block(const uint16_t* z_row, const uint16_t* t_row, int count, float bits) {
  std::vector<Sums> warps(32, none());
  for (int warp = 0; warp < kWarps; ++warp) {
    std::vector<Sums> lanes(32, none());
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = warp * 32 + lane; i < count; i += kThreads) {
        float z[kColumns], t[kColumns];
        load(z_row + i * kColumns, z);
        load(t_row + i * kColumns, t);
        lanes[lane] = with_columns(lanes[lane], z, t, bits);
      }
    }
    warps[warp] = over_warp(lanes, bits);
  }
  return over_warp(warps, bits);
}

}  // namespace

extern "C" int one_read_launch(const uint16_t* student, const uint16_t* teacher, uint16_t* out, const float* upstream,
                               float* sums, int rows, int columns, long stride_student, long stride_teacher,
                               long stride_gradient, float bits, int, void*) {
  const int vectors = columns / kColumns, share = (vectors + kCluster - 1) / kCluster;
  for (long row = 0; row < rows; ++row) {
    const uint16_t *z_row = student + row * stride_student, *t_row = teacher + row * stride_teacher;
    Sums s = none();
    for (int rank = 0; rank < kCluster; ++rank) {
      const int first = rank * share, count = std::max(0, std::min(share, vectors - first));
      const Sums block = over_block(z_row + first * kColumns, t_row + first * kColumns, count, bits);
      s = rank ? merged(s, block, bits) : block;
    }
    const float nats = bits * kLn2, values[6] = {s.m * nats, s.Z, s.n * nats, s.F, s.D * kLn2, s.A * kLn2};
    for (int k = 0; k < 6; ++k) sums[k * rows + row] = values[k];
    if (!out) continue;
    const Slope r = slope(s, upstream[row], bits);
    for (int i = 0; i < columns; i += kColumns) {
      float z[kColumns], t[kColumns];
      load(z_row + i, z);
      load(t_row + i, t);
      for (int j = 0; j < kColumns; j += 2) {
        const uint32_t word = upstream[row] == 0.f ? 0 : pack(gradient(r, z[j], t[j]), gradient(r, z[j + 1], t[j + 1]));
        std::memcpy(out + row * stride_gradient + i + j, &word, sizeof word);
      }
    }
  }
  return 0;
}

extern "C" int scale_rows_launch(uint16_t* values, const float* factors, int rows, int columns, long stride, int,
                                 void*) {
  for (long row = 0; row < rows; ++row) {
    for (int i = 0; i < columns && factors[row] != 1.f; i += 2) {
      uint16_t* at = values + row * stride + i;
      const uint32_t word = pack(as_float(at[0] << 16) * factors[row], as_float(at[1] << 16) * factors[row]);
      std::memcpy(at, &word, sizeof word);
    }
  }
  return 0;
}

extern "C" const char* error_text(int) { return "refused"; }

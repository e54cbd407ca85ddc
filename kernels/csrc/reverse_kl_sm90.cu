// Reverse KL and its gradient in one read of the logits (bf16, the whole vocabulary on one rank, sm_90a).
//
// A cluster of 4 blocks holds one row of student and teacher in shared memory (152 KB a block at V = 151936), so that
// the gradient needs no second read: 6 bytes a column (read 2 + 2, write 2) where sums and gradient apart take 10.
// Blocks exchange their sums through distributed shared memory, and each adds them up in the order of their ranks.
//
// As in partials.py: m = max z, n = max t, x = z - m, y = t - n, Z = sum e^x, F = sum (e^y - e^x), D = sum e^x (x - y),
// A = sum e^x x;  KL = D/Z + log1p(F/Z);  dz_j = g p_j ((x - y) - D/Z), p_j = e^x / Z. x and y are kept in bits.
// -inf logits are read as -1e30. Columns must be a multiple of 8 and rows start at multiples of 16 bytes.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

constexpr int kCluster = 4;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr float kNegative = -1e30f;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Sums {
  float m, Z, n, F, D, A;  // D and A in bits
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same sums about new maxima.
__device__ __forceinline__ Sums recentred(const Sums& s, float m, float n) {
  const float dm = (s.m - m) * kLog2e, dn = (s.n - n) * kLog2e;
  const float a = exp2_fast(dm), b = exp2_fast(dn);
  return {m, a * s.Z, n, b * s.F + (b - a) * s.Z, a * (s.D + (dm - dn) * s.Z), a * (s.A + dm * s.Z)};
}

__device__ __forceinline__ Sums merged(const Sums& left, const Sums& right) {
  const float m = fmaxf(left.m, right.m), n = fmaxf(left.n, right.n);
  const Sums l = recentred(left, m, n), r = recentred(right, m, n);
  return {m, l.Z + r.Z, n, l.F + r.F, l.D + r.D, l.A + r.A};
}

__device__ __forceinline__ Sums merged_over_warp(Sums s) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) {
    const unsigned all = 0xffffffffu;
    const Sums other = {__shfl_xor_sync(all, s.m, lane), __shfl_xor_sync(all, s.Z, lane),
                        __shfl_xor_sync(all, s.n, lane), __shfl_xor_sync(all, s.F, lane),
                        __shfl_xor_sync(all, s.D, lane), __shfl_xor_sync(all, s.A, lane)};
    s = merged(s, other);
  }
  return s;
}

__device__ __forceinline__ void copy16(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global));
}

// 8 bf16 -> fp32, -inf as kNegative: the maximum of a pair is one instruction.
__device__ __forceinline__ void unpack(uint4 packed, float* values) {
  const __nv_bfloat162 low = __float2bfloat162_rn(kNegative);
  const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __hmax2(*reinterpret_cast<const __nv_bfloat162*>(&words[i]), low);
    const unsigned word = *reinterpret_cast<const unsigned*>(&pair);
    values[2 * i] = __uint_as_float(word << 16);
    values[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
  }
}

__device__ __forceinline__ Sums with_columns(Sums s, const float* z, const float* t) {
  float m = s.m, n = s.n;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    m = fmaxf(m, z[j]);
    n = fmaxf(n, t[j]);
  }
  s = recentred(s, m, n);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float x = (z[j] - m) * kLog2e, y = (t[j] - n) * kLog2e;
    const float e = exp2_fast(x);
    s.Z += e;
    s.F += exp2_fast(y) - e;
    s.D += e * (x - y);
    s.A += e * x;
  }
  return s;
}

// Of all blocks of the cluster, equal to the bit in each.
__device__ __forceinline__ Sums merged_over_cluster(cg::cluster_group& cluster, Sums s, Sums* of_warps, Sums* of_block) {
  s = merged_over_warp(s);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    const Sums none = {kNegative, 0.f, kNegative, 0.f, 0.f, 0.f};
    s = merged_over_warp(threadIdx.x < kWarps ? of_warps[threadIdx.x] : none);
    if (threadIdx.x == 0) *of_block = s;
  }
  cluster.sync();
  Sums row = *cluster.map_shared_rank(of_block, 0);
  for (int rank = 1; rank < kCluster; ++rank) row = merged(row, *cluster.map_shared_rank(of_block, rank));
  cluster.sync();  // no block may leave while another still reads its sums
  return row;
}

// Grid: 4 blocks a row. student, teacher [rows, columns] -> gradient (may be student) = upstream * dKL/dz, and
// sums [6, rows] = m, Z, n, F, D, A in nats. Dynamic shared memory: 2 * 16 * ceil(columns / 32) bytes.
extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    reverse_kl_one_read(const __nv_bfloat16* student, const __nv_bfloat16* teacher, __nv_bfloat16* gradient,
                        const float* upstream, float* sums, int rows, int columns, long stride_student,
                        long stride_teacher, long stride_gradient) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Sums of_warps[kWarps], of_block;
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank();
  const long row = blockIdx.x / kCluster;
  const int vectors = columns / 8, share = (vectors + kCluster - 1) / kCluster;
  const int first = rank * share, count = max(0, min(share, vectors - first));
  uint4 *zs = reinterpret_cast<uint4*>(memory), *ts = zs + share;
  const uint4* z_row = reinterpret_cast<const uint4*>(student + row * stride_student) + first;
  const uint4* t_row = reinterpret_cast<const uint4*>(teacher + row * stride_teacher) + first;
  uint4* out = reinterpret_cast<uint4*>(gradient + row * stride_gradient) + first;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    copy16(zs + i, z_row + i);
    copy16(ts + i, t_row + i);
  }
  // A thread reads back what it has copied itself: no barrier is needed.
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  Sums s = {kNegative, 0.f, kNegative, 0.f, 0.f, 0.f};
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float z[8], t[8];
    unpack(zs[i], z);
    unpack(ts[i], t);
    s = with_columns(s, z, t);
  }
  s = merged_over_cluster(cluster, s, of_warps, &of_block);
  if (rank == 0 && threadIdx.x == 0) {
    const float values[6] = {s.m, s.Z, s.n, s.F, s.D * kLn2, s.A * kLn2};
    for (int k = 0; k < 6; ++k) sums[static_cast<long>(k) * rows + row] = values[k];
  }
  // dz_j = g p_j (log p_j - log q_j - KL), where log p_j - log q_j - KL = (x - y) - D/Z.
  const float mean = s.D / s.Z, scale = upstream[row] * kLn2 / s.Z;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float z[8], t[8];
    unpack(zs[i], z);
    unpack(ts[i], t);
    unsigned words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float dz[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float x = (z[2 * j + k] - s.m) * kLog2e, y = (t[2 * j + k] - s.n) * kLog2e;
        dz[k] = scale * exp2_fast(x) * ((x - y) - mean);
      }
      const __nv_bfloat162 pair = __floats2bfloat162_rn(dz[0], dz[1]);
      words[j] = *reinterpret_cast<const unsigned*>(&pair);
    }
    out[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

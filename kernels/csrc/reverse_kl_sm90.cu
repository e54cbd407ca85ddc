// Reverse KL and its gradient in one read of the logits (bf16, the whole vocabulary on one rank, sm_90a).
//
// A cluster of 4 blocks holds one row of student and teacher in shared memory (152 KB a block at V = 151936), so that
// the gradient needs no second read: 6 bytes a column (read 2 + 2, write 2) where sums and gradient apart take 10.
// Blocks exchange their sums through distributed shared memory, and each adds them up in the order of their ranks.
// The arithmetic is in one_read.h. Columns must be a multiple of 8 and rows start at multiples of 16 bytes.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "one_read.h"

namespace cg = cooperative_groups;
using namespace one_read;

constexpr int kCluster = 4;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ Sums merged_over_warp(Sums s, float bits) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) {
    const unsigned all = 0xffffffffu;
    const Sums other = {__shfl_xor_sync(all, s.m, lane), __shfl_xor_sync(all, s.Z, lane),
                        __shfl_xor_sync(all, s.n, lane), __shfl_xor_sync(all, s.F, lane),
                        __shfl_xor_sync(all, s.D, lane), __shfl_xor_sync(all, s.A, lane)};
    s = merged(s, other, bits);
  }
  return s;
}

__device__ __forceinline__ void copy16(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global));
}

__device__ __forceinline__ void load(const uint4& packed, float (&values)[kColumns]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  unpack(words, values);
}

// Of all blocks of the cluster, equal to the bit in each.
__device__ __forceinline__ Sums merged_over_cluster(cg::cluster_group& cluster, Sums s, Sums* of_warps, Sums* of_block,
                                                    float bits) {
  s = merged_over_warp(s, bits);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = merged_over_warp(threadIdx.x < kWarps ? of_warps[threadIdx.x] : none(), bits);
    if (threadIdx.x == 0) *of_block = s;
  }
  cluster.sync();
  Sums row = *cluster.map_shared_rank(of_block, 0);
  for (int rank = 1; rank < kCluster; ++rank) row = merged(row, *cluster.map_shared_rank(of_block, rank), bits);
  cluster.sync();  // no block may leave while another still reads its sums
  return row;
}

// Grid: 4 blocks a row. student, teacher [rows, columns] -> gradient (may be student, or null for none) =
// upstream * dKL/dz, zeros where upstream is 0, and sums [6, rows] = m, Z, n, F, D, A in nats of the logits over the
// temperature. Dynamic shared memory: 2 * 16 * ceil(columns / 32) bytes.
extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)
    reverse_kl_one_read(const __nv_bfloat16* student, const __nv_bfloat16* teacher, __nv_bfloat16* gradient_rows,
                        const float* upstream, float* sums, int rows, int columns, long stride_student,
                        long stride_teacher, long stride_gradient, float bits) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Sums of_warps[kWarps], of_block;
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank();
  const long row = blockIdx.x / kCluster;
  const int vectors = columns / kColumns, share = (vectors + kCluster - 1) / kCluster;
  const int first = rank * share, count = max(0, min(share, vectors - first));
  uint4 *zs = reinterpret_cast<uint4*>(memory), *ts = zs + share;
  const uint4* z_row = reinterpret_cast<const uint4*>(student + row * stride_student) + first;
  const uint4* t_row = reinterpret_cast<const uint4*>(teacher + row * stride_teacher) + first;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    copy16(zs + i, z_row + i);
    copy16(ts + i, t_row + i);
  }
  // A thread reads back what it has copied itself: no barrier is needed.
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  Sums s = none();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float z[kColumns], t[kColumns];
    load(zs[i], z);
    load(ts[i], t);
    s = with_columns(s, z, t, bits);
  }
  s = merged_over_cluster(cluster, s, of_warps, &of_block, bits);
  if (rank == 0 && threadIdx.x == 0) {
    const float nats = bits * kLn2, values[6] = {s.m * nats, s.Z, s.n * nats, s.F, s.D * kLn2, s.A * kLn2};
    for (int k = 0; k < 6; ++k) sums[static_cast<long>(k) * rows + row] = values[k];
  }
  if (gradient_rows == nullptr) return;
  uint4* out = reinterpret_cast<uint4*>(gradient_rows + row * stride_gradient) + first;
  if (upstream[row] == 0.f) {
    for (int i = threadIdx.x; i < count; i += kThreads) out[i] = make_uint4(0, 0, 0, 0);
    return;
  }
  const Slope r = slope(s, upstream[row], bits);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    float z[kColumns], t[kColumns];
    load(zs[i], z);
    load(ts[i], t);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      words[j] = pack(gradient(r, z[2 * j], t[2 * j]), gradient(r, z[2 * j + 1], t[2 * j + 1]));
    }
    out[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Rows times their factor; rows whose factor is 1 are not touched. Grid: a block a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    scale_rows(__nv_bfloat16* values, const float* factors, int columns, long stride) {
  const float factor = factors[blockIdx.x];
  if (factor == 1.f) return;
  uint4* row = reinterpret_cast<uint4*>(values + blockIdx.x * stride);
  for (int i = threadIdx.x; i < columns / kColumns; i += kThreads) {
    const uint4 packed = row[i];
    float v[kColumns];
    load(packed, v);
    for (int j = 0; j < kColumns; ++j) v[j] = factor == 0.f ? 0.f : v[j] * factor;
    row[i] = make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
  }
}

// What Python calls. Both return a cudaError_t; 0 is success, and says that the launch was accepted.
extern "C" int one_read_launch(const void* student, const void* teacher, void* gradient_rows, const float* upstream,
                               float* sums, int rows, int columns, long stride_student, long stride_teacher,
                               long stride_gradient, float bits, int device, void* stream) {
  const int bytes = 2 * 16 * ((columns / kColumns + kCluster - 1) / kCluster);
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(reverse_kl_one_read, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (status != cudaSuccess) return status;
  reverse_kl_one_read<<<rows * kCluster, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const __nv_bfloat16*>(student), static_cast<const __nv_bfloat16*>(teacher),
      static_cast<__nv_bfloat16*>(gradient_rows), upstream, sums, rows, columns, stride_student, stride_teacher,
      stride_gradient, bits);
  return cudaGetLastError();
}

extern "C" int scale_rows_launch(void* values, const float* factors, int rows, int columns, long stride, int device,
                                 void* stream) {
  const cudaError_t status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  scale_rows<<<rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<__nv_bfloat16*>(values), factors,
                                                                       columns, stride);
  return cudaGetLastError();
}

extern "C" const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

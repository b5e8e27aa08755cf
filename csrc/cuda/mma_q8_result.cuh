// SPDX-License-Identifier: MIT
// From sums in the registers of a thread block to a tile of y, for both int8 tensor-core kernels.
#pragma once
#include "memory.cuh"
#include "mma_q8_stage.cuh"

namespace quantgemm::mma_q8 {

// The first kThreads of a block wait for each other.
template <int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// y's tile, by way of shared memory [token][row], so that a warp writes whole lines.
template <class Out, class L>
__device__ __forceinline__ void store_tile(const GemmArgs& args, const float* staged, int64_t first_row,
                                           int64_t first_token, float factor) {
  constexpr int kVector = kPerVector<Out>, kPerToken = L::kRows / kVector, kStride = L::kOutStride;
  Out* y = static_cast<Out*>(args.y);
  const bool aligned = args.n % kVector == 0;
  for (int i = threadIdx.x; i < L::kTokens * kPerToken; i += L::kThreads) {
    const int64_t token = first_token + i / kPerToken, row = first_row + i % kPerToken * kVector;
    if (token >= args.m || row >= args.n) continue;
    const float* from = staged + i / kPerToken * kStride + i % kPerToken * kVector;
    float v[kVector];
    for (int j = 0; j < kVector; ++j) v[j] = from[j] * factor;
    Out* to = y + token * args.n + row;
    if (aligned) {
      store_vector(to, v);
    } else {
      for (int j = 0; j < kVector; ++j)
        if (row + j < args.n) store1(to + j, v[j]);
    }
  }
}

// Adds up a tile that several blocks hold parts of. Returns whether this block is the last, which
// then has the sum, taken in the order of k whoever is last.
template <class L>
__device__ __forceinline__ bool combine(float* own, const Work& work, int64_t tile, bool from_zero) {
  constexpr int kVectors = L::kSumVectors, kThreads = L::kThreads;
  const auto slot = [&](int64_t block, bool head) {
    return work.partials + (2 * block + head) * (kVectors * kThreads) + threadIdx.x;
  };
  float4* mine = slot(blockIdx.x, from_zero);
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    __stcg(mine + i * kThreads, make_float4(own[4 * i], own[4 * i + 1], own[4 * i + 2], own[4 * i + 3]));
  __threadfence();  // the part is visible before it is counted
  sync_threads<kThreads>();
  __shared__ bool is_last;
  const int64_t unit = tile * work.tile_units;
  const int64_t first = work.owner(unit), last = work.owner(unit + work.tile_units - 1);
  if (threadIdx.x == 0) is_last = atomicAdd(work.arrivals + tile, 1) == last - first;
  sync_threads<kThreads>();
  if (!is_last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < 4 * kVectors; ++i) own[i] = 0;
  for (int64_t block = first; block <= last; ++block) {
    const float4* part = slot(block, block == first);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float4 v = __ldcg(part + i * kThreads);
      own[4 * i] += v.x, own[4 * i + 1] += v.y, own[4 * i + 2] += v.z, own[4 * i + 3] += v.w;
    }
  }
  return true;
}

// The same for the type that y has.
template <class L>
__device__ __forceinline__ void store_staged(const GemmArgs& args, const float* staged, int64_t first_row,
                                             int64_t first_token, float factor) {
  __syncthreads();
  switch (args.type) {
    case Real::kFloat32: store_tile<float, L>(args, staged, first_row, first_token, factor); break;
    case Real::kFloat16: store_tile<Half, L>(args, staged, first_row, first_token, factor); break;
    case Real::kBFloat16: store_tile<BFloat16, L>(args, staged, first_row, first_token, factor); break;
  }
  __syncthreads();  // before the next tile's copies arrive where this one's results lay
}

}  // namespace quantgemm::mma_q8

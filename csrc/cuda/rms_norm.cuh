// SPDX-License-Identifier: MIT
// The RMS norm of a row, y = weight · rounded(x / root(mean(x²) + eps)), in pieces for the kernels that have
// it: one of its own (layer_steps.cu) and the products that have it inside (gemv_packed_stage.cuh). In the
// first thread t of 512 adds the squares of units t, t + 512, …; a unit is eight values of 32 columns, four
// pairs eight columns apart. Lanes of 32 are added up as a butterfly, then their sixteen sums.
#pragma once
#include "memory.cuh"

namespace quantgemm::rms {

constexpr int kThreads = 512, kWarps = kThreads / 32;

__device__ __forceinline__ int64_t num_units(int64_t cols) { return (cols + 31) / 32 * 4; }
template <class Index>
__device__ __forceinline__ Index first_col(Index unit) {
  return 8 * (unit & ~3) + 2 * (unit % 4);
}

__device__ __forceinline__ void add_squares(float& sum, float low, float high) {
  sum = __fmaf_rn(high, high, __fmaf_rn(low, low, sum));
}
__device__ __forceinline__ void add_squares(float& sum, const float* pair) {
  const float2 values = *reinterpret_cast<const float2*>(pair);
  add_squares(sum, values.x, values.y);
}
template <class Real16>
__device__ __forceinline__ float half_of(uint32_t pair, int i) {
  return to_float(Real16{static_cast<uint16_t>(pair >> (16 * i))});
}
template <class Real16>
__device__ __forceinline__ void add_squares(float& sum, const Real16* pair) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(pair);
  add_squares(sum, half_of<Real16>(word, 0), half_of<Real16>(word, 1));
}

__device__ __forceinline__ float sum_of_lanes(float sum) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Of the sums of the warps. Every thread adds up all: it waits for them once.
__device__ __forceinline__ float sum_of_warps(const float* of_warps) {
  float sums[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sums[w] = of_warps[w];
#pragma unroll
  for (int step = kWarps / 2; step > 0; step /= 2)
#pragma unroll
    for (int w = 0; w < step; ++w) sums[w] += sums[w + step];
  return sums[0];
}

__device__ __forceinline__ float factor_of(float sum, int64_t cols, float eps) {
  return rsqrtf(__fadd_rn(sum / static_cast<float>(cols), eps));
}

template <class T>
__device__ __forceinline__ float rounded(float x) {
  T stored;
  store1(&stored, x);
  return to_float(stored);
}

// Rounded before the product with weight, and by whoever stores it.
template <class T>
__device__ __forceinline__ float normalized(float x, float weight, float factor) {
  return __fmul_rn(weight, rounded<T>(__fmul_rn(x, factor)));
}

}  // namespace quantgemm::rms

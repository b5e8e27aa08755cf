// SPDX-License-Identifier: MIT
// What the two kernels of the dp4a rung share, and how their launcher calls them.
// A group's integer product becomes a float without a conversion: the accumulator of dp4a starts at
// the bits of 1.5 · 2^23, whose low mantissa bits count in ones, so that
//     float(bits + n) − 1.5 · 2^23 = n   exactly, for |n| < 2^22.
// 32 products of signed bytes stay below 2^19. Formats that store q + zero start at −zero · Σ q_a.
#pragma once
#include "../formats/activation.h"
#include "../formats/gguf_formats.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm::dp4a {

constexpr int kGroup = ActivationRow::kGroup;
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

template <class F>
inline constexpr bool kServes = BlockFormat<F> && F::kElems % kGroup == 0;

// Neighbouring weights that share a scale, an offset and a group of activations.
template <BlockFormat F>
inline constexpr int kPart = F::kGroup < kGroup ? F::kGroup : kGroup;

__device__ __forceinline__ int dot4(uint32_t a, uint32_t b, int sum) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

// The same for codes of 0…255.
__device__ __forceinline__ int dot4_unsigned(uint32_t a, uint32_t b, int sum) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  return sum;
}

__device__ __forceinline__ void store_real(void* y, int64_t i, float value, Real type) {
  const uint16_t half = type == Real::kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
  if (type == Real::kFloat32)
    static_cast<float*>(y)[i] = value;
  else
    static_cast<uint16_t*>(y)[i] = half;
}

// For m up to Tokens: 1, 2, 4 or 8, each compiled in a file of its own.
template <int Tokens>
cudaError_t launch_few_tokens(const GemmArgs& args, cudaStream_t stream);
cudaError_t launch_tiles(const GemmArgs& args, cudaStream_t stream);

}  // namespace quantgemm::dp4a

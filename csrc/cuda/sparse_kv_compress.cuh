// SPDX-License-Identifier: MIT
// What sparse_kv_compress does with the values of a tile: their extremes and bits, then their codes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kv.h"
#include "memory.cuh"

namespace quantgemm {

template <class Real16>
using Pair = std::conditional_t<std::is_same_v<Real16, Half>, __half2, __nv_bfloat162>;

// Two tiles' values, or two values of a tile, side by side: what is set, and the extremes of that.
template <class Real16>
struct PairScan {
  // Not a number: as an operand of minimum and maximum it yields to the other one.
  uint32_t lo = ~0u, hi = ~0u, finite = 0;

  // The halves of the mask say which values are set.
  __device__ __forceinline__ uint32_t add(uint32_t values) {
    using P = Pair<Real16>;
    const uint32_t mask = __hneu2_mask(bit_cast<P>(values), bit_cast<P>(0u)), others = values | ~mask;
    lo = bit_cast<uint32_t>(__hmin2(bit_cast<P>(lo), bit_cast<P>(others)));
    hi = bit_cast<uint32_t>(__hmax2(bit_cast<P>(hi), bit_cast<P>(others)));
    finite = bit_cast<uint32_t>(__hfma2(bit_cast<P>(values), bit_cast<P>(0u), bit_cast<P>(finite)));
    return mask;  // finite: 0, or NaN
  }
};

// round(x / scale) + zero, held in 0 … 2^bits - 1, without a division.
template <class Real16>
struct Coder {
  static constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23 + an integer is a float in steps of 1
  static constexpr float kCoarse = 768.0f;      // and this is in steps of 2^-14
  float scale, inverse, zero;
  int top, shift;
  bool is_plain;

  __device__ Coder(TileFit<Real16> fit, int bits)
      : scale(value_of(fit.scale)),
        inverse(1.0f / scale),
        zero(value_of(fit.zero)),
        top((1 << bits) - 1),
        shift(static_cast<int>(zero) - bit_cast<int>(kMagic)),
        is_plain(fabsf(scale) > 1e-30f && fabsf(scale) < 1e30f && fabsf(zero) <= 128.0f) {}

  // The quotient of two halves (or bfloat16) is half an integer or at least 2^-13 away from that, which the
  // product is too after its rounding to 2^-14; so both have the same nearest integer (tried all).
  __device__ __forceinline__ uint32_t plain_code(Real16 stored) const {
    const float ratio = fmaf(value_of(stored), inverse, kCoarse) + (kMagic - kCoarse);
    return static_cast<uint32_t>(__viaddmin_s32_relu(bit_cast<int>(ratio), shift, top));
  }
  __device__ __forceinline__ uint32_t code(Real16 stored) const {
    return code_of(value_of(stored), scale, zero, top == 3 ? 2 : 4);
  }
};

// The halves' bits side by side: bit b of the lower half becomes bit 2b + 1, of the upper one bit 2b.
__device__ __forceinline__ uint32_t interleave_halves(uint32_t x) {
  x = __byte_perm(x, 0u, 0x1302);
  const auto exchange = [&](int step, uint32_t moved) {
    const uint32_t t = (x ^ x >> step) & moved;
    x = x ^ t ^ t << step;
  };
  exchange(4, 0x00f000f0u), exchange(2, 0x0c0c0c0cu), exchange(1, 0x22222222u);
  return x;
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// A group of activations to int8 by four neighbouring lanes, eight values each: the one way in which
// kernels quantise them, so that all find the same integers (formats/activation.h has the CPU's).
#pragma once
#include "../formats/activation.h"
#include "memory.cuh"

namespace quantgemm {

struct EightActivations {
  uint32_t codes[2];
  int sum;      // of these eight
  float scale;  // of the group
};

// Groups are whole: all four lanes call this, and all other lanes of their warp.
__device__ __forceinline__ EightActivations quantize_eight(const float (&v)[8]) {
  uint32_t largest = 0;  // as bits: magnitudes in order, and NaN above them all
#pragma unroll
  for (int j = 0; j < 8; ++j) largest = max(largest, __float_as_uint(v[j]) & 0x7fffffffu);
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, lane));
  EightActivations eight{{0, 0}, 0, activation_scale(__uint_as_float(largest))};
  const float inverse = inverse_activation_scale(eight.scale);
  // activation_code() without branches: the low byte of such a float is the code. Where the scale has all its
  // bits, no |q| is above 127.0001, which rounds to 127; else q may be larger, or NaN.
  const bool plain = eight.scale > 1e-30f && eight.scale < 1e38f;
  uint32_t bits[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) bits[j] = __float_as_uint(__fmul_rn(v[j], inverse) + 12582912.0f);
  if (!plain) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float q = __fmul_rn(v[j], inverse), inside = fminf(fmaxf(q, -127.0f), 127.0f);
      bits[j] = __float_as_uint((q == q ? inside : 0.0f) + 12582912.0f);
    }
  }
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const uint32_t* four = bits + 4 * w;
    eight.codes[w] =
        __byte_perm(__byte_perm(four[0], four[1], 0x0040), __byte_perm(four[2], four[3], 0x0040), 0x5410);
    eight.sum = __dp4a(static_cast<int>(eight.codes[w]), 0x01010101, eight.sum);
  }
  return eight;
}

}  // namespace quantgemm

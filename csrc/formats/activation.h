// SPDX-License-Identifier: MIT
// An activation row quantised to int8 for integer dot products: per group of 32 values
//     x ≈ scale · q,   scale = max|x| / 127,   sum = scale · Σ q.
// The sum multiplies a weight's offset: Σ (s_w q_w + o_w)(s_a q_a) = s_w s_a Σ q_w q_a + o_w · sum.
// Both stay float32: a half overflows on large activations. NaN or infinity in a group makes its
// scale non-finite, so it reaches the product.
// Row: | cols × int8 | cols/32 × (scale f32, sum f32) | zeros to a multiple of 16 bytes |
#pragma once
#include "portable.h"

namespace quantgemm {

struct ActivationRow {
  static constexpr int kGroup = 32;
  QG_HD static constexpr int64_t scales_offset(int64_t cols) { return cols; }
  QG_HD static constexpr int64_t bytes(int64_t cols) { return (cols + cols / kGroup * 8 + 15) / 16 * 16; }
};

// The larger magnitude; NaN wins, and stays.
QG_HD float max_magnitude(float largest, float x) {
  const float magnitude = x < 0 ? -x : x;
  return magnitude > largest || magnitude != magnitude ? magnitude : largest;
}

// Processors disagree on the bits of a NaN; rows should be equal byte for byte.
QG_HD float canonical(float x) { return x == x ? x : bit_cast<float>(0x7fffffffu); }

QG_HD float activation_scale(float largest) { return canonical(largest / 127.0f); }
QG_HD float activation_sum(float scale, int sum) { return canonical(scale * static_cast<float>(sum)); }

// q = x / scale rounded to nearest even; 0 where scale is 0 or not finite.
QG_HD int activation_code(float x, float inverse_scale) {
  const float q = rounded_product(x, inverse_scale);
  if (!(q >= -127.0f && q <= 127.0f)) return q > 0 ? 127 : q < 0 ? -127 : 0;
  return bit_cast<int>(q + 12582912.0f) - 0x4b400000;  // 1.5 · 2^23: the adder rounds to integers
}

QG_HD float inverse_activation_scale(float scale) { return scale > 0 && scale < 1e38f ? 1.0f / scale : 0.0f; }

}  // namespace quantgemm

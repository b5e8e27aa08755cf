// SPDX-License-Identifier: MIT
// How what a sparse page keeps becomes codes, the same for CPU and CUDA. Layout is in kv_page.h.
//
//   group   one channel of 64 tokens for keys, one token for values; what is zero is not kept
//   value   level · scale, scale a half
//   2 bits  level ±1 or ±2: bit 0 of the code says 2, bit 1 minus
//   4 bits  level -8 … 7: the code in two's complement
#pragma once
#include "formats/portable.h"

namespace quantgemm {

// lo and hi: the smallest and the largest magnitude of the group, hi NaN if there is a NaN; sum and count of
// all of them. The level 1 a little below their mean costs attention less than the least squared error does
// (docs/sparse-kv.md). A group of one magnitude is exact, and what was packed before packs as it is.
QG_HD uint16_t fit_sparse_group(float lo, float hi, float sum, int count, int bits) {
  if (hi != hi) return 0x7fff;
  if (bits == 2) return float_to_half(hi <= 2.0f * lo ? lo : 0.875f * sum / static_cast<float>(count));
  return float_to_half(hi == lo ? lo : hi / 7.0f);
}

// Nothing is divided for an element and nothing fused: CPU and CUDA agree.
struct SparseCoder {
  float scale, factor;  // 2 bits: where level 2 begins; 4 bits: 1 / scale

  QG_HD SparseCoder(uint16_t fit, int bits)
      : scale(half_to_float(fit)), factor(bits == 2 ? 1.5f * scale : 1.0f / scale) {}

  QG_HD uint32_t code(float x, int bits) const {
    if (bits == 2) {
      const uint32_t pattern = bit_cast<uint32_t>(x);
      return (bit_cast<float>(pattern & 0x7fffffffu) > factor ? 1u : 0u) | (pattern >> 31) * 2u;
    }
    constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: sums with it are rounded to integers
    const float level = (rounded_product(x, factor) + kMagic) - kMagic;
    const float held = level < 7.0f ? (level > -8.0f ? level : -8.0f) : 7.0f;
    return static_cast<uint32_t>(static_cast<int>(held == held ? held : 0.0f)) & 15u;
  }
  QG_HD float value(uint32_t code, int bits) const {
    const int level = bits == 2 ? (code & 2 ? -1 : 1) * (code & 1 ? 2 : 1)
                                : static_cast<int>(code ^ 8u) - 8;
    return static_cast<float>(level) * scale;
  }
};

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// Codes of packed weights as A fragments of 16 columns: (code − zero) · 2^−kDown, exact, without a scale.
// Bits of a byte are a number as they are, of 2^−133 in bfloat16 and 2^−24 in a half: one multiply-add makes
// codes of them, which runs at twice the rate of the integer instructions that it replaces. Nothing here
// knows a format.
#pragma once
#include <bit>

#include "packed_tile.cuh"

namespace quantgemm::packed_few {

// Both halves: pair · factor + added. PTX ISA 9.7.4.4 (fma).
__device__ __forceinline__ uint32_t fma_pair(uint32_t pair, uint32_t factor, uint32_t added, Half) {
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(factor), "r"(added));
  return pair;
}
__device__ __forceinline__ uint32_t fma_pair(uint32_t pair, uint32_t factor, uint32_t added, BFloat16) {
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(factor), "r"(added));
  return pair;
}

template <PackableFormat F, class T>
struct Codes {
  using L = PackedLayout<F>;
  static constexpr bool kHalf = std::is_same_v<T, Half>;
  static constexpr bool kBytes = L::kBits == 8 || LevelFormat<F>;           // signed, else unsigned bits
  static constexpr int kUnit = kHalf ? 24 : 133, kMost = kHalf ? 15 : 127;  // the largest factor is 2^kMost
  static constexpr int kDown = kUnit - kMost + (L::kHighBits > 0 && !kBytes ? L::kLowBits : 0);

  // A number with few bits, twice.
  static constexpr uint32_t twice(float v) {
    const auto bits = std::bit_cast<uint32_t>(v);
    const uint32_t half = (bits >> 16 & 0x8000u) | (((bits >> 13 & 0x3ffffu) - (112u << 10)) & 0x7fffu);
    return (v == 0 ? 0 : kHalf ? half : bits >> 16) * 0x00010001u;
  }
  QG_HD static constexpr uint32_t power(int p) {
    return ((kHalf ? 15 : 127) + p) * (kHalf ? 0x04000400u : 0x00800080u);
  }
  static constexpr uint32_t kZero = twice(-static_cast<float>(kBytes ? 128 : kZeroOf<F>) / (1 << kDown));

  static __device__ __forceinline__ void make(const uint32_t* low, const uint32_t* high, int s,
                                              uint32_t (&a)[4]) {
    if constexpr (kBytes) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        uint32_t quad;
        if constexpr (L::kBits == 8)
          quad = low[2 * s + row];
        else
          quad = F::levels((low[s] >> (4 * row)) & 0x0f0f0f0fu);
        quad ^= 0x80808080u;
        a[row] = fma_pair(quad & 0x00ff00ffu, power(kMost), kZero, T{});
        a[row + 2] = fma_pair(__byte_perm(quad, 0, 0x4341), power(kMost), kZero, T{});
      }
    } else {
      using Low = PackedField<L::kLowBits>;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int bit = Low::bit(s, j), at = bit % 8;
        a[j] = fma_pair(low[Low::word(s, j)] >> (bit - at) & Low::kMask << at, power(kUnit - at - kDown),
                        kZero, T{});
        if constexpr (L::kHighBits > 0) {
          using High = PackedField<L::kHighBits>;
          const int high_bit = High::bit(s, j), high_at = high_bit % 8;
          a[j] = fma_pair(high[High::word(s, j)] >> (high_bit - high_at) & High::kMask << high_at,
                          power(kMost - high_at), a[j], T{});
        }
      }
    }
  }
};

}  // namespace quantgemm::packed_few

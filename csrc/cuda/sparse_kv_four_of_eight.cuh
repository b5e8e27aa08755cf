// SPDX-License-Identifier: MIT
// Products of a four of eight page's codes (kv_sparse_page.h). Its bits lie in planes, so one operation on
// words works on 32 groups: which code an element has is a choice by the counts of its neighbours, its
// level is a function of three or five bits, and the planes of the level are woven to nibbles, which are
// operands as they stand (see sparse_kv_codes.cuh).
#pragma once
#include "sparse_kv_codes.cuh"

namespace quantgemm {

// Bits of a where mask is set, of b elsewhere.
__device__ __forceinline__ uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) {
  return (mask & a) | (~mask & b);
}

template <int Bits>
struct FourOfEightCodes {
  static constexpr PageKind kKind = PageKind::kFourOfEight;
  static constexpr int kBits = Bits, kTableBytes = 0;
  static constexpr float kOffset = Bits == 2 ? 2.0f : 8.0f;
  static constexpr int kPlanes = 8 + 4 * Bits;

  static __device__ void make_table(uint32_t*) {}
  static __device__ constexpr float key_unit(int x) { return static_cast<float>(1 << (24 - x / 4 * 4)); }
  static __device__ constexpr float value_unit(int y) {
    return static_cast<float>(1 << (24 - y / 8 % 2 * 4));
  }

  uint32_t planes[kPlanes];
  // How many elements are set between this one and the end of the group that is nearer, [0] in the lower
  // half of a group: one; one or three of three, two or three of three; one or two of two, two of two.
  uint32_t odd3[2], two3[2], odd2[2], two2[2];

  // Of one set of 32 groups, with 64 channels of 16: Second is how far the second half of the planes is.
  template <int Second>
  __device__ __forceinline__ FourOfEightCodes(const uint8_t* from, std::integral_constant<int, Second>) {
    uint32_t words[Second ? kPlanes / 2 : kPlanes];
    load_words(words, from, 32);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p)
      planes[p] = !Second ? words[p] : p < kPlanes / 2 ? words[p] : words[p - kPlanes / 2] >> Second;
#pragma unroll
    for (int end = 0; end < 2; ++end) {
      const uint32_t a = planes[end ? 7 : 0], b = planes[end ? 6 : 1], c = planes[end ? 5 : 2];
      odd2[end] = a ^ b, two2[end] = a & b;
      odd3[end] = a ^ b ^ c, two3[end] = (a & b) | (a & c) | (b & c);
    }
  }

  // Bit b of the codes of elements i.
  __device__ __forceinline__ uint32_t code_bit(int i, int b) const {
    const int end = i / 4, n = end ? 7 - i : i;
    uint32_t code[4];
#pragma unroll
    for (int rank = 0; rank < 4; ++rank) code[rank] = planes[8 + (end ? 3 - rank : rank) * Bits + b];
    if (n == 0) return code[0];
    if (n == 1) return choose(planes[end ? 7 : 0], code[1], code[0]);
    if (n == 2) return choose(two2[end], code[2], choose(odd2[end], code[1], code[0]));
    return choose(two3[end], choose(odd3[end], code[3], code[2]), choose(odd3[end], code[1], code[0]));
  }

  // Level + kOffset of elements i: nibbles of words [bit % 4] at the bits' own places, with 2 bits
  // beside something in the highest bit.
  __device__ __forceinline__ void nibbles(uint32_t (&out)[4], int i) const {
    const uint32_t set = planes[i];
    uint32_t u[4] = {};
    if constexpr (Bits == 2) {
      const uint32_t large = code_bit(i, 0), negative = code_bit(i, 1);
      u[0] = set & ~large;
      u[1] = ~set | ~(negative | large);
      u[2] = set & ~negative & large;
    } else {
#pragma unroll
      for (int b = 0; b < 3; ++b) u[b] = set & code_bit(i, b);
      u[3] = ~(set & code_bit(i, 3));
    }
    constexpr uint32_t kEven = 0x55555555u, kLow = 0x33333333u;
    const uint32_t low[2] = {choose(kEven, u[0], u[1] << 1), choose(kEven, u[0] >> 1, u[1])};
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      uint32_t high_up, high;  // for bits 0, 1 and 2, 3 of each four
      if constexpr (Bits == 2) {
        high_up = u[2] << (2 - odd), high = odd ? u[2] >> 1 : u[2];
      } else {
        high = odd ? choose(kEven, u[2] >> 1, u[3]) : choose(kEven, u[2], u[3] << 1), high_up = high << 2;
      }
      out[odd] = choose(kLow, low[odd], high_up);
      out[2 + odd] = choose(kLow, low[odd] >> 2, high);
    }
  }
  // Of the nibbles at 0, 4, 8, 12 of each half the index-th as two halves.
  static __device__ __forceinline__ uint32_t operand(uint32_t nibbles, int index) {
    return (nibbles >> index / 2 * 8) & 0x10001u * (Bits == 2 ? 7u : 15u) << index % 2 * 4;
  }

  template <int Steps>
  static __device__ __forceinline__ void multiply_keys(float (&logits)[4][4], const uint8_t* page, int lane,
                                                       const uint32_t*, const uint32_t (&b)[Steps][2]) {
    constexpr int kInWord = Steps == 4 ? 1 : 2;  // of j
#pragma unroll
    for (int j = 0; j < Steps / 4; j += kInWord) {
      const FourOfEightCodes codes(page + 16 * lane + j / 2 * kPlanes / 4 * 512,
                                   std::integral_constant<int, kInWord == 1 ? 8 : 0>{});
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        uint32_t t[2][4];
        codes.nibbles(t[0], i), codes.nibbles(t[1], i + 1);
#pragma unroll
        for (int k = 0; k < kInWord; ++k)
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int x = 2 * m, at = x / 4 + 2 * k, s = i / 2 + 4 * (j + k);
            const uint32_t a[4] = {operand(t[0][x % 4], at), operand(t[0][x % 4 + 1], at),
                                   operand(t[1][x % 4], at), operand(t[1][x % 4 + 1], at)};
            mma_16x8x16(logits[m], a, b[s][0], b[s][1], Half{});
          }
      }
    }
  }
  template <int Tiles>
  static __device__ __forceinline__ void multiply_values(float (&out)[Tiles][4], const uint8_t* page,
                                                         int lane, const uint32_t*,
                                                         const uint32_t (&weights)[4][2]) {
    constexpr int kInWord = Tiles == 4 ? 1 : 2;
#pragma unroll
    for (int j = 0; j < Tiles / 4; j += kInWord) {
      const FourOfEightCodes codes(page + 16 * lane + j / 2 * kPlanes / 4 * 512,
                                   std::integral_constant<int, kInWord == 1 ? 4 : 0>{});
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        uint32_t t[2][4];
        codes.nibbles(t[0], i), codes.nibbles(t[1], i + 1);
#pragma unroll
        for (int k = 0; k < kInWord; ++k)
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            const int at = k + s / 2 * 2;
            const uint32_t a[4] = {operand(t[0][s % 2], at), operand(t[1][s % 2], at),
                                   operand(t[0][2 + s % 2], at), operand(t[1][2 + s % 2], at)};
            mma_16x8x16(out[i / 2 + 4 * (j + k)], a, weights[s][0], weights[s][1], Half{});
          }
      }
    }
  }
};

}  // namespace quantgemm

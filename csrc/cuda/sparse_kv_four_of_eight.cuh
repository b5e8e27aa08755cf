// SPDX-License-Identifier: MIT
// Products of a four of eight page's codes (kv_sparse_page.h). Its bits lie in planes, so one operation on
// words works on 32 groups: which code an element has is a choice by the counts of its neighbours, its
// level is a function of three or five bits, and the planes of the level are woven to words whose bits are
// operands as they stand (see sparse_kv_codes.cuh).
#pragma once
#include "sparse_kv_codes.cuh"

namespace quantgemm {

// Bits of a where mask is set, of b elsewhere; the compiler takes two operations. PTX ISA 9.7.8.6 (lop3).
__device__ __forceinline__ uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t rotate_right(uint32_t x, int by) { return __funnelshift_r(x, x, by); }

template <int Bits>
struct FourOfEightCodes {
  static constexpr PageKind kKind = PageKind::kFourOfEight;
  static constexpr int kBits = Bits, kTableBytes = 0;
  static constexpr float kOffset = Bits == 2 ? 2.0f : 8.0f;
  static constexpr int kPlanes = 8 + 4 * Bits;

  static __device__ void make_table(uint32_t*) {}
  // An element's level begins at its own bit, of the first eight or the later eight, and a half's bits 0 to
  // 10 are a number as they stand: bit 10 is the exponent's lowest one.
  static __device__ constexpr float key_unit(int x) { return static_cast<float>(1 << (24 - x)); }
  static __device__ constexpr float value_unit(int y) {
    return static_cast<float>(1 << (21 - y / 8 % 2 * 4));
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

  // Level + kOffset of elements i, those of each fourth bit in one word: three or four bits from its own
  // place on, cyclic. What may be between them belongs to others.
  __device__ __forceinline__ void weave(uint32_t (&out)[4], int i) const {
    const uint32_t set = planes[i];
    constexpr uint32_t kEven = 0x55555555u, kLow = 0x33333333u;
    if constexpr (Bits == 2) {
      const uint32_t large = code_bit(i, 0), negative = code_bit(i, 1);
      const uint32_t first = set & ~large, second = rotate_right(~set | ~(negative | large), 31);
      const uint32_t third = rotate_right(set & ~negative & large, 30);
      const uint32_t even = choose(kEven, first, second), odd = choose(kEven, second, first);
      out[0] = choose(kLow, even, third), out[1] = choose(kLow << 1, odd, third);
      out[2] = choose(kLow, third, even), out[3] = choose(kLow << 1, third, odd);
    } else {
      const uint32_t first = set & code_bit(i, 0), second = rotate_right(set & code_bit(i, 1), 31);
      const uint32_t third = rotate_right(set & code_bit(i, 2), 30);
      const uint32_t fourth = rotate_right(~(set & code_bit(i, 3)), 29);
      const uint32_t even[2] = {choose(kEven, first, second), choose(kEven, third, fourth)};
      const uint32_t odd[2] = {choose(kEven, second, first), choose(kEven, fourth, third)};
      out[0] = choose(kLow, even[0], even[1]), out[1] = choose(kLow << 1, odd[0], odd[1]);
      out[2] = choose(kLow, even[1], even[0]), out[3] = choose(kLow << 1, odd[1], odd[0]);
    }
  }
  // The elements of bit `bit` of each half, of the word woven for it.
  static __device__ __forceinline__ uint32_t operand(const uint32_t (&woven)[4], int bit) {
    const uint32_t word = bit < 8 ? woven[bit % 4] : rotate_right(woven[bit % 4], 8);
    return word & 0x10001u * (Bits == 2 ? 7u : 15u) << bit % 8;
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
        codes.weave(t[0], i), codes.weave(t[1], i + 1);
#pragma unroll
        for (int k = 0; k < kInWord; ++k)
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int bit = 2 * m + 8 * k, s = i / 2 + 4 * (j + k);
            const uint32_t a[4] = {operand(t[0], bit), operand(t[0], bit + 1), operand(t[1], bit),
                                   operand(t[1], bit + 1)};
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
    // Elements of other tokens lie elsewhere in a half: so much more have weights to be.
    uint32_t b[4][2];
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int up = 3 - s % 2 - 2 * half;
        b[s][half] = multiply_halves(weights[s][half], 0x3c003c00u + 0x04000400u * up);
      }
#pragma unroll
    for (int j = 0; j < Tiles / 4; j += kInWord) {
      const FourOfEightCodes codes(page + 16 * lane + j / 2 * kPlanes / 4 * 512,
                                   std::integral_constant<int, kInWord == 1 ? 4 : 0>{});
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        uint32_t t[2][4];
        codes.weave(t[0], i), codes.weave(t[1], i + 1);
#pragma unroll
        for (int k = 0; k < kInWord; ++k)
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            const int bit = s % 2 + 4 * k + s / 2 * 8;
            const uint32_t a[4] = {operand(t[0], bit), operand(t[1], bit), operand(t[0], bit + 2),
                                   operand(t[1], bit + 2)};
            mma_16x8x16(out[i / 2 + 4 * (j + k)], a, b[s][0], b[s][1], Half{});
          }
      }
    }
  }
};

}  // namespace quantgemm

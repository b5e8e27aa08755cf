// SPDX-License-Identifier: MIT
// Products of a page's codes (kv_page.h) on tensor cores, and what attention asks of a format:
//
//   multiply_keys    logits[M] += codes of tokens 16M … · b, columns as multiply_scales left them
//   multiply_values  out[M] += codes of rows 16M … · weights; Σ · value_unit(block of 8 rows) is in units
//   kOffset          to be taken off each code so multiplied; dense pages have shifts instead
//
// This is the dense format, whose operands are the codes' own bits.
#pragma once
#include <cuda_fp16.h>

#include "../kv_page.h"
#include "ptx.cuh"

namespace quantgemm {

__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
  return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
}

// Codes i of a lane's words for one pair of columns as two halves, code / code_unit(Bits, i): the code's
// bits in a mantissa whose exponent is 0 are a number as they stand, and tensor cores take it exactly.
template <int Bits, int I>
__device__ __forceinline__ uint32_t code_pair(const uint32_t* words) {
  constexpr int kPerByte = 8 / Bits, kAt = I % (2 * kPerByte);
  const uint32_t word = words[I * Bits / 16];
  return (kAt < kPerByte ? word : word >> 8) & 0x10001u * ((1u << Bits) - 1u) << kAt % kPerByte * Bits;
}
// So code/2^bits is the sum of the products times this.
__device__ __forceinline__ constexpr float code_unit(int bits, int i) {
  return static_cast<float>(1 << (24 - bits - i % (8 / bits) * bits));
}

// Columns in groups of 8; a product of step s takes this group and the next but one. Of four groups whose
// scales or shifts came as one load, the first and third are then one operand, the others another.
__device__ __forceinline__ constexpr int first_group(int s) { return s / 2 * 4 + s % 2; }

// d[M] += codes of rows 16M … for the tiles of one block of 64 rows. words: of all columns of the block.
template <int Bits, int M = 0>
__device__ __forceinline__ void multiply_codes(float (*d)[4], const uint32_t* words, int step,
                                               const uint32_t (&b)[2]) {
  constexpr int kEach = Bits / 2;  // words of a group: 1 or 2
  const uint32_t *low = words + first_group(step) * kEach, *high = low + 2 * kEach;
  const uint32_t a[4] = {code_pair<Bits, 2 * M>(low), code_pair<Bits, 2 * M + 1>(low),
                         code_pair<Bits, 2 * M>(high), code_pair<Bits, 2 * M + 1>(high)};
  mma_16x8x16(d[M], a, b[0], b[1], Half{});
  if constexpr (M < 3) multiply_codes<Bits, M + 1>(d, words, step, b);
}

template <int Count>
__device__ __forceinline__ void load_words(uint32_t (&words)[Count], const uint8_t* from, int stride) {
#pragma unroll
  for (int i = 0; i < Count / 4; ++i) {
    const uint4 v = reinterpret_cast<const uint4*>(from)[i * stride];
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
}

template <int Bits>
struct DenseCodes {
  static constexpr PageKind kKind = PageKind::kDense;
  static constexpr int kBits = Bits, kTableBytes = 0;
  static constexpr float kOffset = 0.0f;

  static __device__ void make_table(uint32_t*) {}
  static __device__ constexpr float key_unit(int i) { return code_unit(Bits, i); }
  static __device__ constexpr float value_unit(int i) { return code_unit(Bits, i); }

  template <int Steps>
  static __device__ __forceinline__ void multiply_keys(float (&logits)[4][4], const uint8_t* page, int lane,
                                                       const uint32_t*, const uint32_t (&b)[Steps][2]) {
    uint32_t words[Steps * Bits];
    load_words(words, page + 16 * lane, 32);
#pragma unroll
    for (int s = 0; s < Steps; ++s) multiply_codes<Bits>(logits, words, s, b[s]);
  }
  template <int Tiles>
  static __device__ __forceinline__ void multiply_values(float (&out)[Tiles][4], const uint8_t* page,
                                                         int lane, const uint32_t*,
                                                         const uint32_t (&weights)[4][2]) {
    uint32_t words[Tiles * Bits];
    load_words(words, page + 16 * lane, 32);
#pragma unroll
    for (int block = 0; block < Tiles / 4; ++block)
#pragma unroll
      for (int s = 0; s < 4; ++s)
        multiply_codes<Bits>(out + 4 * block, words + block * 4 * Bits, s, weights[s]);
  }
};

}  // namespace quantgemm

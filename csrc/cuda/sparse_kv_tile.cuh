// SPDX-License-Identifier: MIT
// Codes of the sparse key-value container (kv.h) to 16-bit values, eight elements of a lane's tile at a
// time. A byte of the bitmap picks eight selectors from a table in shared memory: nibble j says which
// of the next eight codes is element j, or that it is none. No element is counted or shifted by itself.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kv.h"
#include "memory.cuh"

namespace quantgemm {

template <class Real16>
using Pair = std::conditional_t<std::is_same_v<Real16, Half>, __half2, __nv_bfloat162>;

// Both halves of a word through f.
template <class Real16, class Fn>
__device__ __forceinline__ uint32_t on_pair(uint32_t word, Fn&& f) {
  return bit_cast<uint32_t>(f(bit_cast<Pair<Real16>>(word)));
}

// Every byte with its top bit set becomes 0xff, others 0: two of the four bytes, each doubled.
template <int First>
__device__ __forceinline__ uint32_t spread_top_bits(uint32_t bytes) {
  uint32_t mask;  // PTX ISA 9.7.9.7 (prmt): selector 8 | i repeats the sign of byte i
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(bytes), "n"(First == 0 ? 0x9988 : 0xbbaa));
  return mask;
}

// What a lane knows of one tile: kRows elements from a multiple of kRows on, and their codes.
template <class Real16, int Bits, int Rows>
struct TileCodes {
  static constexpr int kWords = (Rows * Bits + 31) / 32;  // if all are set
  uint32_t window[kWords];                                // codes that are still to come, lowest first
  uint32_t scale, zero;                                   // both twice

  // The place in a pool of eight bytes that code number `rank` is spread to by next().
  static QG_HD int place(int rank) { return Bits == 4 ? rank / 2 + rank % 2 * 4 : rank % 4 * 2 + rank / 4; }

  __device__ __forceinline__ void drop(int num_codes) {
    const int shift = num_codes * Bits;  // at most 32, which funnel shifts take as such
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      window[i] = __funnelshift_rc(window[i], i + 1 < kWords ? window[i + 1] : 0u, shift);
  }

  // Elements 2j, 2j + 1 of the eight into pairs[j]; what is not set is zero.
  __device__ __forceinline__ void next(uint32_t selectors, int num_codes, uint32_t (&pairs)[4]) {
    // Codes to bytes, each marked by bit 6, so that a selector of none (a sign bit, 0) is not code 0.
    uint32_t low, high;
    if constexpr (Bits == 4) {
      low = (window[0] & 0x0f0f0f0fu) | 0x40404040u;
      high = (window[0] >> 4 & 0x0f0f0f0fu) | 0x40404040u;
    } else {
      const uint32_t bytes = __byte_perm(window[0], window[0] >> 2, 0x5410);
      low = (bytes & 0x03030303u) | 0x40404040u;
      high = (bytes >> 4 & 0x03030303u) | 0x40404040u;
    }
    drop(num_codes);
    const uint32_t first = pick_bytes(low, high, selectors), second = pick_bytes(low, high, selectors >> 16);
    to_values(first, pairs[0], pairs[1]);
    to_values(second, pairs[2], pairs[3]);
  }

  __device__ __forceinline__ void to_values(uint32_t bytes, uint32_t& pair0, uint32_t& pair1) const {
    // A byte below the exponent of 2^10 (half) or 2^7 (bfloat16) is that number plus the byte.
    constexpr bool kHalf = std::is_same_v<Real16, Half>;
    constexpr uint32_t kExponent = kHalf ? 0x64646464u : 0x43434343u;
    const uint32_t marks = bytes << 1;
    pair0 = to_value(__byte_perm(bytes, kExponent, 0x4140)) & spread_top_bits<0>(marks);
    pair1 = to_value(__byte_perm(bytes, kExponent, 0x4342)) & spread_top_bits<2>(marks);
  }
  __device__ __forceinline__ uint32_t to_value(uint32_t biased) const {
    // Three steps, because code - zero is exact and the bias plus zero is not.
    constexpr uint32_t kBias = std::is_same_v<Real16, Half> ? 0xe440e440u : 0xc340c340u;  // -1088, -192
    using P = Pair<Real16>;
    const P code = __hadd2(bit_cast<P>(biased), bit_cast<P>(kBias));
    return bit_cast<uint32_t>(__hmul2(__hsub2(code, bit_cast<P>(zero)), bit_cast<P>(scale)));
  }
};

// Values as they are: each is fetched by itself.
template <class Real16, int Rows>
struct TileCodes<Real16, kRawBits, Rows> {
  static constexpr int kWords = 0;  // none ahead
  const uint16_t* at;
  int64_t left;  // values until the end of the tensor

  __device__ __forceinline__ void next_of(uint32_t byte, uint32_t (&pairs)[4]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bool is_set = (byte >> (7 - j) & 1) != 0 && left > 0;
      const uint32_t value = is_set ? __ldg(at) : 0u;
      at += is_set, left -= is_set;
      pairs[j / 2] = j % 2 ? pairs[j / 2] | value << 16 : value;
    }
  }
};

// The table: 256 bytes of a bitmap × 32 lanes, a copy in every bank.
template <class Tile>
__device__ __forceinline__ void fill_selectors(uint32_t* table, int thread) {
  uint32_t selectors = 0;
  int rank = 0;
  for (int j = 0; j < 8; ++j) {
    const bool is_set = thread >> (7 - j) & 1;
    selectors |= static_cast<uint32_t>(is_set ? Tile::place(rank) : 8) << (4 * j);
    rank += is_set;
  }
  for (int i = 0; i < 8; ++i)  // neighbours start in other banks
    reinterpret_cast<uint4*>(table)[thread * 8 + (i + thread) % 8] =
        make_uint4(selectors, selectors, selectors, selectors);
}

}  // namespace quantgemm

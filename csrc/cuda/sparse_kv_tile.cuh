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

// Every byte with its top bit set becomes 0xff, others 0: two of the four bytes, each doubled.
template <int First>
__device__ __forceinline__ uint32_t spread_top_bits(uint32_t bytes) {
  uint32_t mask;  // PTX ISA 9.7.9.7 (prmt): selector 8 | i repeats the sign of byte i
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(bytes), "n"(First == 0 ? 0x9988 : 0xbbaa));
  return mask;
}

// What a lane knows of one tile: Rows elements from a multiple of Rows on, and their codes.
template <class Real16, int Bits, int Rows>
struct TileCodes {
  static constexpr int kWords = (Rows * Bits + 31) / 32;  // if all are set
  static constexpr bool kHalf = std::is_same_v<Real16, Half>;
  using P = Pair<Real16>;
  uint32_t window[kWords];  // codes that are still to come, lowest first
  uint32_t table[2];        // 2 bits: the values of codes 0 1, 2 3; 4 bits: zero and scale, both twice

  __device__ __forceinline__ void fit(uint32_t scale, uint32_t zero) {
    if constexpr (Bits == 4) {
      table[0] = zero, table[1] = scale;
    } else {
      table[0] = value_of_codes(kHalf ? 0x3c000000u : 0x3f800000u, zero, scale);  // 0, 1
      table[1] = value_of_codes(kHalf ? 0x42004000u : 0x40404000u, zero, scale);  // 2, 3
    }
  }

  // The place in a pool of eight bytes that code number `rank` is spread to by next().
  static __device__ __forceinline__ int place(int rank) {
    return Bits == 4 ? rank / 2 + rank % 2 * 4 : rank % 4 * 2 + rank / 4;
  }

  __device__ __forceinline__ void drop(int num_codes) {
    const int shift = num_codes * Bits;  // at most 32, which funnel shifts take as such
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      window[i] = i + 1 < kWords ? __funnelshift_rc(window[i], window[i + 1], shift)
                                 : __funnelshift_rc(window[i], 0u, shift);
  }

  // Elements 2j, 2j + 1 of the eight into pairs[j]; what is not set is zero.
  __device__ __forceinline__ void next(uint32_t selectors, int num_codes, uint32_t (&pairs)[4]) {
    // Codes to bytes; each has a bit, kMark, that a selector of none (the sign of a byte, 0) has not.
    uint32_t low, high;
    if constexpr (Bits == 4) {
      low = (window[0] & 0x0f0f0f0fu) | 0x40404040u;
      high = (window[0] >> 4 & 0x0f0f0f0fu) | 0x40404040u;
    } else {  // code c becomes the selectors of the c-th 16 bits of table: 0x10, 0x32, 0x54, 0x76
      const uint32_t bytes = __byte_perm(window[0], window[0] >> 2, 0x5410);
      low = (bytes & 0x03030303u) * 0x22u + 0x10101010u;
      high = (bytes >> 4 & 0x03030303u) * 0x22u + 0x10101010u;
    }
    drop(num_codes);
    to_values(pick_bytes(low, high, selectors), pairs[0], pairs[1]);
    to_values(pick_bytes(low, high, selectors >> 16), pairs[2], pairs[3]);
  }

 private:
  static constexpr int kMark = Bits == 4 ? 6 : 4;

  __device__ __forceinline__ void to_values(uint32_t bytes, uint32_t& pair0, uint32_t& pair1) const {
    const uint32_t marks = bytes << (7 - kMark);
    if constexpr (Bits == 4) {
      // A byte below the exponent of 2^10 (half) or 2^7 (bfloat16) is that number plus the byte.
      constexpr uint32_t kExponent = kHalf ? 0x64646464u : 0x43434343u;
      constexpr uint32_t kBias = kHalf ? 0xe440e440u : 0xc340c340u;  // -1088, -192
      const auto value = [&](uint32_t biased) {
        const P code = __hadd2(bit_cast<P>(biased), bit_cast<P>(kBias));
        return value_of_codes(bit_cast<uint32_t>(code), table[0], table[1]);
      };
      pair0 = value(__byte_perm(bytes, kExponent, 0x4140));
      pair1 = value(__byte_perm(bytes, kExponent, 0x4342));
    } else {
      pair0 = pick_bytes(table[0], table[1], bytes);
      pair1 = pick_bytes(table[0], table[1], bytes >> 16);
    }
    pair0 &= spread_top_bits<0>(marks);
    pair1 &= spread_top_bits<2>(marks);
  }
  // Code less zero first: exact, where a fused bias would not be.
  static __device__ __forceinline__ uint32_t value_of_codes(uint32_t codes, uint32_t zero, uint32_t scale) {
    return bit_cast<uint32_t>(__hmul2(__hsub2(bit_cast<P>(codes), bit_cast<P>(zero)), bit_cast<P>(scale)));
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

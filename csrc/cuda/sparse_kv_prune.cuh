// SPDX-License-Identifier: MIT
// The largest magnitudes of a token, half of whose values each of two neighbouring lanes has. Ranks are
// counted bit by bit over bit planes: 32 values to an instruction or two.
#pragma once
#include <cuda_fp16.h>

#include "../kv.h"
#include "memory.cuh"

namespace quantgemm {

// Bits of a where the mask has them, of b elsewhere. The compiler makes two instructions of it where b is a
// shifted word. PTX ISA 9.7.8.5 (lop3)
__device__ __forceinline__ uint32_t chosen_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t chosen;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(chosen) : "r"(mask), "r"(a), "r"(b));
  return chosen;
}

// Word i's halves become bit i of the halves of words 0 … 15: both 16×16 matrices of bits transposed.
__device__ __forceinline__ void transpose_16x16(uint32_t (&w)[16]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t a = w[i], b = w[i + 8];
    w[i] = __byte_perm(a, b, 0x6240), w[i + 8] = __byte_perm(a, b, 0x7351);
  }
#pragma unroll
  for (int step = 4; step > 0; step /= 2) {
    const uint32_t low = step == 4 ? 0x0f0f0f0fu : (step == 2 ? 0x33333333u : 0x55555555u);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i & step) continue;
      const uint32_t a = w[i], b = w[i + step];
      w[i] = chosen_bits(low, a, b << step), w[i + step] = chosen_bits(low, a >> step, b);
    }
  }
}

template <int Words>
struct Pruning {
  static constexpr int kUnits = Words / 16;
  static constexpr uint32_t kNoSigns = 0x7fff7fffu, kSigns = 0x80008000u;
  uint32_t cutoff = 0;       // the keep-th largest magnitude
  uint32_t equal[kUnits];    // this lane's values of that magnitude, word 16u + i in bits i and i + 16
  bool has_largest = false;  // a value of this lane with all of the upper five bits: infinity or NaN perhaps
  int excess = 0;            // how many of the token's equal ones must go, the last ones

  // keep is at least 1.
  __device__ __forceinline__ void find(const uint32_t (&pairs)[Words], int keep) {
    uint32_t planes[kUnits][16];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      equal[u] = ~0u;
#pragma unroll
      for (int i = 0; i < 16; ++i) planes[u][i] = pairs[16 * u + i];
      transpose_16x16(planes[u]);
      has_largest |= (planes[u][14] & planes[u][13] & planes[u][12] & planes[u][11] & planes[u][10]) != 0;
    }
    const auto of_both = [](int count) { return count + __shfl_xor_sync(~0u, count, 1); };
    int surplus = -keep;  // larger ones, less those that are kept
#pragma unroll
    for (int bit = 14; bit >= 0; --bit) {
      uint32_t set[kUnits];
      int count = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) set[u] = equal[u] & planes[u][bit], count += __popc(set[u]);
      const int with_set = of_both(count) + surplus;
      const auto others = static_cast<uint32_t>(with_set >> 31);  // too few: those without the bit are equal
#pragma unroll
      for (int u = 0; u < kUnits; ++u) equal[u] = (equal[u] & others) ^ set[u];
      surplus = static_cast<int>(
          chosen_bits(others, static_cast<uint32_t>(with_set), static_cast<uint32_t>(surplus)));
      cutoff += others << bit;  // a product, not for the lanes of logic: 0 or -1 of it
    }
    cutoff += 0x7fffu;
    int count = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) count += __popc(equal[u]);
    excess = of_both(count) + surplus;
  }

  // What is below the cutoff becomes zero, of either sign. Bits that are no NaN of a half compare and
  // multiply like halves, of whatever type they are. (A product by 1 or 0 is for other lanes of the
  // multiprocessor than a mask.)
  __device__ __forceinline__ void keep_largest(uint32_t (&pairs)[Words]) const {
    if (!has_largest) {
      const auto limit = bit_cast<__half2>(cutoff * 0x10001u);
#pragma unroll
      for (int i = 0; i < Words; ++i) {
        const auto own = bit_cast<__half2>(pairs[i]);
        pairs[i] = bit_cast<uint32_t>(__hmul2(own, __hge2(__habs2(own), limit)));
      }
    } else {
#pragma unroll
      for (int i = 0; i < Words; ++i) pairs[i] &= at_least_cutoff(pairs[i]);
    }
  }

  // Where nothing is to be found.
  __device__ __forceinline__ void look_for_largest(const uint32_t (&pairs)[Words]) {
    constexpr uint32_t kUpper = 0x7c007c00u;
    uint32_t carries = 0;
#pragma unroll
    for (int i = 0; i < Words; ++i) carries |= (pairs[i] & kUpper) + 0x04000400u;
    has_largest = (carries & kSigns) != 0;
  }

  // The last ones of those that are equal become zero too, in row: the token's channels, of which a word of
  // this lane has one, channel_of(word), and the next. By a whole warp.
  template <class ChannelOf>
  __device__ __forceinline__ void drop_excess(uint16_t* row, ChannelOf&& channel_of) {
    if (cutoff == 0) excess = 0;  // zeros
    for (; __any_sync(~0u, excess > 0); --excess) {
      int last = -1, unit = 0;
      uint32_t bit = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (equal[u] == 0) continue;
        const int i = 31 - __clz((equal[u] | equal[u] >> 16) & 0xffffu), odd = equal[u] >> (16 + i) & 1;
        last = channel_of(16 * u + i) + odd;
        unit = u, bit = 1u << (16 * odd + i);
      }
      if (last <= __shfl_xor_sync(~0u, last, 1) || excess <= 0) continue;
      row[last] = 0;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) equal[u] &= u == unit ? ~bit : ~0u;
    }
  }

 private:
  // As integers: masks of the halves.
  __device__ __forceinline__ uint32_t at_least_cutoff(uint32_t pair) const {
    // A 15-bit difference borrows bit 15 and nothing else.
    const uint32_t stays = ((pair & kNoSigns) | kSigns) - cutoff * 0x10001u;
    uint32_t mask;  // the top bit of each half all over it. PTX ISA 9.7.9.7 (prmt)
    asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask) : "r"(stays));
    return mask;
  }
};

// All but the four largest magnitudes of eight values become zero; of equal ones the first stay.
inline __device__ __noinline__ uint4 first_four(uint4 values) {
  uint32_t w[4] = {values.x, values.y, values.z, values.w};
  int a[4], b[4];  // magnitude, then the first ones first
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = static_cast<int>((w[i / 2] >> (16 * (i % 2)) & 0x7fffu) * 8u) + 7 - i;
    b[i] = static_cast<int>((w[2 + i / 2] >> (16 * (i % 2)) & 0x7fffu) * 8u) + 3 - i;
  }
  int own[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) own[i] = a[i], own[4 + i] = b[i];
  const auto sort = [](int (&v)[4]) {  // the largest first
    const auto order = [&](int i, int j) {
      const int larger = max(v[i], v[j]), smaller = min(v[i], v[j]);
      v[i] = larger, v[j] = smaller;
    };
    order(0, 1), order(2, 3), order(0, 2), order(1, 3), order(1, 2);
  };
  sort(a), sort(b);
  const int fourth = min(min(max(a[0], b[3]), max(a[1], b[2])), min(max(a[2], b[1]), max(a[3], b[0])));
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w[i] &= (own[2 * i] >= fourth ? 0xffffu : 0u) | (own[2 * i + 1] >= fourth ? 0xffff0000u : 0u);
  return make_uint4(w[0], w[1], w[2], w[3]);
}
// The same, quick where the fourth is larger than the fifth: values side by side in pairs. Takes part in the
// extremes of all fourths (in both halves) and of all magnitudes.
__device__ __forceinline__ void keep_four(uint32_t* w, uint32_t& lowest_fourth, uint32_t& hi) {
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = w[i] & 0x7fff7fffu;
  const auto order = [&](int i, int j) {
    const uint32_t larger = __vmaxu2(v[i], v[j]);
    v[j] = __vminu2(v[i], v[j]), v[i] = larger;
  };
  order(0, 1), order(2, 3), order(0, 2), order(1, 3), order(1, 2);  // even and odd ones by themselves
  const auto other = [](uint32_t x) { return __byte_perm(x, x, 0x1032); };
  const uint32_t third = other(v[3]), second = other(v[2]);
  uint32_t fourth = __vminu2(__vmaxu2(v[0], third), __vmaxu2(v[1], second));
  uint32_t fifth = __vmaxu2(__vminu2(v[0], third), __vminu2(v[1], second));
  fourth = __vminu2(fourth, other(fourth)), fifth = __vmaxu2(fifth, other(fifth));
  lowest_fourth = __vminu2(lowest_fourth, fourth), hi = __vmaxu2(hi, v[0]);
  if ((fourth == fifth && fourth != 0) || fourth > 0x7c007c00u) {  // or no numbers, see Pruning
    const uint4 kept = first_four(make_uint4(w[0], w[1], w[2], w[3]));
    w[0] = kept.x, w[1] = kept.y, w[2] = kept.z, w[3] = kept.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w[i] &= __hgeu2_mask(__habs2(bit_cast<__half2>(w[i])), bit_cast<__half2>(fourth));
}

}  // namespace quantgemm

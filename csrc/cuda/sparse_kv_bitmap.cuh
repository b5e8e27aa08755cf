// SPDX-License-Identifier: MIT
// Products of a bitmap page's codes (kv_sparse_page.h). A lane finds its codes by the counts of the bits
// before them: of other lanes by a sum over the warp, of its own four bits at a time in the bytes of a
// word. 2 bits: four bits and the next eight of the codes are the index of a table of four levels as bytes
// e5m2, each the upper half of a half. 4 bits: a table says for eight bits which code each has.
#pragma once
#include "sparse_kv_codes.cuh"

namespace quantgemm {

// Bytes of b:a; 8 + n instead of n: all bits are the byte's highest. PTX ISA 9.7.9.7 (prmt).
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Twice the number of bits set before each four, the even and the odd ones; in bytes.
struct BitCounts {
  uint32_t even, odd, all;

  __device__ __forceinline__ explicit BitCounts(uint32_t bits) {
    const uint32_t pairs = bits - (bits >> 1 & 0x55555555u);
    const uint32_t fours = (pairs & 0x33333333u) + (pairs >> 2 & 0x33333333u);
    const uint32_t first = fours & 0x0f0f0f0fu, both = first + (fours >> 4 & 0x0f0f0f0fu);
    const uint32_t sums = both * 0x02020202u;
    even = sums - 2 * both, odd = even + 2 * first, all = sums >> 24;
  }
};

template <int Bits>
struct BitmapCodes {
  static constexpr PageKind kKind = PageKind::kBitmap;
  // Entries from one to the next four bits; 5 more than there are spread those that are used most over all
  // banks, as four bits are any but codes are small more often than not.
  static constexpr int kRow = 256 + 5;
  static constexpr int kBits = Bits, kTableBytes = Bits == 2 ? 16 * 4 * kRow : 1024;
  static constexpr float kOffset = Bits == 2 ? 0.0f : 8.0f;

  static __device__ constexpr float key_unit(int) { return Bits == 2 ? 1.0f : static_cast<float>(1 << 24); }
  static __device__ constexpr float value_unit(int) { return key_unit(0); }

  // By all threads of the block.
  static __device__ void make_table(uint32_t* table) {
    for (int index = static_cast<int>(threadIdx.x); index < 256; index += static_cast<int>(blockDim.x)) {
      if constexpr (Bits == 2) {  // [four bits][four codes]
        uint32_t levels = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t code = index >> 2 * i & 3;
          levels |= ((code & 1 ? 0x40u : 0x3cu) | (code & 2) << 6) << 8 * i;
        }
#pragma unroll
        for (int bits = 0; bits < 16; ++bits) {
          uint32_t selector = 0, rank = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i) selector |= (bits >> i & 1 ? rank++ : 4u) << 4 * i;
          table[kRow * bits + index] = permute_bytes(levels, 0, selector);
        }
      } else {  // [eight bits]: even codes are bytes 0 … 3, odd ones 4 … 7
        uint32_t selector = 0, rank = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32_t source = index >> i & 1 ? rank / 2 + rank % 2 * 4 : 8u;
          rank += index >> i & 1;
          selector |= source << (i / 4 * 16 + i / 2 % 2 * 4 + i % 2 * 8);
        }
        table[index] = selector;
      }
    }
  }

  // The operands of the four times eight bits of a word whose codes begin at bit `at`.
  static __device__ __forceinline__ void expand(uint32_t (&a)[4][4], uint32_t bits, const uint8_t* codes,
                                                uint32_t at, const BitCounts& counts, const uint32_t* table) {
    const auto word = [&](uint32_t bit, int i) {
      return *reinterpret_cast<const uint32_t*>(codes + (bit >> 3 & ~3u) + 4 * i);
    };
    if constexpr (Bits == 2) {
      const uint32_t middle = word(at, 1), low = __funnelshift_r(word(at, 0), middle, at);
      const uint32_t high = __funnelshift_r(middle, word(at, 2), at);
      const uint64_t window = low | static_cast<uint64_t>(high) << 32;
      const uint32_t fours[2] = {bits << 2 & 0x3c3c3c3cu, bits >> 2 & 0x3c3c3c3cu};
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t skip = permute_bytes(odd ? counts.odd : counts.even, 0, 0x4440u | k);
          const uint32_t next = k + odd == 0 ? low : static_cast<uint32_t>(window >> skip);
          // The entry's address is a sum of bytes: 4 · codes + 4 · kRow · bits.
          const uint32_t terms = permute_bytes(next, fours[odd], 0xc440u + 0x1110u * k);
          constexpr uint32_t kFactors = 4 | kRow / 2 << 8 | (kRow - kRow / 2) << 16;
          const uint32_t levels = *reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint8_t*>(table) +
                                                                     __dp4a(terms, kFactors, 0u));
          a[k][odd] = permute_bytes(levels, 0, 0x1404), a[k][2 + odd] = permute_bytes(levels, 0, 0x3424);
        }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t from = at + 2 * permute_bytes(counts.even, 0, 0x4440u | k);
        const uint32_t next = __funnelshift_r(word(from, 0), word(from, 1), from);
        const uint32_t even = next & 0x0f0f0f0fu, odd = next >> 4 & 0x0f0f0f0fu;
        const uint32_t selector = table[permute_bytes(bits, 0, 0x4440u | k)];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const uint32_t four = permute_bytes(even, odd, row ? selector >> 16 : selector);
          a[k][row] = (four & 0x000f000fu) ^ 0x00080008u;
          a[k][2 + row] = (four >> 8 & 0x000f000fu) ^ 0x00080008u;
        }
      }
    }
  }

  // add(word index, its operands) for all words of this lane.
  template <int Words, class Add>
  static __device__ __forceinline__ void for_words(const uint8_t* page, int lane, const uint32_t* table,
                                                   Add&& add) {
    uint32_t bits[Words], before[Words / 2];  // codes before a pair of words
#pragma unroll
    for (int i = 0; i < Words / 2; ++i) {
      const uint2 v = reinterpret_cast<const uint2*>(page)[32 * i + lane];
      bits[2 * i] = v.x, bits[2 * i + 1] = v.y;
    }
    uint32_t earlier = 0;
#pragma unroll
    for (int i = 0; i < Words / 2; i += 2) {  // two sums in one word
      const uint32_t own = static_cast<uint32_t>(__popc(bits[2 * i]) + __popc(bits[2 * i + 1])) |
                           static_cast<uint32_t>(__popc(bits[2 * i + 2]) + __popc(bits[2 * i + 3])) << 16;
      uint32_t sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t left = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += left;
      }
      const uint32_t all = __shfl_sync(~0u, sum, 31);
      sum -= own;
      before[i] = earlier + (sum & 0xffffu), earlier += all & 0xffffu;
      before[i + 1] = earlier + (sum >> 16), earlier += all >> 16;
    }
    const uint8_t* codes = page + 128 * Words;
#pragma unroll
    for (int w = 0; w < Words; w += 2) {
      uint32_t a[4][4];
      const BitCounts first(bits[w]), second(bits[w + 1]);
      const uint32_t at = before[w / 2] * Bits;
      expand(a, bits[w], codes, at, first, table);
      add(w, a);
      expand(a, bits[w + 1], codes, at + first.all * (Bits / 2), second, table);
      add(w + 1, a);
    }
  }

  template <int Steps>
  static __device__ __forceinline__ void multiply_keys(float (&logits)[4][4], const uint8_t* page, int lane,
                                                       const uint32_t* table, const uint32_t (&b)[Steps][2]) {
    for_words<Steps>(page, lane, table, [&](int s, const uint32_t (&a)[4][4]) {
#pragma unroll
      for (int m = 0; m < 4; ++m) mma_16x8x16(logits[m], a[m], b[s][0], b[s][1], Half{});
    });
  }
  template <int Tiles>
  static __device__ __forceinline__ void multiply_values(float (&out)[Tiles][4], const uint8_t* page,
                                                         int lane, const uint32_t* table,
                                                         const uint32_t (&weights)[4][2]) {
    for_words<Tiles>(page, lane, table, [&](int m, const uint32_t (&a)[4][4]) {
#pragma unroll
      for (int s = 0; s < 4; ++s) mma_16x8x16(out[m], a[s], weights[s][0], weights[s][1], Half{});
    });
  }
};

}  // namespace quantgemm

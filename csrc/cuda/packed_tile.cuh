// SPDX-License-Identifier: MIT
// From strips of the packed layout (formats/packed.h) to mma.sync: a lane's words of a batch of tiles as
// they come from memory, 16 codes of a step as the A fragment, and the affines of its rows r and r + 8.
// Fragments hold code + kBias: small integers, exact in 16 bits, made of their bits by one instruction.
// The bias is taken back where a group's sum begins, at − kBias · Σ x. Nothing here knows a format.
#pragma once
#include "../formats/gguf_formats.h"
#include "../formats/packed.h"
#include "gemm_fragments.cuh"
#include "ptx.cuh"

namespace quantgemm {

// Read once, and not needed again: past the L1, first to leave the L2.
template <class Vector>
__device__ __forceinline__ Vector load_streaming(bytes_ptr p);
template <>
__device__ __forceinline__ uint4 load_streaming<uint4>(bytes_ptr p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
template <>
__device__ __forceinline__ uint2 load_streaming<uint2>(bytes_ptr p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
template <>
__device__ __forceinline__ uint32_t load_streaming<uint32_t>(bytes_ptr p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// `Words` words from p, in loads as wide as they allow; Step bytes from one 16-byte load to the next.
template <int Words, int Step = 16>
__device__ __forceinline__ void load_words(uint32_t* words, bytes_ptr p) {
  if constexpr (Words >= 4) {
#pragma unroll
    for (int w = 0; w < Words; w += 4) {
      const uint4 v = load_streaming<uint4>(p + w / 4 * Step);
      words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
    }
  } else if constexpr (Words == 2) {
    const uint2 v = load_streaming<uint2>(p);
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = load_streaming<uint32_t>(p);
  }
}

template <PackableFormat F>
struct PackedBatch {
  using L = PackedLayout<F>;
  static constexpr int kTiles = L::kSpan / kTileCols > 2 ? L::kSpan / kTileCols : L::kLowBits == 8 ? 2 : 4;
  static constexpr int kRecords = kTiles * kTileCols / L::kSpan;
  static constexpr int kHeadWords = (2 * L::kRecordBytes + 3) / 4;
  static_assert(L::kRecordBytes % 2 == 0);

  uint32_t low[kTiles][L::kLowBits], high[kTiles][L::kHighBits > 0 ? L::kHighBits : 1];
  uint32_t heads[kRecords][kHeadWords];  // piece after piece, each of row r and of row r + 8

  // `count` tiles from `tile` on; all of a warp's lanes with the same arguments.
  __device__ __forceinline__ void load(bytes_ptr strip, int64_t k, int tile, int count) {
    if (count >= kTiles)
      load_tiles<true>(strip, k, tile, kTiles);
    else
      load_tiles<false>(strip, k, tile, count);
  }
  template <bool kAll>
  __device__ __forceinline__ void load_tiles(bytes_ptr strip, int64_t k, int tile, int count) {
    const int lane = threadIdx.x % 32;
    bytes_ptr codes =
        strip + static_cast<int64_t>(tile) * L::kLowTile + PackedField<L::kLowBits>::at(lane, 0);
    bytes_ptr others =
        strip + L::high_at(k) + static_cast<int64_t>(tile) * L::kHighTile + lane * 4 * L::kHighBits;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (!kAll && i >= count) continue;
      load_words<L::kLowBits, L::kLowBits == 8 ? 512 : 16>(low[i], codes + i * L::kLowTile);
      if constexpr (L::kHighBits > 0) load_words<L::kHighBits>(high[i], others + i * L::kHighTile);
    }
    load_heads<kAll, 0>(strip, k, tile, count);
  }
  template <bool kAll, int First>
  __device__ __forceinline__ void load_heads(bytes_ptr strip, int64_t k, int tile, int count) {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      const int64_t span = static_cast<int64_t>(tile) * kTileCols / L::kSpan;
      bytes_ptr piece = strip + L::piece_at(k, First) + L::row_in_piece(span, threadIdx.x % 32 / 4, First);
#pragma unroll
      for (int i = 0; i < kRecords; ++i)
        if (kAll || i * L::kSpan < count * kTileCols)
          load_words<kSize / 2>(heads[i] + First / 2, piece + i * kStripRows * kSize);
      load_heads<kAll, First + kSize>(strip, k, tile, count);
    }
  }

  // kUnit bytes from b on of record i, row r + 8 · half. All of these are constants where it is used.
  static constexpr int kUnit = L::kHeadBytes % 4 == 0 ? 4 : L::kHeadBytes % 2 == 0 ? 2 : 1;
  __device__ __forceinline__ uint32_t head_unit(int i, int half, int b) const {
    const typename L::Piece piece = L::piece_of(b);
    const int at = 2 * piece.first + half * piece.size + b - piece.first;
    return heads[i][at / 4] >> (8 * (at % 4));
  }
};

// A block with the head bytes of column `col` of the batch in their places, for F::affine.
template <PackableFormat F>
struct HeadBlock {
  using L = PackedLayout<F>;
  alignas(16) uint8_t bytes[(F::kBytes + 15) / 16 * 16];

  template <class Batch>
  __device__ __forceinline__ HeadBlock(const Batch& batch, int col, int half) {
    constexpr int kUnit = PackedBatch<F>::kUnit;
    using Unit = std::conditional_t<kUnit == 4, uint32_t, std::conditional_t<kUnit == 2, uint16_t, uint8_t>>;
#pragma unroll
    for (int b = 0; b < L::kHeadBytes; b += kUnit) {
      const auto unit = static_cast<Unit>(
          batch.head_unit(col / L::kSpan, half, col % L::kSpan / F::kElems * L::kHeadBytes + b));
      memcpy(bytes + F::head_at(b), &unit, kUnit);
    }
  }
};

// Affines of the groups of a batch for one row. Integer scales are made eight at a time.
template <PackableFormat F>
struct BatchAffines {
  static constexpr bool kTwoLevel = TwoLevelFormat<F>;
  static constexpr int kWords = kTwoLevel ? F::kElems / F::kGroup / 4 : 1;
  Affine factors;
  uint32_t scales[kWords], offsets[kWords];

  __device__ __forceinline__ void prepare(const PackedBatch<F>& batch, int half) {
    if constexpr (kTwoLevel) {
      static_assert(PackedLayout<F>::kSpan == F::kElems && PackedBatch<F>::kRecords == 1);
      const HeadBlock<F> block(batch, 0, half);
      factors = F::factors(block.bytes);
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        const uint64_t s = F::scale_codes(block.bytes, i / 2);
        scales[i] = static_cast<uint32_t>(s), scales[i + 1] = static_cast<uint32_t>(s >> 32);
        if constexpr (F::kOffset) {
          const uint64_t o = F::offset_codes(block.bytes, i / 2);
          offsets[i] = static_cast<uint32_t>(o), offsets[i + 1] = static_cast<uint32_t>(o >> 32);
        }
      }
    }
  }
  // A byte under an exponent of 2^7 reads 128 + code; the products with a half are exact, so is the rest.
  static __device__ __forceinline__ float times_code(uint32_t codes, int i, float factor) {
    const float biased = __uint_as_float(__byte_perm(codes, 0x43000000u, 0x7044 | i << 8));
    return __fmaf_rn(biased, factor, -128.0f * factor);
  }
  __device__ __forceinline__ Affine get(const PackedBatch<F>& batch, int col, int half) const {
    if constexpr (kTwoLevel && F::kOffset) {  // scale codes below 128: code · factor by one multiply-add
      const int g = col / F::kGroup;
      return {times_code(scales[g / 4], g % 4, factors.scale),
              times_code(offsets[g / 4], g % 4, factors.offset)};
    } else if constexpr (kTwoLevel) {
      const int g = col / F::kGroup;
      return {factors.scale * byte_to_float(scales[g / 4], g % 4), 0.0f};
    } else {
      return F::affine(HeadBlock<F>(batch, col, half).bytes, col % F::kElems / F::kGroup);
    }
  }
};

// (x & mask) | bits in one instruction, which the compiler misses where both are constants.
// PTX ISA 9.7.8.7 (lop3); 0xea is (a & b) | c.
__device__ __forceinline__ uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
}
__device__ __forceinline__ uint32_t shift_right(uint32_t x, int by) { return by >= 0 ? x >> by : x << -by; }

// Both halves less Bias: 1024 … 2047 in a half, 128 … 255 in bfloat16. PTX ISA 9.7.4.2 and 9.7.4.4 (sub,
// fma).
template <int Bias>
__device__ __forceinline__ uint32_t less_bias(uint32_t pair, Half) {
  asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(pair) : "r"((0x6000u + Bias) * 0x00010001u));
  return pair;
}
template <int Bias>
__device__ __forceinline__ uint32_t less_bias(uint32_t pair, BFloat16) {
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(0x3f803f80u), "r"((0xc280u + Bias) * 0x00010001u));
  return pair;
}

// The A fragment of step s of a tile; T is Half or BFloat16. Exact: bare codes, for float32 activations,
// in whose sums the last bits of something larger than the codes would show.
template <PackableFormat F, class T, bool Exact>
struct PackedFragment {
  using L = PackedLayout<F>;
  static constexpr bool kHalf = std::is_same_v<T, Half>;
  static constexpr bool kBytes = L::kBits == 8 || LevelFormat<F>;  // q as a signed byte, else unsigned bits
  static constexpr bool kSmall = SmallLevels<F>;                   // one within ± 63
  // Codes are the highest bits behind the point of a half, which then reads 2^bits + code, and the lowest
  // of bfloat16's seven, 128 + code: one shift less, and y has fewer bits to lose. Bytes are the lowest
  // of a half, 1024 + byte, too much to keep; those of eight bits lose what bfloat16 cannot hold at once.
  static constexpr int kAt = kHalf ? 10 - L::kBits : 0;
  static constexpr uint32_t kExponent = kHalf ? (0x3c00u + (L::kBits << 10)) * 0x00010001u : 0x43004300u;
  static constexpr int kAdded = kSmall   ? (kHalf ? 1024 : 128) + 64
                                : kBytes ? (kHalf ? 1024 + 128 : 0)
                                         : (kHalf ? 1 << L::kBits : 128) + kZeroOf<F>;
  static constexpr bool kTakenBack = kAdded != 0 && (Exact || (kHalf && kBytes));
  static constexpr int kBias = kTakenBack ? 0 : kAdded;

  template <class Batch>
  static __device__ __forceinline__ void make(const Batch& batch, int tile, int s, uint32_t (&a)[4]) {
    if constexpr (kBytes) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t quad;
        if constexpr (L::kBits == 8)
          quad = batch.low[tile][2 * s + half];
        else
          quad = F::levels((batch.low[tile][s] >> (4 * half)) & 0x0f0f0f0fu);
        quad = kSmall ? (quad & 0x7f7f7f7fu) ^ 0x40404040u : quad ^ 0x80808080u;
        a[half] = __byte_perm(quad, kHalf ? 0x64646464u : 0x43434343u, 0x4240);
        a[half + 2] = __byte_perm(quad, kHalf ? 0x64646464u : 0x43434343u, 0x4341);
        if constexpr (!kHalf && !kSmall)
          a[half] = mend_doubled(a[half]), a[half + 2] = mend_doubled(a[half + 2]);
      }
    } else {
      using Low = PackedField<L::kLowBits>;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[j] = masked_or(shift_right(batch.low[tile][Low::word(s, j)], Low::bit(s, j) - kAt),
                         Low::kMask << kAt, kExponent);
        if constexpr (L::kHighBits > 0) {
          using High = PackedField<L::kHighBits>;
          constexpr int kTo = kAt + L::kLowBits;
          a[j] = masked_or(shift_right(batch.high[tile][High::word(s, j)], High::bit(s, j) - kTo),
                           High::kMask << kTo, a[j]);
        }
      }
    }
    if constexpr (kTakenBack) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = less_bias<kAdded>(a[j], T{});
    }
  }
};

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// From a slot of packed weights in shared memory (packed_wgmma_stage.cuh) to A fragments of wgmma in
// registers: each weight is made in float32 and rounded once, or nearly so. Nothing here knows a format.
#pragma once
#include "packed_wgmma_stage.cuh"

namespace quantgemm::packed_wgmma {

template <int Words, int Step = 16>
__device__ __forceinline__ void load_shared(uint32_t* words, const uint8_t* p) {
  if constexpr (Words >= 4) {
#pragma unroll
    for (int w = 0; w < Words; w += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(p + w / 4 * Step);
      words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
    }
  } else if constexpr (Words == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = *reinterpret_cast<const uint32_t*>(p);
  }
}

// The same, volatile: the compiler's own loads come right before their use, and a warp waits.
template <int Words, int Step = 16>
__device__ __forceinline__ void load_shared_now(uint32_t* words, uint32_t address) {
  if constexpr (Words >= 4) {
#pragma unroll
    for (int w = 0; w < Words; w += 4) {
      const uint4 v = quantgemm::load_shared(address + w / 4 * Step);
      words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
    }
  } else if constexpr (Words == 2) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
  }
}

// Both parts of a pair: a · b + c, a · b and a + b, rounded once. PTX ISA 9.7.4.4 (fma), 9.7.4.3 (mul) and
// 9.7.4.1 (add).
__device__ __forceinline__ uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Those of a strip's slot: weight = scale · (code + kBias) + (offset − kBias · scale), float32, rounded once.
// Codes become floats by their bits, under an exponent: 128 + code, or 2^15 + a byte.
template <class P>
struct SlotWeights {
  using L = typename P::L;
  using F = typename P::Format;
  using Fragment = PackedFragment<F, BFloat16, false>;
  static constexpr float kBias = !Fragment::kBytes ? Fragment::kBias : Fragment::kSmall ? 192 : 32768 + 128;
  PackedBatch<F> batch;
  BatchAffines<F> affines[2];
  // Without offsets and where bfloat16 holds codes: code · scale in bfloat16, of a scale in two parts. The
  // conversions to and from float32 run at half the rate of arithmetic, which 256 tokens hide. At most 0.504
  // units off, and rounded once where scales are halves and codes have four bits. An infinite scale makes
  // NaN.
  static constexpr bool kPairs = std::is_same_v<typename P::T, BFloat16> && !F::kOffset &&
                                 !Fragment::kBytes && L::kLowBits == 4 && P::kTokens < 256;
  // Scales and offsets that are halves, as those of a whole block are, make weights of halves, rounded once
  // as well: a code reads 1024 + code · 2^at by its bits under an exponent, and less that it is exact.
  static constexpr bool kHalves =
      std::is_same_v<typename P::T, Half> && F::kGroup == F::kElems && !MiniFloats<F> && P::kTokens < 256;
  float scale[2], start[2];
  uint32_t high_part[2], low_part[2];  // kHalves: of rows r and r + 8, the scale, and the offset, twice

  template <int First = 0>
  __device__ __forceinline__ void load_heads(const uint8_t* strip) {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      const uint8_t* piece = strip + P::kHeadsAt + P::kSlotRecords * kStripRows * First +
                             static_cast<int>(L::row_in_piece(0, threadIdx.x % 32 / 4, First));
#pragma unroll
      for (int i = 0; i < P::kSlotRecords; ++i)
        load_shared<kSize / 2>(batch.heads[i] + First / 2, piece + i * kStripRows * kSize);
      load_heads<First + kSize>(strip);
    }
  }
  // `step` and `s` are constants where these are used.
  __device__ __forceinline__ void begin(const uint8_t* strip) {
    load_heads(strip);
    affines[0].prepare(batch, 0);
    affines[1].prepare(batch, 1);
  }
  __device__ __forceinline__ void load(const uint8_t* strip, int step) {
    const int lane = threadIdx.x % 32;
    const uint32_t address = shared_address(strip) + step * L::kLowTile;
    load_shared_now<L::kLowBits, L::kLowBits == 8 ? 512 : 16>(
        batch.low[step], address + static_cast<uint32_t>(PackedField<L::kLowBits>::at(lane, 0)));
    if constexpr (L::kHighBits > 0)
      load_shared_now<L::kHighBits>(batch.high[step], shared_address(strip) + P::kHighAt +
                                                          step * L::kHighTile + lane * 4 * L::kHighBits);
  }
  // Fragment s of a step that is loaded; `fresh` where it is the first to be decoded.
  __device__ __forceinline__ void decode(uint32_t (&a)[4], int step, int s, bool fresh) {
    const int col = step * kTileCols + 16 * s;
    if (fresh || col % F::kGroup == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Affine affine = affines[half].get(batch, col, half);
        if constexpr (kPairs) {
          affine.scale *= 1 << kDown;
          high_part[half] = pack_pair(affine.scale, affine.scale, BFloat16{});
          const float rest = affine.scale - __uint_as_float(high_part[half] & 0xffff0000u);
          low_part[half] = pack_pair(rest, rest, BFloat16{});
        }
        if constexpr (kHalves) {
          high_part[half] = pack_pair(affine.scale, affine.scale, Half{});
          low_part[half] = pack_pair(affine.offset, affine.offset, Half{});
        }
        scale[half] = affine.scale;
        start[half] = __fmaf_rn(-kBias, affine.scale, affine.offset);
      }
    }
    if constexpr (kPairs) {
      uint32_t codes[4];
      small_codes(codes, step, s);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        a[j] = fma_pairs(codes[j], high_part[j % 2], multiply_pairs(codes[j], low_part[j % 2]));
      return;
    }
    if constexpr (kHalves) {
      uint32_t codes[4];
      halves_of_fragment(codes, step, s);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        a[j] = F::kOffset ? fma_halves(codes[j], high_part[j % 2], low_part[j % 2])
                          : multiply_halves(codes[j], high_part[j % 2]);
      return;
    }
    float codes[4][2];
    codes_of_fragment(codes, step, s);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[j] = pack_pair(__fmaf_rn(codes[j][0], scale[j % 2], start[j % 2]),
                       __fmaf_rn(codes[j][1], scale[j % 2], start[j % 2]), typename P::T{});
  }
  // kPairs: code · 2^−kDown, exact. A field within the low byte of a half, at bit b of it, is as bfloat16 a
  // number of 2^(b − 133), so it needs no shift. PTX ISA 9.7.4.4 (fma), which keeps such small numbers.
  static constexpr int kDown = L::kHighBits > 0 ? 6 + L::kLowBits : 6;  // then no factor is above 2^127
  template <int Shift>  // of the code's bits
  static __device__ __forceinline__ uint32_t add_field(uint32_t word, uint32_t mask, int bit, uint32_t added) {
    const int at = bit % 8;
    return fma_pairs((word >> (bit - at)) & mask << at, (260 - kDown + Shift - at) * 0x00800080u, added);
  }
  __device__ __forceinline__ void small_codes(uint32_t (&codes)[4], int step, int s) {
    using Low = PackedField<L::kLowBits>;
    constexpr uint32_t kTaken =
        (__builtin_bit_cast(uint32_t, -static_cast<float>(kZeroOf<F>) / (1 << kDown)) >> 16) * 0x00010001u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      codes[j] = add_field<0>(batch.low[step][Low::word(s, j)], Low::kMask, Low::bit(s, j), kTaken);
      if constexpr (L::kHighBits > 0) {
        using High = PackedField<L::kHighBits>;
        codes[j] = add_field<L::kLowBits>(batch.high[step][High::word(s, j)], High::kMask, High::bit(s, j),
                                          codes[j]);
      }
    }
  }
  // Codes of row r are in the lowest bits of a half, those of row r + 8 above them, where they come from.
  template <int Row>
  static __device__ __forceinline__ uint32_t code_of_half(uint32_t pair) {
    constexpr int kAt = Fragment::kBytes ? 0 : L::kLowBits * Row;
    constexpr int kZero = Fragment::kBytes ? 128 : kZeroOf<F>;
    static_assert(kAt + L::kBits <= 10 && kZero << kAt < 1024);
    constexpr uint32_t kTwice = 0x00010001u, kFactor = (15 - kAt) << 10;    // 2^−at
    constexpr uint32_t kTaken = 0x8000u | (25 - kAt) << 10 | kZero << kAt;  // −(1024 · 2^−at + zero)
    return kAt == 0 ? add_halves(pair, kTaken * kTwice) : fma_halves(pair, kFactor * kTwice, kTaken * kTwice);
  }
  __device__ __forceinline__ void halves_of_fragment(uint32_t (&codes)[4], int step, int s) {
    constexpr uint32_t k1024 = 0x64006400u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (Fragment::kBytes) {
        uint32_t quad;  // of columns + 0, + 8, + 1, + 9
        if constexpr (L::kBits == 8)
          quad = batch.low[step][2 * s + j % 2];
        else
          quad = F::levels((batch.low[step][s] >> (4 * (j % 2))) & 0x0f0f0f0fu);
        codes[j] = __byte_perm(quad ^ 0x80808080u, k1024, j < 2 ? 0x7250 : 0x7351);
      } else {
        using Low = PackedField<L::kLowBits>;
        const int at = L::kLowBits * (j % 2);
        codes[j] = masked_or(shift_right(batch.low[step][Low::word(s, j)], Low::bit(s, j) - at),
                             Low::kMask << at, k1024);
        if constexpr (L::kHighBits > 0) {
          using High = PackedField<L::kHighBits>;
          const int to = at + L::kLowBits;
          codes[j] = masked_or(shift_right(batch.high[step][High::word(s, j)], High::bit(s, j) - to),
                               High::kMask << to, codes[j]);
        }
      }
      codes[j] = j % 2 == 0 ? code_of_half<0>(codes[j]) : code_of_half<1>(codes[j]);
    }
  }
  __device__ __forceinline__ void codes_of_fragment(float (&codes)[4][2], int step, int s) {
    if constexpr (Fragment::kBytes) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i / 4, byte = i % 4;  // of columns + 0, + 8, + 1, + 9
        uint32_t quad;
        if constexpr (L::kBits == 8)
          quad = batch.low[step][2 * s + half];
        else
          quad = F::levels((batch.low[step][s] >> (4 * half)) & 0x0f0f0f0fu);
        quad = Fragment::kSmall ? (quad & 0x7f7f7f7fu) ^ 0x40404040u : quad ^ 0x80808080u;
        codes[half + byte % 2 * 2][byte / 2] =
            __uint_as_float(Fragment::kSmall ? __byte_perm(quad, 0x43000000u, 0x7044 | byte << 8)
                                             : __byte_perm(quad, 0x47000000u, 0x7404 | byte << 4));
      }
    } else if constexpr (L::kLowBits == 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t quad = (batch.low[step][s] >> (4 * half)) & 0x0f0f0f0fu;  // of columns as above
        if constexpr (L::kHighBits > 0) {
          using High = PackedField<L::kHighBits>;
#pragma unroll
          for (int j = half; j < 4; j += 2) {
            const int to = j / 2 * 8 + 4;
            quad = masked_or(shift_right(batch.high[step][High::word(s, j)], High::bit(s, j) - to),
                             High::kMask << to, quad);
          }
        }
#pragma unroll
        for (int byte = 0; byte < 4; ++byte)
          codes[half + byte % 2 * 2][byte / 2] =
              __uint_as_float(__byte_perm(quad, 0x43000000u, 0x7044 | byte << 8));
      }
    } else {
      uint32_t pairs[4];
      Fragment::make(batch, step, s, pairs);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        codes[j][0] = __uint_as_float(pairs[j] << 16);
        codes[j][1] = __uint_as_float(pairs[j] & 0xffff0000u);
      }
    }
  }
};

}  // namespace quantgemm::packed_wgmma

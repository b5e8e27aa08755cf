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

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Both parts of a pair of T, bfloat16 or halves: a · b + c, a · b and a + b, rounded once. PTX ISA 9.7.4.4
// (fma), 9.7.4.3 (mul) and 9.7.4.1 (add).
template <class T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (std::is_same_v<T, Half>)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <class T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (std::is_same_v<T, Half>)
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
template <class T>
__device__ __forceinline__ uint32_t add_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (std::is_same_v<T, Half>)
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// A half of a pair twice, which products read as it lies.
template <int Half>
__device__ __forceinline__ uint32_t twice(uint32_t pair) {
  uint32_t d;
  if constexpr (Half == 0)
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {low, low}; }" : "=r"(d) : "r"(pair));
  else
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, high}; }" : "=r"(d) : "r"(pair));
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
  // Low bits of a step; of two steps at a time where there are places for no more.
  __device__ __forceinline__ auto& low_of(int step) { return batch.low[step % PackedBatch<F>::kTiles]; }
  BatchAffines<F> affines[2];
  // Without offsets and where bfloat16 holds codes: code · scale in bfloat16, of a scale in two parts. The
  // conversions to and from float32 run at half the rate of arithmetic, which 256 tokens hide. At most 0.504
  // units off, and rounded once where scales are halves and codes have four bits. An infinite scale makes
  // NaN.
  static constexpr bool kPairs = P::kPairs;
  // Scales and offsets that are halves, as those of a whole block are, make weights of halves, rounded once
  // as well: a code reads 1024 + code · 2^at by its bits under an exponent, and less that it is exact.
  static constexpr bool kHalves = P::kHalves;
  // kShares: the four lanes of a row would make the same scales. Each makes those of one step, and leaves
  // them to the others: of a step and a row [group][row r, row r + 8][value].
  static constexpr int kWords = P::kShares ? P::kStepWords : 1, kValues = kPairs ? 1 : 2;
  uint32_t shared_words[P::kSlotSteps][kWords];
  float scale[2], start[2];
  uint32_t high_part[2], low_part[2];  // of rows r and r + 8, the scale, and the offset, twice

  template <int First = 0>
  __device__ __forceinline__ void load_heads(const uint8_t* strip, int record = 0) {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      const uint8_t* piece = strip + P::kHeadsAt + P::kSlotRecords * kStripRows * First +
                             static_cast<int>(L::row_in_piece(record, threadIdx.x % 32 / 4, First));
#pragma unroll
      for (int i = 0; i < (P::kShares ? 1 : P::kSlotRecords); ++i)
        load_shared<kSize / 2>(batch.heads[i] + First / 2, piece + i * kStripRows * kSize);
      load_heads<First + kSize>(strip, record);
    }
  }
  // `step` and `s` are constants where these are used. `shared` is the warp's place for scales.
  __device__ __forceinline__ void begin(const uint8_t* strip, [[maybe_unused]] uint32_t shared) {
    if constexpr (P::kShares) {
      share_scales(strip, shared);
    } else {
      load_heads(strip);
      affines[0].prepare(batch, 0);
      affines[1].prepare(batch, 1);
    }
  }
  // Two parts of a scale, bfloat16, the lower one above.
  static __device__ __forceinline__ uint32_t two_parts(float scale) {
    scale *= 1 << kDown;
    const float high = __uint_as_float(pack_pair(scale, scale, BFloat16{}) & 0xffff0000u);
    return pack_pair(high, scale - high, BFloat16{});
  }
  // A byte for each group of step `own`, of all of them.
  static __device__ __forceinline__ uint32_t codes_of_step(const uint32_t* codes, int own) {
    static_assert(F::kGroup == 16 || F::kGroup == 32);
    if constexpr (kTileCols / F::kGroup == 2) return (own < 2 ? codes[0] : codes[1]) >> own % 2 * 16;
    const uint32_t low = own == 0 ? codes[0] : codes[1], high = own == 2 ? codes[2] : codes[3];
    return own < 2 ? low : high;
  }
  __device__ __forceinline__ void share_scales(const uint8_t* strip, uint32_t shared) {
    const int own = threadIdx.x % P::kSlotSteps;
    load_heads(strip, TwoLevelFormat<F> ? 0 : own);
    uint32_t words[kWords];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto& affine_of = affines[half];
      affine_of.prepare(batch, half);
      if constexpr (TwoLevelFormat<F>) {
        affine_of.scales[0] = codes_of_step(affine_of.scales, own);
        if constexpr (F::kOffset) affine_of.offsets[0] = codes_of_step(affine_of.offsets, own);
      }
#pragma unroll
      for (int group = 0; group < kTileCols / F::kGroup; ++group) {
        const Affine affine = affine_of.get(batch, group * F::kGroup, half);
        uint32_t* const to = words + (2 * group + half) * kValues;
        if constexpr (kPairs)
          *to = two_parts(affine.scale);
        else
          to[0] = __float_as_uint(affine.scale), to[1] = __float_as_uint(start_of(affine));
      }
    }
    __syncwarp();  // those of the slot before have been read
#pragma unroll
    for (int w = 0; w < kWords; w += 4)
      store_shared(scales_at(shared, own) + w / 4 * 128,
                   make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]));
    __syncwarp();
  }
  static __device__ __forceinline__ float start_of(const Affine& affine) {
    return __fmaf_rn(-kBias, affine.scale, affine.offset);
  }
  static __device__ __forceinline__ uint32_t scales_at(uint32_t shared, int step) {
    return shared + step * (kWords / 4 * 128) + threadIdx.x % 32 / 4 * 16;
  }
  __device__ __forceinline__ void load(const uint8_t* strip, [[maybe_unused]] uint32_t shared, int step) {
    if constexpr (P::kShares) load_shared_now<kWords, 128>(shared_words[step], scales_at(shared, step));
    const int lane = threadIdx.x % 32;
    const uint32_t address = shared_address(strip) + step * L::kLowTile;
    load_shared_now<L::kLowBits, L::kLowBits == 8 ? 512 : 16>(
        low_of(step), address + static_cast<uint32_t>(PackedField<L::kLowBits>::at(lane, 0)));
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
        if constexpr (P::kShares) {
          const uint32_t* const words = shared_words[step] + (16 * s / F::kGroup * 2 + half) * kValues;
          high_part[half] = twice<0>(words[0]), low_part[half] = twice<1>(words[0]);
          scale[half] = __uint_as_float(words[0]), start[half] = __uint_as_float(words[kValues - 1]);
          continue;
        }
        const Affine affine = affines[half].get(batch, col, half);
        if constexpr (kHalves) {
          high_part[half] = pack_pair(affine.scale, affine.scale, Half{});
          low_part[half] = pack_pair(affine.offset, affine.offset, Half{});
        }
        scale[half] = affine.scale;
        start[half] = start_of(affine);
      }
    }
    if constexpr (kPairs) {
      uint32_t codes[4];
      small_codes(codes, step, s);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        a[j] = fma_pair<BFloat16>(codes[j], high_part[j % 2],
                                  multiply_pair<BFloat16>(codes[j], low_part[j % 2]));
      return;
    }
    if constexpr (kHalves) {
      uint32_t codes[4];
      halves_of_fragment(codes, step, s);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        a[j] = F::kOffset ? fma_pair<Half>(codes[j], high_part[j % 2], low_part[j % 2])
                          : multiply_pair<Half>(codes[j], high_part[j % 2]);
      return;
    }
    float codes[4][2];
    codes_of_fragment(codes, step, s);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[j] = pack_pair(__fmaf_rn(codes[j][0], scale[j % 2], start[j % 2]),
                       __fmaf_rn(codes[j][1], scale[j % 2], start[j % 2]), typename P::T{});
  }
  // Of row r or r + 8, of columns + 0, + 8, + 1, + 9.
  __device__ __forceinline__ uint32_t signed_bytes(int step, int s, int half) {
    if constexpr (L::kBits == 8)
      return low_of(step)[2 * s + half];
    else
      return F::levels((low_of(step)[s] >> (4 * half)) & 0x0f0f0f0fu);
  }
  // kPairs: code · 2^−kDown, exact. A field within the low byte of a half, at bit b of it, is as bfloat16 a
  // number of 2^(b − 133), so it needs no shift. PTX ISA 9.7.4.4 (fma), which keeps such small numbers.
  static constexpr int kDown = L::kHighBits > 0 ? 6 + L::kLowBits : 6;  // then no factor is above 2^127
  template <int Shift>                                                  // of the code's bits
  static __device__ __forceinline__ uint32_t add_field(uint32_t word, uint32_t mask, int bit,
                                                       uint32_t added) {
    const int at = bit % 8;
    return fma_pair<BFloat16>((word >> (bit - at)) & mask << at, (260 - kDown + Shift - at) * 0x00800080u,
                              added);
  }
  __device__ __forceinline__ void small_codes(uint32_t (&codes)[4], int step, int s) {
    if constexpr (Fragment::kBytes) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t quad = signed_bytes(step, s, half) ^ 0x80808080u;
        constexpr uint32_t k128 = 0xc000c000u, kFactor = 0x7f007f00u;  // −128 · 2^−6, and 2^127
        codes[half] = fma_pair<BFloat16>(quad & 0x00ff00ffu, kFactor, k128);
        codes[half + 2] = fma_pair<BFloat16>(__byte_perm(quad, 0, 0x4341), kFactor, k128);
      }
      return;
    }
    using Low = PackedField<L::kLowBits>;
    constexpr uint32_t kTaken =
        (__builtin_bit_cast(uint32_t, -static_cast<float>(kZeroOf<F>) / (1 << kDown)) >> 16) * 0x00010001u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      codes[j] = add_field<0>(low_of(step)[Low::word(s, j)], Low::kMask, Low::bit(s, j), kTaken);
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
    return kAt == 0 ? add_pair<Half>(pair, kTaken * kTwice)
                    : fma_pair<Half>(pair, kFactor * kTwice, kTaken * kTwice);
  }
  __device__ __forceinline__ void halves_of_fragment(uint32_t (&codes)[4], int step, int s) {
    constexpr uint32_t k1024 = 0x64006400u;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (Fragment::kBytes) {
        const uint32_t quad = signed_bytes(step, s, j % 2);
        codes[j] = __byte_perm(quad ^ 0x80808080u, k1024, j < 2 ? 0x7250 : 0x7351);
      } else {
        using Low = PackedField<L::kLowBits>;
        const int at = L::kLowBits * (j % 2);
        codes[j] = masked_or(shift_right(low_of(step)[Low::word(s, j)], Low::bit(s, j) - at),
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
        const int half = i / 4, byte = i % 4;
        uint32_t quad = signed_bytes(step, s, half);
        quad = Fragment::kSmall ? (quad & 0x7f7f7f7fu) ^ 0x40404040u : quad ^ 0x80808080u;
        codes[half + byte % 2 * 2][byte / 2] =
            __uint_as_float(Fragment::kSmall ? __byte_perm(quad, 0x43000000u, 0x7044 | byte << 8)
                                             : __byte_perm(quad, 0x47000000u, 0x7404 | byte << 4));
      }
    } else if constexpr (L::kLowBits == 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t quad = (low_of(step)[s] >> (4 * half)) & 0x0f0f0f0fu;  // of columns as above
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

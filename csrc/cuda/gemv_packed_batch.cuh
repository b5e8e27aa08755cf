// SPDX-License-Identifier: MIT
// A batch of a packed strip (gemv_packed_copy.cuh) times activations on tensor cores. For one token the eight
// columns of a product are eight groups of columns that share a scale: in a group's steps only its column has
// activations, the others have zeros. So one accumulator gathers eight groups' sums, and a lane decodes the
// scales of two groups, not of all. Sums of the pairs of groups of a unit (eight groups) are kept apart until
// a strip ends, as lanes have them for one token: so eight tokens add up in the same order.
#pragma once
#include "gemv_packed_copy.cuh"

namespace quantgemm::packed_gemv {

// A lane's words of a tile of a batch, which is in place `place` of a stage.
template <PackableFormat F>
struct SlotTile {
  using L = PackedLayout<F>;
  uint32_t low[1][L::kLowBits], high[1][L::kHighBits > 0 ? L::kHighBits : 1];

  template <int Bits>
  static __device__ __forceinline__ void read(uint32_t* words, const uint8_t* tile) {
    const uint8_t* own = tile + PackedField<Bits>::at(threadIdx.x % 32, 0);
    if constexpr (Bits >= 4) {
#pragma unroll
      for (int w = 0; w < Bits; w += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(own + w / 4 * 512);
        words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
      }
    } else if constexpr (Bits == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(own);
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(own);
    }
  }
  __device__ __forceinline__ void load(const uint8_t* stage, int place, int i) {
    using B = Batch<F>;
    read<L::kLowBits>(low[0], stage + place * B::kLow + i * L::kLowTile);
    if constexpr (L::kHighBits > 0)
      read<L::kHighBits>(high[0], stage + B::kHighAt + place * B::kHigh + i * L::kHighTile);
  }
};

// The affines of the groups 2c and 2c + 1 of a unit that lane 4r + c is in charge of, rows r and r + 8.
template <PackableFormat F, class Fragment>
struct OwnAffines {
  using B = Batch<F>;
  using L = PackedLayout<F>;
  Affine own[2][2];  // [group][half]

  struct Record {  // the heads of one, piece after piece, each of row r and of row r + 8
    uint32_t words[(2 * L::kRecordBytes + 3) / 4];
    __device__ __forceinline__ uint32_t head_unit(int, int half, int b) const {
      const typename L::Piece piece = L::piece_of(b);
      const int at = 2 * piece.first + half * piece.size + b - piece.first;
      return words[at / 4] >> (8 * (at % 4));
    }
    template <int First = 0>
    __device__ __forceinline__ void load(const uint8_t* stage, int place, int record) {
      if constexpr (First < L::kRecordBytes) {
        constexpr int kSize = L::piece_bytes(First);
        const int r = threadIdx.x % 32 / 4;
        const uint8_t* piece =
            stage + Run<F>::template heads_at<First>(place) + (record * kStripRows + 2 * r) * kSize;
        memcpy(words + First / 2, __builtin_assume_aligned(piece, kSize < 8 ? 2 * kSize : 16), 2 * kSize);
        load<First + kSize>(stage, place, record);
      }
    }
  };

  __device__ __forceinline__ OwnAffines(const uint8_t* stage, int place, int u) {
    const int c = threadIdx.x % 4;
    Record record;
    record.load(stage, place, (u * 8 + 2 * c) * B::kSumCols / L::kSpan);
    constexpr float kBias = Fragment::kBias, kOffsetFactor = kBias == 0 ? 1.0f : -1.0f / kBias;
    static_assert(!F::kOffset || -1.0f / kOffsetFactor == kBias || kBias == 0);  // offsets meet − kBias · Σ x
    constexpr float kScaleFactor = 1 << Fragment::kDown;
    if constexpr (TwoLevelFormat<F> || ByteScales<F>) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const HeadBlock<F> block(record, 0, half);
        Affine factors = F::factors(block.bytes);
        factors.scale *= kScaleFactor;
        uint64_t scales;
        if constexpr (TwoLevelFormat<F>)
          scales = F::scale_codes(block.bytes, u);
        else
          scales = F::scale_bytes(block.bytes, u);
        const uint32_t four = static_cast<uint32_t>(c < 2 ? scales : scales >> 32);
        uint32_t four_offsets = 0;
        if constexpr (F::kOffset) {
          const uint64_t offsets = F::offset_codes(block.bytes, u);
          four_offsets = static_cast<uint32_t>(c < 2 ? offsets : offsets >> 32);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = c % 2 * 2 + h;
          if constexpr (F::kOffset)
            own[h][half] = {BatchAffines<F>::times_code(four, i, factors.scale),
                            BatchAffines<F>::times_code(four_offsets, i, factors.offset * kOffsetFactor)};
          else
            own[h][half] = {factors.scale * byte_to_float(four, i), 0.0f};
        }
      }
    } else {  // which of a record's groups they are depends on the lane: all are decoded that it can be
      constexpr int kPair = 2 * B::kSumCols;
      constexpr int kPlaces = F::kGroup >= L::kSpan || kPair >= L::kSpan ? 1
                              : L::kSpan < 4 * kPair                     ? L::kSpan / kPair
                                                                         : 4;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int place = 0; place < kPlaces; ++place) {
            const int col = u * 8 * B::kSumCols % L::kSpan + place * kPair + h * B::kSumCols;
            Affine affine = F::affine(HeadBlock<F>(record, col, half).bytes, col % F::kElems / F::kGroup);
            affine.scale *= kScaleFactor;
            if constexpr (F::kOffset) affine.offset *= kOffsetFactor;
            if (place == 0 || c % kPlaces == place) own[h][half] = affine;
          }
    }
  }
  // Of any group of the unit; all lanes.
  __device__ __forceinline__ Affine get(int group, int half) const {
    const int source = (threadIdx.x & 28) + group / 2;
    const float offset = F::kOffset ? __shfl_sync(~0u, own[group % 2][half].offset, source) : 0.0f;
    return {__shfl_sync(~0u, own[group % 2][half].scale, source), offset};
  }
};

// pair · 2^power + added in bfloat16, in which the low byte of each half, the rest zero, is a number of
// 2^−133: so bits become a number without a shift. Integer instructions are what a batch has most of (64
// lanes a clock), this is none. Exact for eight bits. PTX ISA 9.7.4.4 (fma).
__device__ __forceinline__ uint32_t scale_bits(uint32_t pair, int power, uint32_t added) {
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"((127 + power) * 0x00800080u), "r"(added));
  return pair;
}

// The A fragment of a step: (code + kAdded) · 2^−kDown; kBias is kAdded · 2^−kDown.
template <PackableFormat F, class T>
struct Fragment : PackedFragment<F, T, false> {
  static constexpr int kDown = 0;
};
// Four-bit floats are 16-bit ones but for their exponent: a power of two.
template <PackableFormat F, class T>
  requires MiniFloats<F>
struct Fragment<F, T> {
  static constexpr int kBias = 0, kDown = 0;
  static constexpr bool kHalf = std::is_same_v<T, Half>;
  static constexpr int kAt = kHalf ? 9 : 6;  // of the lowest bit

  static __device__ __forceinline__ void make(const SlotTile<F>& tile, int, int s, uint32_t (&a)[4]) {
    using Low = PackedField<4>;
    const uint32_t word = tile.low[0][Low::word(s, 0)];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t sign = shift_right(word, 4 * j - 12) & 0x80008000u;
      a[j] = masked_or(shift_right(word, 4 * j - kAt), 0x00070007u << kAt, sign);
      if constexpr (kHalf)
        asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a[j]) : "r"(0x78007800u), "r"(0x80008000u));
      else
        a[j] = scale_bits(a[j], 127, 0x80008000u);
    }
  }
};
// Signed bytes, of a plane or by table.
template <PackableFormat F>
  requires(!MiniFloats<F> && !SmallLevels<F> && PackedFragment<F, BFloat16, false>::kBytes)
struct Fragment<F, BFloat16> {
  static constexpr int kBias = 0, kDown = 6;
  static __device__ __forceinline__ void make(const SlotTile<F>& tile, int, int s, uint32_t (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t quad;
      if constexpr (PackedLayout<F>::kBits == 8)
        quad = tile.low[0][2 * s + half];
      else
        quad = F::levels((tile.low[0][s] >> (4 * half)) & 0x0f0f0f0fu);
      quad ^= 0x80808080u;
      a[half] = scale_bits(quad & 0x00ff00ffu, 127, 0xc000c000u);  // less 128 · 2^−6
      a[half + 2] = scale_bits(__byte_perm(quad, 0, 0x4341), 127, 0xc000c000u);
    }
  }
};
// Bits of one plane or two. kDown: the largest factor a bit wants is 2^127.
template <PackableFormat F>
  requires(!MiniFloats<F> && !PackedFragment<F, BFloat16, false>::kBytes)
struct Fragment<F, BFloat16> {
  using L = PackedLayout<F>;
  static constexpr int kDown = L::kHighBits > 0 ? 6 + L::kLowBits : 6 - L::kLowBits;
  static constexpr float kBias = static_cast<float>(PackedFragment<F, BFloat16, false>::kBias) / (1 << kDown);
  static constexpr uint32_t k128 = (134 - kDown) * 0x00800080u;  // 128 · 2^−kDown

  // Bits of a code from bit Shift on, which lie at bit `at` of a byte: 2^(at − 133) and are worth 2^(Shift −
  // kDown).
  template <int Shift>
  static __device__ __forceinline__ uint32_t add_bits(uint32_t word, uint32_t mask, int at, uint32_t added) {
    static_assert(133 - kDown + Shift - (Shift > 0 ? 0 : L::kLowBits) <=
                  127);  // those at bit 0 need no factor
    return scale_bits(word & mask << at, 133 - kDown + Shift - at, added);
  }
  static __device__ __forceinline__ void make(const SlotTile<F>& tile, int, int s, uint32_t (&a)[4]) {
    using Low = PackedField<L::kLowBits>;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = Low::bit(s, j);
      const uint32_t word = tile.low[0][Low::word(s, j)] >> (at & 8);
      a[j] = at % 8 == 0 ? masked_or(word, Low::kMask, k128) : add_bits<0>(word, Low::kMask, at % 8, k128);
      if constexpr (L::kHighBits > 0) {
        using High = PackedField<L::kHighBits>;
        const int to = High::bit(s, j);
        a[j] = add_bits<L::kLowBits>(tile.high[0][High::word(s, j)] >> (to & 8), High::kMask, to % 8, a[j]);
      }
    }
  }
};

// A batch's activations. One token: lanes 4r … 4r + 3 load group r of a unit, and multiply with 1 or 0 where
// others would choose: integer multiplications have slots of their own.
template <int Tokens>
struct Activations {
  const float* starts;  // − kBias · Σ x of groups, [groups][Tokens]
  const uint8_t* at;    // the lane's, B fragments: [groups of 32][4] uint4 of two steps
  uint32_t own[8];      // 1 for column r, else 0
};
template <>
struct Activations<8> {
  const float* starts;
  uint32_t at;  // what the lane gives ldmatrix the address of
};

// Where a group of one or two steps begins among a lane's.
template <int Steps>
__device__ __forceinline__ int group_at(int group) {
  return Steps == 2 ? group * 64 : group / 2 * 64 + group % 2 * 8;
}
template <int Steps>
__device__ __forceinline__ void load_group(const uint8_t* at, uint32_t (&words)[2 * Steps]) {
  if constexpr (Steps == 2) {
    const uint4 v = *reinterpret_cast<const uint4*>(at);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(at);
    words[0] = v.x, words[1] = v.y;
  }
}

// A lane's sums of a strip. One token: [0][half], of the groups 2c and 2c + 1 of units, of row r + 8 · half;
// eight: [i][2 · half + e], of groups 2i and 2i + 1, for token 2c + e.
template <int Tokens>
struct Sums {
  static constexpr int kPairs = Tokens == 1 ? 1 : 4;
  float of[kPairs][Tokens == 1 ? 2 : 4] = {};
};

// A batch in its place of a stage times activations.
template <PackableFormat F, class T, int Tokens>
__device__ __forceinline__ void multiply(Sums<Tokens>& sums, const uint8_t* stage, int place,
                                         const Activations<Tokens>& x) {
  using B = Batch<F>;
  using Fragment = Fragment<F, T>;
  static_assert(Tokens == 1 || Tokens == 8);
  constexpr int kColumns = 8 / Tokens;  // groups in the columns of a product
  constexpr bool kStarts = Fragment::kBias != 0 || F::kOffset;
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int u = 0; u < B::kUnits; ++u) {
    const OwnAffines<F, Fragment> affines(stage, place, u);
    SlotTile<F> tile;
    uint32_t words[Tokens == 1 ? 2 * B::kSumSteps : 4], b[2 * B::kSumSteps];
    float parts[2][4];  // two chains of products, half as long
    float2 start = {0, 0};
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      const int column = g % kColumns, chain = 2 * column / kColumns;
      if constexpr (Tokens == 1) {
        if (g == 0) load_group<B::kSumSteps>(x.at + group_at<B::kSumSteps>(u * 8), words);
#pragma unroll
        for (int i = 0; i < 2 * B::kSumSteps; ++i) b[i] = words[i] * x.own[column];
      } else {
        const int run = (u * 8 + g) * B::kSumSteps / 2, within = (u * 8 + g) * B::kSumSteps % 2;
        if (within == 0) load_matrices(words, x.at + run * 64);
#pragma unroll
        for (int i = 0; i < 2 * B::kSumSteps; ++i) b[i] = words[2 * within + i];
      }
      if (column == 0) {
        if constexpr (kStarts)
          start = *reinterpret_cast<const float2*>(x.starts + (u * 8 + g) * Tokens + 2 * c);
        const float2 v = Fragment::kBias != 0 ? start : make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < (kColumns > 1 ? 2 : 1); ++i)
          parts[i][0] = parts[i][2] = v.x, parts[i][1] = parts[i][3] = v.y;
      }
#pragma unroll
      for (int i = 0; i < B::kSumSteps; ++i) {
        const int step = (u * 8 + g) * B::kSumSteps + i;
        if (step % 4 == 0) tile.load(stage, place, step / 4);
        uint32_t a[4];
        Fragment::make(tile, 0, step % 4, a);
        mma_16x8x16(parts[chain], a, b[2 * i], b[2 * i + 1], T{});
      }
      if (column + 1 < kColumns) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Affine same{};
        if constexpr (Tokens == 8) same = affines.get(g, half);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 2 * half + e;
          const float part = kColumns == 1 || c < 2 ? parts[0][at] : parts[1][at];
          const Affine affine = Tokens == 8 ? same : affines.own[e][half];
          float& sum = Tokens == 8 ? sums.of[g / 2][at] : sums.of[0][half];
          sum = __fmaf_rn(affine.scale, part, sum);
          if constexpr (F::kOffset) sum = __fmaf_rn(affine.offset, e == 0 ? start.x : start.y, sum);
        }
      }
    }
  }
}

// The sums of a row in one order, to slot[row][token].
template <int Tokens>
__device__ __forceinline__ void finish(Sums<Tokens>& sums, float* slot) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  if constexpr (Tokens == 1) {
    float low = sums.of[0][0], high = sums.of[0][1];
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
      low += __shfl_xor_sync(~0u, low, bit), high += __shfl_xor_sync(~0u, high, bit);
    if (c < 2) slot[8 * c + r] = c == 0 ? low : high;
  } else {
    const auto sum_of = [&](int i) {
      return (sums.of[0][i] + sums.of[1][i]) + (sums.of[2][i] + sums.of[3][i]);
    };
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(slot + (8 * half + r) * Tokens + 2 * c) =
          make_float2(sum_of(2 * half), sum_of(2 * half + 1));
  }
  sums = {};
}

}  // namespace quantgemm::packed_gemv

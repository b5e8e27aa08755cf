// SPDX-License-Identifier: MIT
// 256 columns of a packed strip in a slot of a warp's ring in shared memory: how they get there, and their
// product with activations on tensor cores. For one token the eight columns of a product are eight groups of
// columns that share a scale: in a group's steps only its column has activations, the others have zeros. So
// one accumulator gathers eight groups' sums, and a lane decodes the scales of two groups, not of all.
// Sums of a unit (eight groups) are kept apart until a strip ends: then eight tokens add up in the same
// order.
#pragma once
#include "packed_tile.cuh"

namespace quantgemm::packed_gemv {

template <PackableFormat F>
struct Batch {
  using L = PackedLayout<F>;
  static constexpr int kCols = 256, kTiles = kCols / kTileCols;
  static constexpr int kSumCols = F::kGroup < 32 ? F::kGroup : 32, kUnits = kCols / (8 * kSumCols);
  static constexpr int kSumSteps = kSumCols / 16;
  static constexpr int kRecords = kCols / L::kSpan;
  static constexpr int kHeadChunks = kRecords * L::kRecordBytes;  // of 16 bytes
  static constexpr int kHighAt = kTiles * L::kLowTile, kHeadsAt = kHighAt + kTiles * L::kHighTile;
  static constexpr int kBytes = kHeadsAt + 16 * kHeadChunks;
  static_assert((kSumCols == 16 || kSumCols == 32) && kHeadChunks <= 32 && L::kSpan <= kCols);
};

// Copies batches into slots, one after the other. A lane copies the same 16 bytes of each batch.
template <PackableFormat F>
struct Copier {
  using B = Batch<F>;
  using L = PackedLayout<F>;
  bytes_ptr low, high, heads;

  // Of the lane's chunk of heads: the begin of its piece, the piece's size, and its place in it.
  struct HeadChunk {
    int first = 0, size = L::piece_bytes(0), at;
    __device__ __forceinline__ HeadChunk() {
      at = static_cast<int>(threadIdx.x % 32);
#pragma unroll
      for (int next = size; next < L::kRecordBytes; next += L::piece_bytes(next))
        if (static_cast<int>(threadIdx.x % 32) >= next * B::kRecords)
          first = next, size = L::piece_bytes(next);
      at -= first * B::kRecords;
    }
    __device__ __forceinline__ int step() const { return B::kRecords * kStripRows * size; }
  };
  __device__ __forceinline__ void aim(bytes_ptr strip, int64_t k, int batch) {
    const HeadChunk chunk;
    const int lane_at = 16 * static_cast<int>(threadIdx.x % 32);
    low = strip + lane_at + int64_t{batch} * B::kHighAt;
    high = strip + lane_at + L::high_at(k) + int64_t{batch} * (B::kHeadsAt - B::kHighAt);
    heads = strip + L::heads_at(k) + L::spans(k) * kStripRows * chunk.first + 16 * chunk.at +
            int64_t{batch} * chunk.step();
  }
  // The next batch. What is behind the strip's last tile, `left` from here, becomes zero: its scales must be
  // finite.
  __device__ __forceinline__ void copy(uint32_t slot, int left) {
    const HeadChunk chunk;
    const int lane_at = 16 * static_cast<int>(threadIdx.x % 32);
    slot += lane_at;
    if (left >= B::kTiles) {
#pragma unroll
      for (int i = 0; i < L::kLowBits; ++i) cp_async16(slot + 512 * i, low + 512 * i);
#pragma unroll
      for (int i = 0; i < L::kHighBits; ++i) cp_async16(slot + B::kHighAt + 512 * i, high + 512 * i);
      if (lane_at < 16 * B::kHeadChunks) cp_async16(slot + B::kHeadsAt, heads);
    } else {
      const auto valid = [&](int i, int tile_bytes) {
        return 512 * i + lane_at < left * tile_bytes ? 16 : 0;
      };
#pragma unroll 1
      for (int i = 0; i < L::kLowBits; ++i) cp_async16(slot + 512 * i, low + 512 * i, valid(i, L::kLowTile));
#pragma unroll 1
      for (int i = 0; i < L::kHighBits; ++i)
        cp_async16(slot + B::kHighAt + 512 * i, high + 512 * i, valid(i, L::kHighTile));
      if (lane_at < 16 * B::kHeadChunks)
        cp_async16(slot + B::kHeadsAt, heads, chunk.at / chunk.size * L::kSpan < left * kTileCols ? 16 : 0);
    }
    low += B::kHighAt, heads += chunk.step();
    if constexpr (L::kHighBits > 0) high += B::kHeadsAt - B::kHighAt;
  }
};

// A lane's words of a tile of a slot.
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
  __device__ __forceinline__ void load(const uint8_t* slot, int i) {
    read<L::kLowBits>(low[0], slot + i * L::kLowTile);
    if constexpr (L::kHighBits > 0) read<L::kHighBits>(high[0], slot + Batch<F>::kHighAt + i * L::kHighTile);
  }
};

// The affines of the groups 2c and 2c + 1 of a unit that lane 4r + c is in charge of, rows r and r + 8.
template <PackableFormat F, int Bias>
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
    __device__ __forceinline__ void load(const uint8_t* heads, int record) {
      if constexpr (First < L::kRecordBytes) {
        constexpr int kSize = L::piece_bytes(First);
        const int r = threadIdx.x % 32 / 4;
        const uint8_t* piece =
            heads + kStripRows * B::kRecords * First + (record * kStripRows + 2 * r) * kSize;
        memcpy(words + First / 2, __builtin_assume_aligned(piece, kSize < 8 ? 2 * kSize : 16), 2 * kSize);
        load<First + kSize>(heads, record);
      }
    }
  };

  __device__ __forceinline__ OwnAffines(const uint8_t* slot, int u) {
    const int c = threadIdx.x % 4;
    Record record;
    record.load(slot + B::kHeadsAt, (u * 8 + 2 * c) * B::kSumCols / L::kSpan);
    constexpr float kOffsetFactor = Bias == 0 ? 1.0f : -1.0f / Bias;  // offsets meet − bias · Σ x
    static_assert(!F::kOffset || (Bias & (Bias - 1)) == 0);           // exact
    if constexpr (TwoLevelFormat<F> || ByteScales<F>) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const HeadBlock<F> block(record, 0, half);
        const Affine factors = F::factors(block.bytes);
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

// The A fragment of a step. Four-bit floats are 16-bit ones but for their exponent: a power of two.
template <PackableFormat F, class T>
struct Fragment : PackedFragment<F, T, false> {};
template <PackableFormat F, class T>
  requires MiniFloats<F>
struct Fragment<F, T> {
  static constexpr int kBias = 0;
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
        asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a[j]) : "r"(0x7f007f00u), "r"(0x80008000u));
    }
  }
};

// A batch's activations as B fragments: x is the lane's place among those of its token, [groups of 32][4]
// uint4 of two steps, and `zeros` one of so many zeros; starts, − bias · Σ x of groups, [groups][Tokens].
// sums[i]: one token: those of groups 2c and 2c + 1 of units (elements 0, 1), rows r and r + 8 (0, 2);
// eight: of group i, tokens 2c and 2c + 1.
template <PackableFormat F, class T, int Tokens>
__device__ __forceinline__ void multiply(float (&sums)[Tokens][4], const uint8_t* slot, const uint8_t* x,
                                         const uint8_t* zeros, const float* starts) {
  using B = Batch<F>;
  using Fragment = Fragment<F, T>;
  static_assert(Tokens == 1 || Tokens == 8);
  constexpr int kColumns = 8 / Tokens;  // groups in the columns of a product
  constexpr bool kStarts = Fragment::kBias != 0 || F::kOffset;
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int u = 0; u < B::kUnits; ++u) {
    const OwnAffines<F, Fragment::kBias> affines(slot, u);
    SlotTile<F> tile;
    uint32_t b[2 * B::kSumSteps];
    float parts[2][4];  // two chains of products, half as long
    float2 start = {0, 0};
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      const int column = g % kColumns, chain = 2 * column / kColumns;
      const uint8_t* const from = kColumns == 1 || r == column ? x : zeros;
      if constexpr (B::kSumSteps == 2) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + (u * 8 + g) * 64);
        b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(from + (u * 8 + g) / 2 * 64 + g % 2 * 8);
        b[0] = v.x, b[1] = v.y;
      }
      if (column == 0) {
        if constexpr (kStarts)
          start = *reinterpret_cast<const float2*>(starts + (u * 8 + g) * Tokens + 2 * c);
        const float2 v = Fragment::kBias != 0 ? start : make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < (kColumns > 1 ? 2 : 1); ++i)
          parts[i][0] = parts[i][2] = v.x, parts[i][1] = parts[i][3] = v.y;
      }
#pragma unroll
      for (int i = 0; i < B::kSumSteps; ++i) {
        const int step = (u * 8 + g) * B::kSumSteps + i;
        if (step % 4 == 0) tile.load(slot, step / 4);
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
          float& sum = sums[Tokens == 8 ? g : 0][at];
          sum = __fmaf_rn(affine.scale, part, sum);
          if constexpr (F::kOffset) sum = __fmaf_rn(affine.offset, e == 0 ? start.x : start.y, sum);
        }
      }
    }
  }
}

// The eight sums of a row in one order, to slot[token][row].
template <int Tokens>
__device__ __forceinline__ void finish(float (&sums)[Tokens][4], float* slot, int tokens) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  if constexpr (Tokens == 1) {
    float low = sums[0][0] + sums[0][1], high = sums[0][2] + sums[0][3];
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2)
      low += __shfl_xor_sync(~0u, low, bit), high += __shfl_xor_sync(~0u, high, bit);
    if (c < 2) slot[8 * c + r] = c == 0 ? low : high;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float sum = ((sums[0][e] + sums[1][e]) + (sums[2][e] + sums[3][e])) +
                        ((sums[4][e] + sums[5][e]) + (sums[6][e] + sums[7][e]));
      const int token = 2 * c + e % 2;
      if (token < tokens) slot[token * kStripRows + e / 2 * 8 + r] = sum;
    }
  }
#pragma unroll
  for (int i = 0; i < Tokens; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i][e] = 0;
}

}  // namespace quantgemm::packed_gemv

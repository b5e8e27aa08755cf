// SPDX-License-Identifier: MIT
// How a packed product divides its work and its shared memory (Plan, Split, Shared), and activations on
// their way there: as B fragments of mma.m16n8k16, so that a lane's are two 16-byte loads for a tile, with
// − kBias · Σ x of each group of columns, which is where a group's sum begins (packed_tile.cuh).
#pragma once
#include "packed_tile.cuh"

namespace quantgemm::packed_gemm {

template <PackableFormat F, class X, int TokenTiles>
struct Plan {
  using Format = F;
  using L = PackedLayout<F>;
  using Batch = PackedBatch<F>;
  // Tensor cores take 16 bits: a float32 is the sum of three bfloat16, exactly, in three columns.
  static constexpr bool kSplit = std::is_same_v<X, float>;
  using T = std::conditional_t<kSplit, BFloat16, X>;
  using Fragment = PackedFragment<F, T, kSplit>;
  static constexpr int kColumns = 8 * TokenTiles, kPerToken = kSplit ? 3 : 1, kTokens = kColumns / kPerToken;
  static constexpr int kGroup = F::kGroup < kTileCols ? F::kGroup : kTileCols;  // columns of one sum
  static constexpr int kGroups = kTileCols / kGroup;
  static constexpr bool kOffset = F::kOffset;
  // A thread block fills a multiprocessor; sums of more columns want more registers for each thread.
  static constexpr int kWarps = TokenTiles == 1 ? 16 : 12, kThreads = 32 * kWarps;
  // How k and n are divided depends on the algorithm, gemv or mma, but not on the tokens of a pass: so
  // rows of y are the same in any batch.
  static constexpr int kPlannedColumns = TokenTiles == 1 ? 8 : 32, kMostStrips = 512 / kPlannedColumns;
  // Shared memory: of a tile of activations with its sums, and of a strip's sums, per column.
  static constexpr int kTileBytes = 128, kTileSumBytes = 8 * kGroups, kStripBytes = 4 * kStripRows;
};

struct Split {
  int strips, tiles;        // in all, k's tiles
  int panels, panel_tiles;  // the last one may be shorter
  int columns;              // tokens · Plan::kPerToken, the most at a time
  int most_strips;          // of a block at a time
  int pieces_at;            // bytes of shared memory before Pieces
};

// Where shared memory is divided.
template <class P>
struct Shared {
  uint8_t* x;     // [columns][panel_tiles][2][4] uint4, x_pitch apart: fragments c of two steps
  float4* sums;   // [panel_tiles][kGroups][kColumns / 2]: of two columns, and again
  float* slots;   // [strips + P::kWarps − 1][columns][16 rows], strip s of warp w in slot s + w
  float* totals;  // [strips][columns][16 rows] of earlier panels
  // Half of what all banks hold remains: two columns that are read together lie in different banks.
  static __host__ __device__ int64_t x_pitch(const Split& split) {
    return static_cast<int64_t>(split.panel_tiles) * P::kTileBytes + 64;
  }
  static __host__ __device__ int64_t bytes(const Split& split, int strips) {
    return x_pitch(split) * split.columns + split.panel_tiles * P::kTileSumBytes * P::kColumns +
           static_cast<int64_t>(strips + P::kWarps - 1 + (split.panels > 1 ? strips : 0)) * P::kStripBytes *
               split.columns;
  }
  __device__ Shared(uint4* base, const Split& split, int strips) {
    x = reinterpret_cast<uint8_t*>(base);
    sums = reinterpret_cast<float4*>(x + x_pitch(split) * split.columns);
    slots = reinterpret_cast<float*>(sums + split.panel_tiles * P::kGroups * P::kColumns / 2);
    totals = slots + (strips + P::kWarps - 1) * split.columns * kStripRows;
  }
};

// Two neighbouring activations as 16-bit pairs of the columns of their token.
template <class T>
__device__ __forceinline__ void load_pair(const T* x, uint32_t (&pairs)[1]) {
  pairs[0] = *reinterpret_cast<const uint32_t*>(x);
}
__device__ __forceinline__ void load_pair(const float* x, uint32_t (&pairs)[3]) {
  const float2 v = *reinterpret_cast<const float2*>(x);
  float low = v.x, high = v.y;
#pragma unroll
  for (int i = 0; i < 3; ++i) {  // cut, not rounded: 8 bits and 8 and 8
    pairs[i] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
    low -= __uint_as_float(__float_as_uint(low) & 0xffff0000u);
    high -= __uint_as_float(__float_as_uint(high) & 0xffff0000u);
  }
}
template <class T>
__device__ __forceinline__ float sum_of_pair(uint32_t pair, T) {
  return to_float(T{static_cast<uint16_t>(pair)}) + to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// Activations of tiles first … first + count − 1 into shared memory. Four lanes hold a run of 32.
// row_of(token) is a token's row of x.
template <class P, class X, class RowOf>
__device__ __forceinline__ void stage(const Shared<P>& shared, const X* x, int64_t k, const Split& split,
                                      int first, int tokens, const RowOf& row_of) {
  using T = typename P::T;
  const int lane = threadIdx.x % 32;
  const int count = min(split.tiles - first, split.panel_tiles), items = tokens * count * 8;
  const int pitch = static_cast<int>(Shared<P>::x_pitch(split));
#pragma unroll 2
  for (int base = threadIdx.x - lane; base < items; base += P::kThreads) {
    const int i = base + lane, c = i % 4, run = i / 4 % 2, tile = i / 8 % count, token = i / 8 / count;
    uint32_t words[4][P::kPerToken] = {};
    const int64_t col = static_cast<int64_t>(first + tile) * kTileCols + 32 * run;
    if (i < items && col < k) {
      const X* from = x + row_of(token) * k + col + 2 * c;
#pragma unroll
      for (int w = 0; w < 4; ++w) load_pair(from + 8 * w, words[w]);
    }
#pragma unroll
    for (int p = 0; p < P::kPerToken; ++p) {
      const int column = token * P::kPerToken + p;
      float early = sum_of_pair(words[0][p], T{}) + sum_of_pair(words[1][p], T{}),
            late = sum_of_pair(words[2][p], T{}) + sum_of_pair(words[3][p], T{});
      if constexpr (P::kGroup > 16) early += late;
#pragma unroll
      for (int bit = 1; bit < (P::kGroup > 32 ? 8 : 4); bit *= 2) {
        early += __shfl_xor_sync(~0u, early, bit);
        if constexpr (P::kGroup == 16) late += __shfl_xor_sync(~0u, late, bit);
      }
      if (i >= items) continue;
      *reinterpret_cast<uint4*>(shared.x + column * pitch + (tile * 8 + run * 4 + c) * 16) =
          make_uint4(words[0][p], words[1][p], words[2][p], words[3][p]);
      constexpr float kStart = P::Fragment::kBias == 0 ? 1.0f : -1.0f * P::Fragment::kBias;
      auto* sums = reinterpret_cast<float*>(
          shared.sums + (tile * P::kGroups + run * P::kGroups / 2) * (P::kColumns / 2) + column / 2);
      if (c == 0 && (P::kGroup <= 32 || run == 0)) sums[column % 2] = sums[column % 2 + 2] = kStart * early;
      if (P::kGroup == 16 && c == 0) {
        sums += 2 * P::kColumns;
        sums[column % 2] = sums[column % 2 + 2] = kStart * late;
      }
    }
  }
}

// One output from decoded weights. Infinity less infinity, where the bias is taken back, is not what the
// weights say: a sum that came out as NaN is computed again this way.
template <PackableFormat F, class X>
__device__ __noinline__ float dot_decoded(bytes_ptr strip, int row, const X* x, int64_t k) {
  float sum = 0;
  for (int64_t e = 0; e < k; ++e) sum += to_float(x[e]) * packed_weight<F>(strip, k, row, e);
  return sum;
}

}  // namespace quantgemm::packed_gemm

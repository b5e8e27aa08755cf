// SPDX-License-Identifier: MIT
// How a packed product for up to eight tokens divides its work and its shared memory (Plan, Split, Shared),
// and activations on their way there: as B fragments of mma.m16n8k16, a lane's of 32 columns side by side,
// with − kBias · Σ x of each group of columns, which is where a group's sum begins (packed_tile.cuh).
#pragma once
#include "dependent_launch.cuh"
#include "gemv_packed_batch.cuh"
#include "packed_pieces.cuh"

namespace quantgemm::packed_gemv {

struct Split : packed_gemm::Split {
  int staged;      // panels whose activations are in shared memory at a time
  int ring;        // slots of a warp
  int each, more;  // strips of a block, and blocks that have one more
};

template <PackableFormat F, class X, int Tokens>
struct Plan {
  using B = Batch<F>;
  using Eight = Plan<F, X, 8>;
  static constexpr int kTokens = Tokens, kPlannedTokens = 8, kMostStrips = 64, kFewestBatches = 4;
  static constexpr int kWarps = 32 * B::kBytes <= 110000 ? 16 : 12, kThreads = 32 * kWarps;
  // Slots of a ring. More bytes on their way cost time before the first product, and gain some in long work.
  static constexpr int kSlots = kWarps * B::kBytes, kMany = 115000 / kSlots;
  static constexpr int kRing = Tokens > 1 || kMany < 2 ? 2 : kMany > 4 ? 4 : kMany;
  static constexpr int kDeepRing = Tokens == 1 && kRing == 2 && 3 * kSlots < 165000 ? 3 : kRing;
  static constexpr int kLongWork = 400000;              // bytes of a block
  static constexpr int kSums = B::kCols / B::kSumCols;  // of a batch
  // Shared memory of a batch of activations, and of a strip's sums, per token.
  static constexpr int kBatchBytes = 2 * B::kCols, kSumBytes = 4 * kSums, kStripBytes = 4 * kStripRows;
};

// Where shared memory is divided.
template <class P>
struct Shared {
  uint8_t *ring, *x;      // [warps][split.ring][slot]; [tokens][batches][8][4] uint4, x_pitch apart
  float *starts, *slots;  // [batches][kSums][kTokens]; [staged panels][strips + warps − 1][tokens][16 rows]
  float* totals;          // [strips][tokens][16 rows] of earlier panels
  int2* ends;             // [staged panels][strips]: warps of a strip's first and last batch

  static __host__ __device__ int panels(const Split& split) {
    return split.panels < split.staged ? split.panels : split.staged;
  }
  static __host__ __device__ int total_floats(const Split& split, int strips) {
    return split.panels > split.staged ? strips * split.columns * kStripRows : 0;
  }
  static __host__ __device__ int64_t batches(const Split& split) {
    return int64_t{1} * split.panel_tiles / P::B::kTiles * panels(split);
  }
  // Half of what all banks hold remains: two tokens that are read together lie in different banks. One token
  // has a batch of zeros behind it.
  static __host__ __device__ int64_t x_pitch(const Split& split) {
    return batches(split) * P::kBatchBytes + (P::kTokens == 1 ? P::kBatchBytes : 64);
  }
  static __host__ __device__ int64_t bytes(const Split& split, int strips) {
    return int64_t{split.ring} * P::kSlots + int64_t{split.columns} * x_pitch(split) +
           batches(split) * P::kSumBytes * P::kTokens +
           int64_t{panels(split)} * (8 * strips + (strips + P::kWarps - 1) * P::kStripBytes * split.columns) +
           total_floats(split, strips) * 4;
  }
  __device__ Shared(uint4* base, const Split& split, int strips) {
    ring = reinterpret_cast<uint8_t*>(base);
    x = ring + split.ring * P::kSlots;
    starts = reinterpret_cast<float*>(x + split.columns * x_pitch(split));
    slots = starts + batches(split) * P::kSums * P::kTokens;
    totals = slots + panels(split) * (strips + P::kWarps - 1) * split.columns * kStripRows;
    ends = reinterpret_cast<int2*>(totals + total_floats(split, strips));
  }
  __device__ float* slot(const Split& split, int strips, int panel, int strip, int warp) const {
    return slots + (panel * (strips + P::kWarps - 1) + strip + warp) * split.columns * kStripRows;
  }
};

// Activations of `panels` panels from `first` on, and zeros behind k. Four lanes hold a run of 32 columns.
// row_of(token) is a token's row of x.
template <class P, int Bias, class X, class RowOf>
__device__ __forceinline__ void stage(const Shared<P>& shared, const X* x, int64_t k, const Split& split,
                                      int first, int tokens, const RowOf& row_of, bool let_next) {
  constexpr int kAtOnce = 4;  // loads under way: of a token's columns, or of tokens
  constexpr int kNext = P::kTokens == 1 ? P::kThreads : 0, kNextToken = P::kTokens == 1 ? 0 : 1;
  const int tiles = (split.tiles + 3) / 4 * 4 - first * split.panel_tiles;
  const int lanes = 8 * min(tiles, split.staged * split.panel_tiles), pitch = Shared<P>::x_pitch(split);
  if (P::kTokens == 1 && threadIdx.x < P::kBatchBytes / 16)
    *reinterpret_cast<uint4*>(shared.x + pitch - P::kBatchBytes + threadIdx.x * 16) = make_uint4(0, 0, 0, 0);
  const int64_t first_col = int64_t{first} * split.panel_tiles * kTileCols;
#pragma unroll 1
  for (int base = threadIdx.x; base - static_cast<int>(threadIdx.x % 32) < lanes;
       base += kNext == 0 ? P::kThreads : kAtOnce * kNext)
#pragma unroll 1
    for (int base_token = 0; base_token < tokens; base_token += kNext == 0 ? kAtOnce : 1) {
      uint32_t words[kAtOnce][4] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + j * kNext, token = base_token + j * kNextToken;
        const int64_t col = first_col + 8 * (i & ~3);
        if (i >= lanes || token >= tokens || col >= k) continue;
        const X* from = x + row_of(token) * k + col + 2 * (i % 4);
#pragma unroll
        for (int w = 0; w < 4; ++w) words[j][w] = *reinterpret_cast<const uint32_t*>(from + 8 * w);
      }
      if (let_next) let_next_kernel_start();  // its copies would have been in the way of these loads
      let_next = false;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + j * kNext, token = base_token + j * kNextToken;
        const auto sum_of = [&](int w) { return packed_gemm::sum_of_pair(words[j][w], X{}); };
        float early = sum_of(0) + sum_of(1), late = sum_of(2) + sum_of(3);
        if constexpr (P::B::kSumCols == 32) early += late;
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2) {
          early += __shfl_xor_sync(~0u, early, bit);
          if constexpr (P::B::kSumCols == 16) late += __shfl_xor_sync(~0u, late, bit);
        }
        if (i >= lanes || token >= tokens) continue;
        *reinterpret_cast<uint4*>(shared.x + token * pitch + i * 16) =
            make_uint4(words[j][0], words[j][1], words[j][2], words[j][3]);
        constexpr float kStart = Bias == 0 ? 1.0f : -1.0f * Bias;
        float* starts = shared.starts + i / 4 * (32 / P::B::kSumCols) * P::kTokens + token;
        if (i % 4 == 0) *starts = kStart * early;
        if (P::B::kSumCols == 16 && i % 4 == 0) starts[P::kTokens] = kStart * late;
      }
    }
}

}  // namespace quantgemm::packed_gemv

// SPDX-License-Identifier: MIT
// How a packed product for up to eight tokens divides its work and its shared memory (Plan, Split, Shared),
// and activations on their way there: as B fragments of mma.m16n8k16, a lane's of 32 columns side by side,
// with − kBias · Σ x of each group of columns, which is where a group's sum begins (packed_tile.cuh). An RMS
// norm in front of the product is done on that way too: every thread block has all of x.
#pragma once
#include "dependent_launch.cuh"
#include "gemv_packed_batch.cuh"
#include "packed_pieces.cuh"
#include "rms_norm.cuh"

namespace quantgemm::packed_gemv {

struct Split : packed_gemm::Split {
  int staged;      // panels whose activations are in shared memory at a time
  int round;       // strips whose sums are, before they become rows of y
  int ring;        // stages
  int each, more;  // strips of a block, and blocks that have one more
};

template <PackableFormat F, class X, int Tokens>
struct Plan {
  using B = Batch<F>;
  using Eight = Plan<F, X, 8>;
  static constexpr int kTokens = Tokens, kPlannedTokens = 8, kMostStrips = 64, kFewestBatches = 4;
  static constexpr int kFewestRound = 2;  // a strip of w and one of up
  // Warps that multiply; behind them one that asks for weights, whose group of four takes the fewest
  // registers: what it gives away is what the others get.
  static constexpr int kWarps = B::kWarps, kThreads = 32 * kWarps, kAllThreads = kThreads + 128;
  static constexpr int kMultiplierRegisters = kWarps == 16 ? 112 : 152;
  static constexpr int kCopierRegisters = kWarps == 16 ? 32 : 56;
  static constexpr int kMany = 115000 / B::kStage;  // more than the way from memory needs
  static constexpr int kRing = Tokens > 1 || kMany < 2 ? 2 : kMany > 4 ? 4 : kMany;
  static constexpr int kDeepRing = Tokens == 1 && kRing == 2 && 3 * B::kStage < 165000 ? 3 : kRing;
  static constexpr int kLongWork = 400000;              // bytes of a block
  static constexpr int kSums = B::kCols / B::kSumCols;  // of a batch
  // Shared memory of a batch of activations, its sums, and a strip's sums, per token.
  static constexpr int kBatchBytes = 2 * B::kCols, kSumBytes = 4 * kSums, kStripBytes = 4 * kStripRows;
};

// What a place of a stage holds.
struct alignas(16) Note {
  int batch;  // of the staged activations
  int sums;   // where the strip's sums belong among the round's, in floats
  int last;   // whether the warp has no more of this strip and panel
};

// Where shared memory is divided.
template <class P>
struct Shared {
  uint8_t *ring, *x;       // [split.ring][stage]; [tokens][batches][8][4] uint4, x_pitch apart
  uint64_t *full, *empty;  // [split.ring], barriers
  Note* notes;             // [split.ring][warps]
  float *starts, *sums;    // [batches][kSums][kTokens]; [staged panels][round][warps][tokens][16 rows]
  float* totals;           // [strips][tokens][16 rows] of earlier panels

  static __host__ __device__ int panels(const Split& split) {
    return split.panels < split.staged ? split.panels : split.staged;
  }
  static __host__ __device__ int total_floats(const Split& split, int strips) {
    return split.panels > split.staged ? strips * split.columns * kStripRows : 0;
  }
  static __host__ __device__ int64_t batches(const Split& split) {
    return int64_t{1} * split.panel_tiles / P::B::kTiles * panels(split);
  }
  // Half of what all banks hold remains: two tokens that are read together lie in different banks.
  static __host__ __device__ int64_t x_pitch(const Split& split) {
    return batches(split) * P::kBatchBytes + 64;
  }
  static __host__ __device__ int64_t round_bytes(const Split& split) {  // of one strip
    return int64_t{panels(split)} * P::kWarps * split.columns * P::kStripBytes;
  }
  static constexpr int kNotesBytes = P::kWarps * sizeof(Note);  // of a stage
  static __host__ __device__ int64_t bytes(const Split& split, int strips) {
    return int64_t{split.ring} * (P::B::kStage + 16 + kNotesBytes) + int64_t{split.columns} * x_pitch(split) +
           batches(split) * P::kSumBytes * P::kTokens + split.round * round_bytes(split) +
           int64_t{total_floats(split, strips)} * 4;
  }
  __device__ Shared(uint4* base, const Split& split) {
    static_assert(kNotesBytes % 16 == 0);
    ring = reinterpret_cast<uint8_t*>(base);
    full = reinterpret_cast<uint64_t*>(ring + split.ring * P::B::kStage), empty = full + split.ring;
    notes = reinterpret_cast<Note*>(empty + split.ring);
    x = reinterpret_cast<uint8_t*>(notes + split.ring * P::kWarps);
    starts = reinterpret_cast<float*>(x + split.columns * x_pitch(split));
    sums = starts + batches(split) * P::kSums * P::kTokens;
    totals = sums + split.round * round_bytes(split) / 4;
  }
};

// Unit i of a token's row, eight columns of 32 as a lane has them, to its place. A warp's lanes call this
// together; `some` of them have one.
template <class P, float Bias, class X>
__device__ __forceinline__ void put_unit(const Shared<P>& shared, int pitch, const uint32_t (&words)[4],
                                         int i, int token, bool some, X) {
  const auto sum_of = [&](int w) { return packed_gemm::sum_of_pair(words[w], X{}); };
  float early = sum_of(0) + sum_of(1), late = sum_of(2) + sum_of(3);
  if constexpr (P::B::kSumCols == 32) early += late;
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    early += __shfl_xor_sync(~0u, early, bit);
    if constexpr (P::B::kSumCols == 16) late += __shfl_xor_sync(~0u, late, bit);
  }
  if (!some) return;
  *reinterpret_cast<uint4*>(shared.x + token * pitch + i * 16) =
      make_uint4(words[0], words[1], words[2], words[3]);
  constexpr float kStart = Bias == 0 ? 1.0f : -1.0f * Bias;
  float* starts = shared.starts + i / 4 * (32 / P::B::kSumCols) * P::kTokens + token;
  if (i % 4 == 0) *starts = kStart * early;
  if (P::B::kSumCols == 16 && i % 4 == 0) starts[P::kTokens] = kStart * late;
}

// Of the panels from `first` on that are staged together, and of zeros behind k.
__device__ __forceinline__ int num_units(const Split& split, int first) {
  const int tiles = (split.tiles + 3) / 4 * 4 - first * split.panel_tiles;
  return 8 * min(tiles, split.staged * split.panel_tiles);
}

// Activations of `panels` panels from `first` on, and zeros behind k. Four lanes hold a run of 32 columns.
// row_of(token) is a token's row of x. By the kThreads threads that multiply, whose barrier is sync_some<1>.
template <class P, float Bias, class X, class RowOf>
__device__ __forceinline__ void stage(const Shared<P>& shared, const X* x, int64_t k, const Split& split,
                                      int first, int tokens, const RowOf& row_of, bool let_next) {
  constexpr int kAtOnce = P::kTokens == 1 ? 4 : 8;  // loads under way: of a token's columns, or of tokens
  constexpr int kNext = P::kTokens == 1 ? P::kThreads : 0, kNextToken = P::kTokens == 1 ? 0 : 1;
  const int lanes = num_units(split, first), pitch = static_cast<int>(Shared<P>::x_pitch(split));
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
        put_unit<P, Bias>(shared, pitch, words[j], i, token, i < lanes && token < tokens, X{});
      }
    }
}

// Of columns `col` on, which a lane has of 32; zeros behind k.
template <class X>
__device__ __forceinline__ void load_words(uint32_t (&words)[4], const X* row, int col, int k) {
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = col < k ? *reinterpret_cast<const uint32_t*>(row + col + 8 * w) : 0;
}

// The norm in front of a product. What a launch runs through once costs it the fetching of instructions, so
// these are loops over one unit where they can be.
template <class X, int Tokens>
struct Norm {
  // Of the tokens: of each warp of rms::kThreads its sum of squares, and what x is multiplied by. Ring and
  // activations lie behind this, at their own boundaries.
  struct alignas(128) Memory {
    float sums[rms::kWarps][Tokens], factors[Tokens];
  };
  const X* weight;  // [k], or null: none
  float eps;
  Memory& memory;

  // Before anything is waited for: in a model other layers' weights have pushed these out of L2.
  template <class P>
  __device__ __forceinline__ void prefetch(int64_t k) const {
    constexpr int kLine = 128 / sizeof(X);
    if (weight == nullptr) return;
#pragma unroll 1
    for (int64_t at = int64_t{kLine} * threadIdx.x; at < k; at += kLine * P::kThreads)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + at));  // PTX ISA 9.7.9.15
  }

  // All threads; lane l gets the factor of token l % Tokens.
  template <class P>
  __device__ __forceinline__ float factor(const X* x, int k, int tokens) const {
    constexpr int kAtOnce = Tokens < 4 ? Tokens : 4;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int as_warp = threadIdx.x / 32; as_warp < rms::kWarps; as_warp += P::kWarps)
#pragma unroll 1
      for (int token = 0; token < tokens; token += kAtOnce) {
        float sums[kAtOnce] = {};
#pragma unroll 1
        for (int col = rms::first_col(32 * as_warp + lane); col < k; col += 8 * rms::kThreads) {
          uint32_t words[kAtOnce][4];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j)  // all loads at once
            load_words(words[j], x + int64_t{min(token + j, tokens - 1)} * k, col, k);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
            for (int w = 0; w < 4; ++w)
              rms::add_squares(sums[j], rms::half_of<X>(words[j][w], 0), rms::half_of<X>(words[j][w], 1));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sums[j] = rms::sum_of_lanes(sums[j]);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (lane == 0) memory.sums[as_warp][token + j] = sums[j];
      }
    sync_some<1, P::kThreads>();
    const float* const own = memory.sums[0] + lane % Tokens;
    const float found = rms::factor_of(rms::sum_of_warps(own, Tokens), k, eps);
    if (threadIdx.x < Tokens) memory.factors[threadIdx.x] = found;
    return found;
  }
};

// One output of a norm and decoded weights, as packed_gemm::dot_decoded.
template <PackableFormat F, class X>
__device__ __noinline__ float dot_normalized(bytes_ptr strip, int row, const X* x, int64_t k, const X* weight,
                                             float factor) {
  float sum = 0;
  for (int64_t e = 0; e < k; ++e) {
    const float value = rms::normalized<X>(to_float(x[e]), to_float(weight[e]), factor);
    sum += rms::rounded<X>(value) * packed_weight<F>(strip, k, row, e);
  }
  return sum;
}

// The same, behind a norm. Experts have none. Out of line: the plain product keeps its registers.
template <class P, float Bias, class X>
__device__ __noinline__ void stage_normalized(Shared<P> shared, const X* x, int k, Split split, int first,
                                              bool let_next, Norm<X, P::kTokens> norm) {
  constexpr int kAtOnce = P::kTokens < 4 ? P::kTokens : 4;
  const int lanes = num_units(split, first), pitch = static_cast<int>(Shared<P>::x_pitch(split));
  const int first_unit = first * split.panel_tiles * (kTileCols / 8), tokens = split.columns;
  uint32_t scales[4], next_scales[4];  // under way before they are needed, first while x is summed
  load_words(next_scales, norm.weight, rms::first_col<int>(first_unit + threadIdx.x), k);
  const float factor = norm.template factor<P>(x, k, tokens);
  if (let_next) let_next_kernel_start();
#pragma unroll 1
  for (int i = threadIdx.x; i - static_cast<int>(threadIdx.x % 32) < lanes; i += P::kThreads) {
    const int col = rms::first_col(first_unit + i), next_col = col + 8 * P::kThreads;
#pragma unroll
    for (int w = 0; w < 4; ++w) scales[w] = next_scales[w];
    load_words(next_scales, norm.weight, next_col, k);
#pragma unroll 1
    for (int base = 0; base < tokens; base += kAtOnce) {
      uint32_t words[kAtOnce][4];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        load_words(words[j], x + int64_t{min(base + j, tokens - 1)} * k, col, k);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float own = P::kTokens == 1 ? factor : __shfl_sync(~0u, factor, base + j);
#pragma unroll
        for (int w = 0; w < 4; ++w) words[j][w] = rms::normalized_pair<X>(words[j][w], scales[w], own);
        put_unit<P, Bias>(shared, pitch, words[j], i, base + j, i < lanes && base + j < tokens, X{});
      }
    }
  }
}

}  // namespace quantgemm::packed_gemv

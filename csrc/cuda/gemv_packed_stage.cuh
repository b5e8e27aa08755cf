// SPDX-License-Identifier: MIT
// How a packed product for up to eight tokens divides its work and its shared memory (Plan, Split, Shared),
// and activations on their way there, with − kBias · Σ x of each group of columns, which is where a group's
// sum begins (packed_tile.cuh). One token: as B fragments of mma.m16n8k16, a lane's of 32 columns side by
// side; eight: as they are in memory, for ldmatrix makes fragments of them. An RMS norm in front of the
// product (bfloat16) is part of that too: x goes there times the norm's weight, and of each batch the sum of
// the squares of x is left for the end, where the norm's factor multiplies sums. Sums of squares are added
// up in the same order for one token and for eight.
#pragma once
#include "dependent_launch.cuh"
#include "gemv_packed_batch.cuh"
#include "packed_pieces.cuh"
#include "rms_norm.cuh"

namespace quantgemm::packed_gemv {

struct Split : packed_gemm::Split {
  int staged;        // panels whose activations are in shared memory at a time
  int round;         // strips whose sums are, before they become rows of y
  int ring;          // stages
  int each, more;    // strips of a block, and blocks that have one more
  int whole_stages;  // whether every warp has a batch of every panel of a strip
  // What every block would have to compute before it can ask for anything: bytes of a token's activations and
  // of a strip, places in shared memory (Shared) in units of 16 bytes.
  int x_pitch, strip_bytes, barriers_at, x_at, starts_at, sums_at, totals_at, squares_at;
  int normed;  // whether there is a norm in front
};

template <class X>
inline constexpr bool kHasNorm = std::is_same_v<X, BFloat16>;  // float16 might overflow

template <PackableFormat F, class X, int Tokens>
struct Plan {
  using B = Batch<F>;
  using Eight = Plan<F, X, 8>;
  static constexpr int kTokens = Tokens, kPlannedTokens = 8, kMostStrips = 64, kFewestBatches = 4;
  static constexpr int kFewestRound = 2;  // a strip of w and one of up
  // Warps that multiply; behind them, for every four of those, one that asks for their weights. Their group
  // of four takes the fewest registers: what it gives away is what the others get.
  static constexpr int kWarps = B::kWarps, kThreads = 32 * kWarps, kAllThreads = kThreads + 128;
  static constexpr int kQuarters = kWarps / 4, kTurnBytes = 8 * kQuarters;  // of a stage
  static constexpr int kBeforeX = Tokens == 1 ? kQuarters : kQuarters - 1;  // quarters asked for at a time
  static constexpr int kMultiplierRegisters = kWarps == 16 ? 112 : 152;
  static constexpr int kCopierRegisters = kWarps == 16 ? 32 : 56;
  static constexpr int kMany = 115000 / B::kStage;  // more than the way from memory needs
  static constexpr int kRing = Tokens > 1 || kMany < 2 ? 2 : kMany > 4 ? 4 : kMany;
  static constexpr int kDeepRing = Tokens == 1 && kRing == 2 && 3 * B::kStage < 165000 ? 3 : kRing;
  static constexpr int kLongWork = 400000;              // bytes of a block
  static constexpr int kSums = B::kCols / B::kSumCols;  // of a batch
  static constexpr bool kNeedsStarts = Fragment<F, X>::kBias != 0 || F::kOffset;
  // Shared memory of a batch of activations, its sums, and a strip's sums, per token.
  static constexpr int kBatchBytes = 2 * B::kCols, kSumBytes = 4 * kSums;
  // A warp's sums of a strip, [16 rows][tokens]: how many, and tokens of a row that one thread adds up.
  static constexpr int kStripSums = Tokens * kStripRows, kEach = Tokens == 1 ? 1 : 2;
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
  uint64_t *full, *empty;  // [split.ring][quarters], barriers
  uint64_t* has_x;         // [quarters], barriers: the first activations are no longer on their way
  Note* notes;             // [split.ring][warps]
  float *starts, *sums;    // [batches][kSums][kTokens]; [staged panels][round][warps][16 rows][kTokens]
  float* totals;           // [strips][16 rows][kTokens] of earlier panels
  float* squares;          // [batches of all panels][kTokens]

  static constexpr int kMostRing = 4, kNotesBytes = P::kWarps * sizeof(Note);  // of a stage
  // From split.barriers_at on.
  static constexpr int kEmptyAt = kMostRing * P::kTurnBytes, kHasXAt = 2 * kEmptyAt;
  static constexpr int kNotesAt = (kHasXAt + P::kTurnBytes + 15) / 16 * 16;
  static_assert(P::kRing <= kMostRing && P::kDeepRing <= kMostRing);

  static __host__ __device__ int num_batches(const Split& split) {
    return (split.tiles + P::B::kTiles - 1) / P::B::kTiles;
  }
  static int panels(const Split& split) { return split.panels < split.staged ? split.panels : split.staged; }
  static int64_t round_bytes(const Split& split) {  // of one strip
    return int64_t{panels(split)} * P::kWarps * P::kStripSums * 4;
  }
  // All bytes.
  static int64_t place(Split& split, int strips) {
    const int64_t batches = int64_t{1} * split.panel_tiles / P::B::kTiles * panels(split);
    int64_t at = int64_t{split.ring} * P::B::kStage;
    const auto next = [&at](int64_t bytes) { return static_cast<int>(((at += bytes) - bytes) / 16); };
    // 16 bytes of each of eight tokens, which are read together, lie in all banks.
    static_assert(P::B::kStage % 16 == 0 && kNotesBytes % 16 == 0 && P::kBatchBytes % 16 == 0 &&
                  P::kSumBytes % 16 == 0);
    const int64_t pitch = batches * P::kBatchBytes + 16;
    split.x_pitch = static_cast<int>(pitch);
    split.barriers_at = next(kNotesAt + split.ring * kNotesBytes);
    split.x_at = next(split.columns * pitch);
    split.starts_at = next(batches * P::kSumBytes * P::kTokens);
    split.sums_at = next(split.round * round_bytes(split));
    split.totals_at = next(split.panels > split.staged ? int64_t{4} * strips * P::kStripSums : 0);
    split.squares_at = next(split.normed ? (int64_t{4} * num_batches(split) * P::kTokens + 15) / 16 * 16 : 0);
    return at;
  }
  __device__ __forceinline__ Shared(uint4* memory, const Split& split) {
    uint8_t* const barriers = reinterpret_cast<uint8_t*>(memory + split.barriers_at);
    full = reinterpret_cast<uint64_t*>(barriers), empty = reinterpret_cast<uint64_t*>(barriers + kEmptyAt);
    has_x = reinterpret_cast<uint64_t*>(barriers + kHasXAt);
    notes = reinterpret_cast<Note*>(barriers + kNotesAt), ring = reinterpret_cast<uint8_t*>(memory);
    x = reinterpret_cast<uint8_t*>(memory + split.x_at);
    starts = reinterpret_cast<float*>(memory + split.starts_at);
    sums = reinterpret_cast<float*>(memory + split.sums_at);
    totals = reinterpret_cast<float*>(memory + split.totals_at);
    squares = reinterpret_cast<float*>(memory + split.squares_at);
  }
};

// − Bias · Σ x of groups of columns, from B fragments of 32 of them that have eight runs of a token side by
// side, or eight tokens, by a product with a matrix of which all elements are − Bias. All of a warp's lanes.
template <class P, float Bias, bool OfRuns, class X>
__device__ __forceinline__ void put_starts(const Shared<P>& shared, const uint32_t (&words)[4], int run,
                                           int token, X) {
  if constexpr (!P::kNeedsStarts) return;
  X factor;
  store1(&factor, Bias == 0 ? 1.0f : -1.0f * Bias);
  const uint32_t pair = factor.bits * 0x00010001u, all[4] = {pair, pair, pair, pair};
  float early[4] = {}, late[4] = {};
  mma_16x8x16(early, all, words[0], words[1], X{});
  mma_16x8x16(P::B::kSumCols == 32 ? early : late, all, words[2], words[3], X{});
  const int lane = threadIdx.x % 32;
  if (lane >= 4) return;  // the first row is as good as any
  constexpr int kOfRun = 32 / P::B::kSumCols * P::kTokens;
  constexpr int kNext = OfRuns ? kOfRun : 1;
  float* const starts = shared.starts + run * kOfRun + token + 2 * lane * kNext;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    starts[e * kNext] = early[e];
    if constexpr (P::B::kSumCols == 16) starts[e * kNext + P::kTokens] = late[e];
  }
}

// Unit i of the token's row, eight columns of 32 as a lane has them, to its place. A warp's lanes have those
// of a batch.
template <class P, float Bias, class X>
__device__ __forceinline__ void put_unit(const Shared<P>& shared, const uint32_t (&words)[4], int i, X) {
  put_starts<P, Bias, true>(shared, words, i / 32 * 8, 0, X{});
  *reinterpret_cast<uint4*>(shared.x + i * 16) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Pairs of x times those of a norm's weight, rounded. PTX ISA 9.7.4.4: mul would need compute capability 9.0.
__device__ __forceinline__ uint32_t times(uint32_t pair, uint32_t weights) {
  constexpr uint32_t kMinusZeros = 0x80008000u;  // which change no product
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(weights), "r"(kMinusZeros));
  return pair;
}

template <class X>
__device__ __forceinline__ float squares_of(uint32_t pair) {
  float sum = 0;
  rms::add_squares(sum, rms::half_of<X>(pair, 0), rms::half_of<X>(pair, 1));
  return sum;
}

// Sums of N values over lanes, of which each is left with one: value 0 where the bits `Step`, Step / 2, … of
// its number are zeros. Each step halves what is left to exchange.
template <int Step, int N>
__device__ __forceinline__ float share_sums(float (&values)[N]) {
  int step = Step;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? values[i] : values[i + half];
      values[i] = (upper ? values[i + half] : values[i]) + __shfl_xor_sync(~0u, given, step);
    }
  }
  return values[0];
}

// Of the panels from `first` on that are staged together, and of zeros behind k.
__device__ __forceinline__ int num_units(const Split& split, int first) {
  const int tiles = (split.tiles + 3) / 4 * 4 - first * split.panel_tiles;
  return 8 * min(tiles, split.staged * split.panel_tiles);
}

// Activations of the panels from `first` on that are staged together, and zeros behind k, by the kThreads
// threads that multiply. `begins`: these are the first. Then all there is to compute is computed before the
// previous kernel has ended; the next one may start when the loads are on their way, its own would be in
// front of them. One token, as B fragments; four lanes hold a run of 32 columns.
template <class P, float Bias, class X>
__device__ __forceinline__ void stage_one(const Shared<P>& shared, const X* x, int k, const Split& split,
                                          int first, bool begins, const X* norm) {
  constexpr int kAtOnce = 4;  // loads under way
  const bool normed = kHasNorm<X> && norm != nullptr;
  const int lanes = num_units(split, first), first_col = first * split.panel_tiles * kTileCols;
  const int own_col = first_col + 8 * (threadIdx.x & ~3);
  const int end = min(k, first_col + 8 * lanes);
  uint32_t at = own_col + 2 * (threadIdx.x % 4), left = max(end - own_col, 0);
  keep_in_register(at), keep_in_register(left);
  if (begins) wait_for_previous_kernel();
#pragma unroll 1
  for (int base = threadIdx.x; base - static_cast<int>(threadIdx.x % 32) < lanes;
       base += kAtOnce * P::kThreads) {
    uint32_t words[kAtOnce][4] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (left > j * 8 * P::kThreads) {
#pragma unroll
        for (int w = 0; w < 4; ++w)
          words[j][w] = *reinterpret_cast<const uint32_t*>(x + at + 8 * (j * P::kThreads + w));
      }
    uint32_t scales[kAtOnce][4] = {};
    if (normed) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (left > j * 8 * P::kThreads) {
#pragma unroll
          for (int w = 0; w < 4; ++w)
            scales[j][w] = *reinterpret_cast<const uint32_t*>(norm + at + 8 * (j * P::kThreads + w));
        }
    }
    if (begins) let_next_kernel_start();
    begins = false;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * P::kThreads;
      if (i >= lanes) continue;  // a whole warp
      float squares[4] = {};
      if (normed) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          squares[w] = squares_of<X>(words[j][w]);
          words[j][w] = times(words[j][w], scales[j][w]);
        }
      }
      put_unit<P, Bias>(shared, words[j], i, X{});
      if (!normed) continue;
      // Four lanes have a run of 32 columns: each is left with the sum of eight of them.
      const float sum = rms::sum_of_lanes(share_sums<2>(squares));
      if (threadIdx.x % 32 == 0) shared.squares[(first * split.panel_tiles * 8 + i) / 32] = sum;
    }
    at += 8 * kAtOnce * P::kThreads, left -= min(left, kAtOnce * 8 * P::kThreads);
  }
}

// Which 16 bytes a lane gives ldmatrix the address of: eight columns of 32 of a token; tokens that there are
// not repeat the last.
template <class P>
__device__ __forceinline__ uint32_t matrix_row(const Shared<P>& shared, const Split& split) {
  const int lane = threadIdx.x % 32;
  return shared_address(shared.x) + min(lane % 8, split.columns - 1) * split.x_pitch + lane / 8 * 16;
}

// Up to eight tokens, as they are in memory; row_of(token) is a token's row of x. A warp has whole batches.
template <class P, float Bias, class X, class RowOf>
__device__ __forceinline__ void stage_rows(const Shared<P>& shared, const X* x, int k, const Split& split,
                                           int first, int tokens, const RowOf& row_of, bool begins,
                                           const X* norm) {
  static_assert(P::B::kCols == 8 * 32);
  const bool normed = kHasNorm<X> && norm != nullptr;
  const int lane = threadIdx.x % 32, pitch = split.x_pitch;
  const int batches = num_units(split, first) / 32;
  const int first_col = first * split.panel_tiles * kTileCols + 8 * lane;
  const uint32_t matrices = matrix_row(shared, split);
  const auto own_row = static_cast<uint32_t>(row_of(min(lane % P::kTokens, tokens - 1)));  // a lane's token's
  if (begins) wait_for_previous_kernel();
#pragma unroll 1
  for (int batch = threadIdx.x / 32; batch < batches; batch += P::kWarps) {
    const int col = first_col + batch * P::B::kCols;
    uint4 units[P::kTokens];
#pragma unroll
    for (int token = 0; token < P::kTokens; ++token) {  // all loads at once
      const uint64_t row = __shfl_sync(~0u, own_row, token);
      units[token] = make_uint4(0, 0, 0, 0);
      if (token < tokens && col < k)
        units[token] = *reinterpret_cast<const uint4*>(x + row * static_cast<uint32_t>(k) + col);
    }
    uint4 scales = make_uint4(0, 0, 0, 0);
    if (normed && col < k) scales = *reinterpret_cast<const uint4*>(norm + col);
    if (begins) let_next_kernel_start();
    begins = false;
    float squares[P::kTokens];
    if (normed) {
#pragma unroll
      for (int token = 0; token < P::kTokens; ++token) {
        uint4& unit = units[token];
        squares[token] = (squares_of<X>(unit.x) + squares_of<X>(unit.z)) +
                         (squares_of<X>(unit.y) + squares_of<X>(unit.w));  // as lanes of one token do
        unit = make_uint4(times(unit.x, scales.x), times(unit.y, scales.y), times(unit.z, scales.z),
                          times(unit.w, scales.w));
      }
    }
    uint8_t* const to = shared.x + batch * P::kBatchBytes + lane * 16;
#pragma unroll
    for (int token = 0; token < P::kTokens; ++token)
      if (token < tokens) *reinterpret_cast<uint4*>(to + token * pitch) = units[token];
    if (normed) {
      float sum = share_sums<16>(squares);
      sum += __shfl_xor_sync(~0u, sum, 2);
      sum += __shfl_xor_sync(~0u, sum, 1);
      const int of_all = first * split.panel_tiles / P::B::kTiles + batch;
      if (lane % 4 == 0) shared.squares[of_all * P::kTokens + lane / 4] = sum;
    }
    __syncwarp();
    if constexpr (P::kNeedsStarts) {
#pragma unroll
      for (int base = 0; base < 8; base += 4) {
        uint32_t words[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i)  // all loads at once
          load_matrices(words[i], matrices + batch * P::kBatchBytes + (base + i) * 64);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          put_starts<P, Bias, false>(shared, words[i], batch * 8 + base + i, 0, X{});
      }
    }
  }
}

// A norm's weight, before anything is waited for: other layers' weights have pushed it out of L2.
template <class P, class X>
__device__ __forceinline__ void prefetch_norm(const X* norm, int64_t k) {
  constexpr int kLine = 128 / sizeof(X);
  if (norm == nullptr) return;
#pragma unroll 1
  for (int64_t at = int64_t{kLine} * threadIdx.x; at < k; at += kLine * P::kThreads)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + at));  // PTX ISA 9.7.9.15
}

// What sums of `token` and those beside it are multiplied by, when all of x has been staged.
template <class P>
__device__ __forceinline__ void norm_factors(float (&factors)[P::kEach], const Shared<P>& shared,
                                             const Split& split, int token, int64_t k, float eps) {
  constexpr int kAtOnce = 8;
  float sums[kAtOnce][P::kEach] = {};
  const int batches = Shared<P>::num_batches(split);
#pragma unroll 1
  for (int batch = 0; batch < batches; batch += kAtOnce)
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int j = 0; j < P::kEach; ++j)
        if (batch + i < batches) sums[i][j] += shared.squares[(batch + i) * P::kTokens + token + j];
#pragma unroll
  for (int j = 0; j < P::kEach; ++j) {
#pragma unroll
    for (int step = kAtOnce / 2; step > 0; step /= 2)
#pragma unroll
      for (int i = 0; i < step; ++i) sums[i][j] += sums[i + step][j];
    factors[j] = rms::factor_of(sums[0][j], k, eps);
  }
}

// One output of decoded weights and of x times a norm's weight, as packed_gemm::dot_decoded.
template <PackableFormat F, class X>
__device__ __noinline__ float dot_weighted(bytes_ptr strip, int row, const X* x, int64_t k, const X* norm) {
  float sum = 0;
  for (int64_t e = 0; e < k; ++e)
    sum += rms::rounded<X>(__fmul_rn(to_float(x[e]), to_float(norm[e]))) * packed_weight<F>(strip, k, row, e);
  return sum;
}

}  // namespace quantgemm::packed_gemv

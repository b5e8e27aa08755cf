// SPDX-License-Identifier: MIT
// y[m, n] = x[m, k] · w[n, k]ᵀ with int8 tensor cores, both sides' scales applied per group of 32:
//     y += s_a · (s_w · Σ q_w q_a) + o_w · sum_a        (float32; Σ exact)
// A thread block of 4 warps owns kRows rows of w and 16·kPairs tokens, a warp 32 of the rows. Weights
// are the A operand, made of the native bytes by F::quad where they lie in shared memory; tokens are B.
// Limit: issue slots, two FFMA per output and group (finish_group below) beside one mma per four.
#pragma once
#include "../formats/activation.h"
#include "../formats/gguf_formats.h"
#include "launch.h"
#include "memory.cuh"
#include "mma_q8.cuh"

namespace quantgemm::mma_q8 {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kWarpRows = 32, kRows = kWarps * kWarpRows;
constexpr int kStageElems = 128, kStageGroups = kStageElems / ActivationRow::kGroup;

// Work is cut into units of one step along k of one tile; block b owns units
// b · num_units / gridDim.x … of them all: whole tiles where the grid is as large as their number,
// else equal shares, and tiles in several hands are summed by the last to finish.
struct Work {
  int64_t num_units, tile_units, token_tiles;
  float4* partials;  // [grid][2][kPairs · 4][kThreads]
  int* arrivals;     // [tiles], zero at the start
  int64_t row_bytes, act_bytes;  // of a row of w, of a row of activations
  int k;

  __device__ int64_t begin(int64_t block) const { return block * num_units / gridDim.x; }
  __device__ int64_t owner(int64_t unit) const { return ((unit + 1) * gridDim.x - 1) / num_units; }
};

// Shared memory. Weights are staged a step (256 or 128 of k) at a time, activations 128 of k.
template <BlockFormat F, int kPairs>
struct Layout {
  static constexpr int kTokens = 16 * kPairs;
  // A step's bytes of a row are copied as the 16-byte pieces that contain them.
  static constexpr bool kWide = F::kElems == 256 || 256 / F::kElems * F::kBytes <= 240;
  static constexpr int kStep = kWide ? 256 : kStageElems, kStages = kStep / kStageElems;
  static constexpr int kStepBytes = kStep / F::kElems * F::kBytes;
  static constexpr int kPieces = (kStepBytes + 16 - kAlignOf<F::kBytes> + 15) / 16;
  static constexpr int kRowBytes = 16 * (kPieces | 1);  // odd: 8 rows' quads lie in different banks
  static constexpr int kGroup = F::kGroup < 32 ? 16 : 32;
  static constexpr int kStepGroups = kStep / kGroup;

  static constexpr bool kSums = F::kOffset && kGroup == 32;  // else sums per 16 come from the codes
  static constexpr int kScaleBytes = kSums ? 8 : 4;
  static constexpr int kScaleStride = (kTokens + 16) * kScaleBytes;  // scales of a group
  static constexpr int kCodeBytes = kTokens * kStageElems;

  static constexpr int kWeightBytes = kRows * kRowBytes;
  static constexpr int kActBytes = kCodeBytes + kStageGroups * kScaleStride;
  static constexpr int kTableBytes = kStepGroups * kRows * (F::kOffset ? 8 : 4);

  // Two buffers each: one in use, one being filled.
  static constexpr int kStageBytes = kTableBytes + 2 * (kActBytes + kWeightBytes);
  static constexpr int kOutStride = kRows + 4;  // floats
  static constexpr int kOutBytes = kTokens * kOutStride * 4;
  static constexpr int kBytes = kStageBytes > kOutBytes ? kStageBytes : kOutBytes;

  static constexpr int kBlocksPerSm = kPairs >= 6 ? 2 : kPairs == 4 ? 3 : 4;

  uint8_t* memory;
  __device__ float* table(int warp) const {
    return reinterpret_cast<float*>(memory + warp * (kTableBytes / kWarps));
  }
  __device__ uint8_t* weights(int step) const { return memory + kTableBytes + step % 2 * kWeightBytes; }
  __device__ uint8_t* codes(int stage) const {
    return memory + kTableBytes + 2 * kWeightBytes + stage % 2 * kActBytes;
  }
  __device__ uint8_t* scales(int stage) const { return codes(stage) + kCodeBytes; }
};

// A thread's part in copying a tile's operands. Rows and tokens past the edge are not copied: what is
// computed for them is never stored.
template <BlockFormat F, int kPairs>
struct Copier {
  using L = Layout<F, kPairs>;
  static constexpr int kRowsPerPass = kThreads / L::kPieces, kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr int kTokensPerPass = kThreads / 8, kScalesPerPass = kThreads / kStageGroups;
  const Work& work;
  L shared;
  int rows, tokens;  // from the thread's first row, the tile's first token to the tile's last
  bytes_ptr weights, codes, scales;

  __device__ Copier(const GemmArgs& args, const Work& work, uint8_t* memory, int64_t first_row, int64_t first_token)
      : work(work), shared{memory} {
    const int row = threadIdx.x / L::kPieces;
    const int64_t rows_left = args.n - first_row, tokens_left = args.m - first_token;
    rows = row < kRowsPerPass ? static_cast<int>(rows_left < kRows ? rows_left : kRows) - row : 0;
    tokens = static_cast<int>(tokens_left < L::kTokens ? tokens_left : L::kTokens);
    weights = args.w + (first_row + row) * work.row_bytes + 16 * (threadIdx.x % L::kPieces);
    codes = args.activations + (first_token + threadIdx.x / 8) * work.act_bytes + threadIdx.x % 8 * 16;
    scales = args.activations + (first_token + threadIdx.x / kStageGroups) * work.act_bytes +
             ActivationRow::scales_offset(args.k) + threadIdx.x % kStageGroups * 8;
  }

  // kCount of the passes over the rows of a step. A row may begin anywhere; only its own bytes are read.
  template <int kCount>
  __device__ __forceinline__ void copy_weights(int step, int end, int first = 0) const {
    const int row = threadIdx.x / L::kPieces, piece = threadIdx.x % L::kPieces;
    const int skipped = first * kRowsPerPass;
    const uint32_t target =
        shared_address(shared.weights(step)) + (row + skipped) * L::kRowBytes + 16 * piece;
    const int64_t offset = static_cast<int64_t>(step) * L::kStepBytes, left = work.row_bytes - offset;
    const int length = (left < L::kStepBytes ? static_cast<int>(left) : L::kStepBytes) - 16 * piece;
    const int count = step < end ? rows - skipped : 0;
    bytes_ptr source = weights + offset + skipped * work.row_bytes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(source) & 15);
      const int bytes = misaligned + length;
      copy_async<16>(target + i * kRowsPerPass * L::kRowBytes, source - misaligned,
                     i * kRowsPerPass < count && bytes > 0, bytes < 16 ? bytes : 16);
      source += kRowsPerPass * work.row_bytes;
    }
  }

  // Codes: 16-byte piece p of token t lies at place p ^ (t % 8) of its 128 bytes, so that the 8 rows
  // of a matrix lie in different banks. Scales: in the order in which a lane wants them.
  __device__ __forceinline__ void copy_activations(int stage, int end) const {
    const int piece = threadIdx.x % 8, group = threadIdx.x % kStageGroups;
    int token = threadIdx.x / 8;
    uint32_t target = shared_address(shared.codes(stage)) + token * kStageElems + 16 * (piece ^ (token % 8));
    bytes_ptr source = codes + static_cast<int64_t>(stage) * kStageElems;
    const int here = stage < end ? tokens : 0;
    int count = stage * kStageElems + 16 * piece < work.k ? here - token : 0;
#pragma unroll
    for (int i = 0; i < L::kTokens; i += kTokensPerPass) {
      copy_async<16>(target + i * kStageElems, source, i < count);
      source += kTokensPerPass * work.act_bytes;
    }
    token = threadIdx.x / kStageGroups;
    // token 8 h + 2 c + e of 16 to place 4 c + 2 h + e: both halves' scales are neighbours
    const int place =
        L::kSums ? token : (token & ~15) + 4 * ((token >> 1) & 3) + 2 * ((token >> 3) & 1) + (token & 1);
    target = shared_address(shared.scales(stage)) + group * L::kScaleStride + place * L::kScaleBytes;
    const bool inside = stage * kStageElems + group * ActivationRow::kGroup < work.k;  // past it scales are zero
    source = inside ? scales + static_cast<int64_t>(stage) * (8 * kStageGroups) : scales;
    count = here - token;
#pragma unroll
    for (int i = 0; i < L::kTokens; i += kScalesPerPass) {
      copy_async<L::kScaleBytes>(target + i * L::kScaleBytes, source, i < count, inside ? L::kScaleBytes : 0);
      source += kScalesPerPass * work.act_bytes;
    }
  }
};

// A group's weights as a lane holds them: two 16-row A fragments, and what its four rows
// r, r+8, r+16, r+24 make of an integer sum (a sum per 16 where scales are).
template <BlockFormat F, int kPairs>
struct Weights {
  using L = Layout<F, kPairs>;
  static constexpr int kParts = 32 / L::kGroup;
  uint32_t a[2][4];
  float scale[kParts][4], offset[kParts][4];

  // group: of the step
  __device__ void load(bytes_ptr const (&rows)[2], const float* table, int group) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int block = group * 32 / F::kElems * F::kBytes, quad = group * 32 % F::kElems / 4 + c;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bytes_ptr row = rows[i % 2] + i / 2 * 16 * L::kRowBytes + block;
      a[i / 2][i % 2] = F::quad(row, quad);
      a[i / 2][i % 2 + 2] = F::quad(row, quad + 4);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float* entry = table + (group * kParts + part) * kWarpRows * (F::kOffset ? 2 : 1) + 4 * r;
      copy4(scale[part], entry);
      if constexpr (F::kOffset) copy4(offset[part], entry + kWarpRows);
    }
  }
  __device__ static void copy4(float (&v)[4], const float* p) {
    const float4 q = *reinterpret_cast<const float4*>(p);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  }
};

// Scales and offsets of a warp's 32 rows for all groups of a step, lane = row, into its table
// [group][scale, offset][r][row / 8]. They are kept times 2^-24, which keeps magic · scale finite
// and, with two bits of mantissa cleared (only Q8_K's float32 scales have them), exact.
constexpr float kDown = 0x1p-24f, kUp = 0x1p24f;
template <BlockFormat F, int kPairs>
__device__ __forceinline__ void fill_table(float* table, bytes_ptr row, int valid_groups) {
  using L = Layout<F, kPairs>;
  const int lane = threadIdx.x % 32;
  Affine affine[L::kStepGroups];  // all loads first: they cannot pass the stores
#pragma unroll
  for (int g = 0; g < L::kStepGroups; ++g) {
    const int e = g * L::kGroup;
    affine[g] = F::affine(row + e / F::kElems * F::kBytes, e % F::kElems / F::kGroup);
  }
  float* entry = table + 4 * (lane % 8) + lane / 8;
#pragma unroll
  for (int g = 0; g < L::kStepGroups; ++g) {
    const bool valid = g < valid_groups;  // groups past the row's end count nothing
    const uint32_t scale = __float_as_uint(affine[g].scale) & ~3u;
    entry[g * kWarpRows * (F::kOffset ? 2 : 1)] = valid ? __uint_as_float(scale) * kDown : 0.0f;
    if constexpr (F::kOffset) entry[g * kWarpRows * 2 + kWarpRows] = valid ? affine[g].offset * kDown : 0.0f;
  }
}

// Accumulators of a warp: [pair of token tiles][token tile][row tile][fragment].
template <int kPairs>
using Sums = float[kPairs][2][2][4];

// One group of 32. s · Σ without converting: fma(magic + Σ, s, −magic · s) is s · Σ rounded once,
// because magic · s is exact. The products for 8 tokens are under way while the 8 before are scaled.
template <BlockFormat F, int kPairs>
struct Group {
  using L = Layout<F, kPairs>;
  static constexpr int kParts = Weights<F, kPairs>::kParts;
  static constexpr bool kPartSums = F::kOffset && kParts == 2;  // sums of 16 activations
  struct Products {
    uint32_t d[2][kParts][4];                   // per row tile
    uint32_t ones[kPartSums ? kParts : 1][4];
  };
  struct Tokens {  // 16
    uint32_t b[4];
    float scale[4], sum[4];
  };
  const Weights<F, kPairs>& w;
  float minus[kParts][4];

  __device__ __forceinline__ explicit Group(const Weights<F, kPairs>& w) : w(w) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      for (int i = 0; i < 4; ++i) minus[part][i] = -kMagic * w.scale[part][i];
  }
  __device__ __forceinline__ static void load(Tokens& t, uint32_t codes, const uint8_t* scales, int p) {
    const int c = threadIdx.x % 4;
    load_matrices(t.b, codes + p * 16 * kStageElems);
    if constexpr (L::kSums) {
      for (int h = 0; h < 2; ++h) {
        const float4 q = *reinterpret_cast<const float4*>(scales + 8 * (16 * p + 8 * h + 2 * c));
        t.scale[2 * h] = q.x, t.sum[2 * h] = q.y, t.scale[2 * h + 1] = q.z, t.sum[2 * h + 1] = q.w;
      }
    } else {
      Weights<F, kPairs>::copy4(t.scale, reinterpret_cast<const float*>(scales) + 16 * p + 4 * c);
    }
  }
  __device__ __forceinline__ void start(Products& products, const Tokens& t, int h) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const uint32_t(&a)[4] = w.a[tile];
      if constexpr (kParts == 1) {
        multiply_32(products.d[tile][0], a, t.b[2 * h], t.b[2 * h + 1]);
      } else {
        multiply_16(products.d[tile][0], a[0], a[1], t.b[2 * h]);
        multiply_16(products.d[tile][1], a[2], a[3], t.b[2 * h + 1]);
      }
    }
    if constexpr (kPartSums)
      for (int part = 0; part < 2; ++part)
        multiply_16(products.ones[part], 0x01010101u, 0x01010101u, t.b[2 * h + part]);
  }
  __device__ __forceinline__ void finish(float (&y)[2][4], const Products& products, const Tokens& t, int h) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int tile = i / 4, e = i % 4, row = 2 * tile + e / 2, token = 2 * h + e % 2;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float v = fmaf(__uint_as_float(products.d[tile][part][e]), w.scale[part][row], minus[part][row]);
        if constexpr (kPartSums)
          v = fmaf(__uint_as_float(products.ones[part][e % 2]) - kMagic, w.offset[part][row], v);
        y[tile][e] = fmaf(v, t.scale[token], y[tile][e]);
      }
      if constexpr (L::kSums) y[tile][e] = fmaf(w.offset[0][row], t.sum[token], y[tile][e]);
    }
  }
};

template <BlockFormat F, int kPairs>
__device__ __forceinline__ void multiply_group(Sums<kPairs>& sums, const Weights<F, kPairs>& w,
                                               uint32_t codes, const uint8_t* scales) {
  using G = Group<F, kPairs>;
  const G group(w);
  typename G::Tokens tokens[2];
  typename G::Products products[2];
  G::load(tokens[0], codes, scales, 0);
#pragma unroll
  for (int i = 0; i <= 2 * kPairs; ++i) {
    if (i % 2 == 1 && i / 2 + 1 < kPairs) G::load(tokens[(i / 2 + 1) % 2], codes, scales, i / 2 + 1);
    if (i < 2 * kPairs) group.start(products[i % 2], tokens[i / 2 % 2], i % 2);
    const int done = i - 1;
    if (done >= 0) group.finish(sums[done / 2][done % 2], products[done % 2], tokens[done / 2 % 2], done % 2);
  }
}

// Steps [first, last) of a tile, added up in the lanes' fragments, times 2^-24.
template <BlockFormat F, int kPairs>
__device__ __forceinline__ void multiply_tile(Sums<kPairs>& sums, const Copier<F, kPairs>& copier,
                                              uint32_t first_row_bytes, int first, int last) {
  using L = Layout<F, kPairs>;
  using C = Copier<F, kPairs>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4;
  const int all_stages = (copier.work.k + kStageElems - 1) / kStageElems;
  const int end = last * L::kStages < all_stages ? last * L::kStages : all_stages;
  // Where a row's step begins within its first 16-byte piece.
  const auto misalignment = [&](int row, int step) {
    return (first_row_bytes + row * static_cast<uint32_t>(copier.work.row_bytes) + step * L::kStepBytes) & 15;
  };
  copier.copy_activations(first * L::kStages, end);
  copier.template copy_weights<C::kPasses>(first, last);
  commit_copies();

  float* table = copier.shared.table(warp);
  bytes_ptr rows[2];  // r and r+8; 16 rows further a step begins at the same place of its 16 bytes
  for (int stage = first * L::kStages; stage < end; ++stage) {
    const int step = stage / L::kStages;
    wait_copies<0>();
    __syncthreads();  // the stage is there for all, and the one before it has been read by all
    if (stage % L::kStages == 0) {
      bytes_ptr staged = copier.shared.weights(step) + warp * kWarpRows * L::kRowBytes;
      for (int i = 0; i < 2; ++i)
        rows[i] = staged + (8 * i + r) * L::kRowBytes + misalignment(warp * kWarpRows + 8 * i + r, step);
      fill_table<F, kPairs>(table, staged + lane * L::kRowBytes + misalignment(warp * kWarpRows + lane, step),
                            (copier.work.k - step * L::kStep) / L::kGroup);
      __syncwarp();
    }
    const int first_group = stage % L::kStages * kStageGroups;
    const uint32_t codes =
        shared_address(copier.shared.codes(stage)) + (lane % 8 + lane / 16 * 8) * kStageElems;
    const uint8_t* scales = copier.shared.scales(stage);
    Weights<F, kPairs> now;
#pragma unroll
    for (int g = 0; g < kStageGroups; ++g) {
      now.load(rows, table, first_group + g);
      // The next stage's activations, and its share of the next step's weights.
      if (g == 0) copier.copy_activations(stage + 1, end);
      if (g == 1) {
        constexpr int kShare = (C::kPasses + L::kStages - 1) / L::kStages;
        copier.template copy_weights<kShare>(step + 1, last, stage % L::kStages * kShare);
      }
      if (g == 1) commit_copies();
      const int place = (2 * g + lane / 8 % 2) ^ (lane % 8);
      multiply_group<F, kPairs>(sums, now, codes + 16 * place, scales + g * L::kScaleStride);
    }
  }
  __syncthreads();  // shared memory is free again
}

// y's tile, by way of shared memory [token][row], so that a warp writes whole lines.
template <class Out, int kTokens, int kStride>
__device__ __forceinline__ void store_tile(const GemmArgs& args, const float* staged, int64_t first_row,
                                           int64_t first_token) {
  constexpr int kVector = kPerVector<Out>, kPerToken = kRows / kVector;
  Out* y = static_cast<Out*>(args.y);
  const bool aligned = args.n % kVector == 0;
  for (int i = threadIdx.x; i < kTokens * kPerToken; i += kThreads) {
    const int64_t token = first_token + i / kPerToken, row = first_row + i % kPerToken * kVector;
    if (token >= args.m || row >= args.n) continue;
    const float* from = staged + i / kPerToken * kStride + i % kPerToken * kVector;
    float v[kVector];
    for (int j = 0; j < kVector; ++j) v[j] = from[j] * kUp;
    Out* to = y + token * args.n + row;
    if (aligned) {
      store_vector(to, v);
    } else {
      for (int j = 0; j < kVector; ++j)
        if (row + j < args.n) store1(to + j, v[j]);
    }
  }
}

// Adds up a tile that several blocks hold parts of. Returns whether this block is the last, which
// then has the sum, taken in the order of k whoever is last.
template <int kPairs>
__device__ __forceinline__ bool combine(Sums<kPairs>& sums, const Work& work, int64_t tile, bool from_zero) {
  constexpr int kVectors = kPairs * 4;
  const auto slot = [&](int64_t block, bool head) {
    return work.partials + (2 * block + head) * (kVectors * kThreads) + threadIdx.x;
  };
  float* own = &sums[0][0][0][0];
  float4* mine = slot(blockIdx.x, from_zero);
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    __stcg(mine + i * kThreads, make_float4(own[4 * i], own[4 * i + 1], own[4 * i + 2], own[4 * i + 3]));
  __threadfence();  // the part is visible before it is counted
  __syncthreads();
  __shared__ bool is_last;
  const int64_t unit = tile * work.tile_units;
  const int64_t first = work.owner(unit), last = work.owner(unit + work.tile_units - 1);
  if (threadIdx.x == 0) is_last = atomicAdd(work.arrivals + tile, 1) == last - first;
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < 4 * kVectors; ++i) own[i] = 0;
  for (int64_t block = first; block <= last; ++block) {
    const float4* part = slot(block, block == first);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float4 v = __ldcg(part + i * kThreads);
      own[4 * i] += v.x, own[4 * i + 1] += v.y, own[4 * i + 2] += v.z, own[4 * i + 3] += v.w;
    }
  }
  return true;
}

template <BlockFormat F, int kPairs>
__global__ void __launch_bounds__(kThreads, Layout<F, kPairs>::kBlocksPerSm)
    gemm_mma_q8_kernel(const __grid_constant__ GemmArgs args, const __grid_constant__ Work work) {
  using L = Layout<F, kPairs>;
  extern __shared__ __align__(16) uint8_t memory[];
  const int64_t end = work.begin(blockIdx.x + 1);
  for (int64_t unit = work.begin(blockIdx.x); unit < end;) {
    const int64_t index = unit / work.tile_units;
    const int first = static_cast<int>(unit % work.tile_units), units = static_cast<int>(work.tile_units);
    const int last = end - unit < units - first ? first + static_cast<int>(end - unit) : units;
    unit += last - first;
    const int64_t first_row = index / work.token_tiles * kRows;
    const int64_t first_token = index % work.token_tiles * L::kTokens;
    Sums<kPairs> sums = {};
    multiply_tile<F, kPairs>(sums, {args, work, memory, first_row, first_token},
                             static_cast<uint32_t>(first_row * work.row_bytes), first, last);
    if (last - first < units && !combine<kPairs>(sums, work, index, first == 0)) continue;

    float* staged = reinterpret_cast<float*>(memory);
    const int warp = threadIdx.x / 32, r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kPairs * 16; ++i) {
      const int e = i % 4, rows = i / 4 % 2, h = i / 8 % 2, p = i / 16;
      staged[(16 * p + 8 * h + 2 * c + e % 2) * L::kOutStride + warp * kWarpRows + 16 * rows + e / 2 * 8 + r] =
          sums[p][h][rows][e];
    }
    __syncthreads();
    switch (args.type) {
      case Real::kFloat32:
        store_tile<float, L::kTokens, L::kOutStride>(args, staged, first_row, first_token);
        break;
      case Real::kFloat16:
        store_tile<Half, L::kTokens, L::kOutStride>(args, staged, first_row, first_token);
        break;
      case Real::kBFloat16:
        store_tile<BFloat16, L::kTokens, L::kOutStride>(args, staged, first_row, first_token);
        break;
    }
    __syncthreads();  // before the next tile's copies arrive where this one's results lay
  }
}

}  // namespace quantgemm::mma_q8

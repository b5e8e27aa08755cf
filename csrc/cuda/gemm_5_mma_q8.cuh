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

  static constexpr int bytes_for(int ahead) {
    return kTableBytes + (ahead + 1) * kActBytes + ((ahead + kStages - 1) / kStages + 1) * kWeightBytes;
  }
  // Stages in flight before the one in use, and buffers for them.
  static constexpr int kAhead = bytes_for(2) <= (kPairs > 2 ? 100 : 75) * 1024 ? 2 : 1;
  static constexpr int kActBuffers = kAhead + 1, kWeightBuffers = (kAhead + kStages - 1) / kStages + 1;
  static constexpr int kOutStride = kRows + 4;  // floats
  static constexpr int kOutBytes = kTokens * kOutStride * 4;
  static constexpr int kBytes = bytes_for(kAhead) > kOutBytes ? bytes_for(kAhead) : kOutBytes;

  static constexpr int kBlocksPerSm = kPairs == 8 ? 2 : kPairs == 4 ? 3 : 4;

  uint8_t* memory;
  __device__ float* table(int warp) const {
    return reinterpret_cast<float*>(memory + warp * (kTableBytes / kWarps));
  }
  __device__ uint8_t* weights(int64_t step) const {
    return memory + kTableBytes + static_cast<int>(step % kWeightBuffers) * kWeightBytes;
  }
  __device__ uint8_t* codes(int64_t stage) const {
    return memory + kTableBytes + kWeightBuffers * kWeightBytes +
           static_cast<int>(stage % kActBuffers) * kActBytes;
  }
  __device__ uint8_t* scales(int64_t stage) const { return codes(stage) + kCodeBytes; }
};

// One tile of y, and the copies of its operands into shared memory.
template <BlockFormat F, int kPairs>
struct Tile {
  using L = Layout<F, kPairs>;
  const GemmArgs& args;
  L shared;
  int64_t first_row, first_token;

  __device__ int64_t row_bytes() const { return args.k / F::kElems * F::kBytes; }
  __device__ int64_t clamped_row(int row) const {
    const int64_t r = first_row + row;
    return r < args.n ? r : args.n - 1;  // rows and tokens past the edge repeat the last one
  }
  // Where a row's step begins within its first 16-byte piece.
  __device__ int misalignment(int row, int64_t step) const {
    return static_cast<int>((clamped_row(row) * row_bytes() + step * L::kStepBytes) & 15);
  }

  __device__ void copy_weights(int64_t step) const {
    uint8_t* target = shared.weights(step);
    const int64_t all = args.n * row_bytes(), left = row_bytes() - step * L::kStepBytes;
    const int length = left < L::kStepBytes ? static_cast<int>(left) : L::kStepBytes;
#pragma unroll
    for (int i = 0; i < L::kPieces * kRows / kThreads; ++i) {
      const int index = threadIdx.x + i * kThreads, row = index / L::kPieces, piece = index % L::kPieces;
      const int64_t begin = clamped_row(row) * row_bytes() + step * L::kStepBytes;
      const int64_t source = (begin & ~int64_t{15}) + 16 * piece;
      if (source >= begin + length) continue;
      const int64_t valid = all - source;
      copy_async<16>(target + row * L::kRowBytes + 16 * piece, args.w + source,
                     valid < 16 ? static_cast<int>(valid) : 16);
    }
  }

  // Codes: 16-byte piece p of token t lies at place p ^ (t % 8) of its 128 bytes, so that the 8 rows
  // of a matrix lie in different banks. Scales: in the order in which a lane wants them.
  __device__ void copy_activations(int64_t stage) const {
    const int64_t bytes = ActivationRow::bytes(args.k), k0 = stage * kStageElems;
    const int piece = threadIdx.x % 8;
    uint8_t* codes = shared.codes(stage);
    if (k0 + 16 * piece < args.k) {
#pragma unroll
      for (int i = 0; i < (L::kTokens * 8 + kThreads - 1) / kThreads; ++i) {
        const int token = threadIdx.x / 8 + i * (kThreads / 8);
        const uint8_t* source = args.activations + clamped_token(token) * bytes + k0 + 16 * piece;
        copy_async<16>(codes + token * kStageElems + 16 * (piece ^ (token % 8)), source, 16);
      }
    }
    const int group = threadIdx.x % kStageGroups;
    const int64_t at = stage * kStageGroups + group;
    const bool inside = at < args.k / ActivationRow::kGroup;  // scales past the end are zero
    uint8_t* scales = shared.scales(stage) + group * L::kScaleStride;
#pragma unroll
    for (int i = 0; i < (L::kTokens * kStageGroups + kThreads - 1) / kThreads; ++i) {
      const int token = threadIdx.x / kStageGroups + i * (kThreads / kStageGroups);
      if (token >= L::kTokens) break;
      const uint8_t* source = args.activations + clamped_token(token) * bytes +
                              ActivationRow::scales_offset(args.k) + (inside ? 8 * at : 0);
      // token 8 h + 2 c + e of 16 to place 4 c + 2 h + e: both halves' scales are neighbours
      const int place = L::kSums ? token
                                 : (token & ~15) + 4 * ((token >> 1) & 3) + 2 * ((token >> 3) & 1) + (token & 1);
      copy_async<L::kScaleBytes>(scales + place * L::kScaleBytes, source, inside ? L::kScaleBytes : 0);
    }
  }
  __device__ int64_t clamped_token(int token) const {
    const int64_t t = first_token + token;
    return t < args.m ? t : args.m - 1;
  }

  // Stages are counted from k = 0; a step's weights come with its first stage.
  __device__ void copy_stage(int64_t stage, int64_t end) const {
    if (stage < end) {
      copy_activations(stage);
      if (stage % L::kStages == 0) copy_weights(stage / L::kStages);
    }
    commit_copies();  // perhaps an empty group: their number tells which stage has arrived
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
  __device__ void load(bytes_ptr const (&rows)[4], const float* table, int group) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int block = group * 32 / F::kElems * F::kBytes, quad = group * 32 % F::kElems / 4 + c;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i / 2][i % 2] = F::quad(rows[i] + block, quad);
      a[i / 2][i % 2 + 2] = F::quad(rows[i] + block, quad + 4);
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
  float* entry = table + 4 * (lane % 8) + lane / 8;
#pragma unroll
  for (int g = 0; g < L::kStepGroups; ++g) {
    const int e = g * L::kGroup;
    const Affine affine = F::affine(row + e / F::kElems * F::kBytes, e % F::kElems / F::kGroup);
    const bool valid = g < valid_groups;  // groups past the row's end count nothing
    const uint32_t scale = __float_as_uint(affine.scale) & ~3u;
    entry[g * kWarpRows * (F::kOffset ? 2 : 1)] = valid ? __uint_as_float(scale) * kDown : 0.0f;
    if constexpr (F::kOffset) entry[g * kWarpRows * 2 + kWarpRows] = valid ? affine.offset * kDown : 0.0f;
  }
}

// Accumulators of a warp: [pair of token tiles][token tile][row tile][fragment].
template <int kPairs>
using Sums = float[kPairs][2][2][4];

// One group of 32. s · Σ without converting: fma(magic + Σ, s, −magic · s) is s · Σ rounded once,
// because magic · s is exact.
template <BlockFormat F, int kPairs>
__device__ __forceinline__ void multiply_group(Sums<kPairs>& sums, const Weights<F, kPairs>& w,
                                               uint32_t codes, const uint8_t* scales) {
  using L = Layout<F, kPairs>;
  constexpr int kParts = Weights<F, kPairs>::kParts;
  float minus[kParts][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part)
    for (int i = 0; i < 4; ++i) minus[part][i] = -kMagic * w.scale[part][i];
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    uint32_t b[4];
    load_matrices(b, codes + p * 16 * kStageElems);
    float scale[4], sum[4];
    if constexpr (L::kSums) {
      for (int h = 0; h < 2; ++h) {
        const float4 q = *reinterpret_cast<const float4*>(scales + 8 * (16 * p + 8 * h + 2 * c));
        scale[2 * h] = q.x, sum[2 * h] = q.y, scale[2 * h + 1] = q.z, sum[2 * h + 1] = q.w;
      }
    } else {
      Weights<F, kPairs>::copy4(scale, reinterpret_cast<const float*>(scales) + 16 * p + 4 * c);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float part_sum[kParts][2];
      if constexpr (F::kOffset && kParts == 2) {
        for (int part = 0; part < 2; ++part) {
          uint32_t d[4];
          multiply_16(d, 0x01010101u, 0x01010101u, b[2 * h + part]);
          for (int e = 0; e < 2; ++e) part_sum[part][e] = __uint_as_float(d[e]) - kMagic;
        }
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        float(&y)[4] = sums[p][h][tile];
        const uint32_t(&a)[4] = w.a[tile];
        uint32_t d[kParts][4];
        if constexpr (kParts == 1) {
          multiply_32(d[0], a, b[2 * h], b[2 * h + 1]);
        } else {
          multiply_16(d[0], a[0], a[1], b[2 * h]);
          multiply_16(d[1], a[2], a[3], b[2 * h + 1]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 2 * tile + e / 2, token = 2 * h + e % 2;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            float t = fmaf(__uint_as_float(d[part][e]), w.scale[part][row], minus[part][row]);
            if constexpr (F::kOffset && kParts == 2) t = fmaf(part_sum[part][e % 2], w.offset[part][row], t);
            y[e] = fmaf(t, scale[token], y[e]);
          }
          if constexpr (L::kSums) y[e] = fmaf(w.offset[0][row], sum[token], y[e]);
        }
      }
    }
  }
}

// Steps [first, last) of a tile, added up in the lanes' fragments, times 2^-24.
template <BlockFormat F, int kPairs>
__device__ __forceinline__ void multiply_tile(Sums<kPairs>& sums, const Tile<F, kPairs>& tile, int64_t first,
                                              int64_t last) {
  using L = Layout<F, kPairs>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4;
  const int64_t k = tile.args.k, all_stages = (k + kStageElems - 1) / kStageElems;
  const int64_t end = last * L::kStages < all_stages ? last * L::kStages : all_stages;
  for (int i = 0; i < L::kAhead; ++i) tile.copy_stage(first * L::kStages + i, end);

  const float* table = tile.shared.table(warp);
  bytes_ptr rows[4];
  for (int64_t stage = first * L::kStages; stage < end; ++stage) {
    wait_copies<L::kAhead - 1>();
    __syncthreads();  // the stage is there for all, and the one before it has been read by all
    tile.copy_stage(stage + L::kAhead, end);
    if (stage % L::kStages == 0) {
      const int64_t step = stage / L::kStages, left = (k - step * L::kStep) / L::kGroup;
      bytes_ptr staged = tile.shared.weights(step);
      for (int i = 0; i < 4; ++i) {
        const int row = warp * kWarpRows + 8 * i + r;
        rows[i] = staged + row * L::kRowBytes + tile.misalignment(row, step);
      }
      const int row = warp * kWarpRows + lane;
      fill_table<F, kPairs>(tile.shared.table(warp), staged + row * L::kRowBytes + tile.misalignment(row, step),
                            left < L::kStepGroups ? static_cast<int>(left) : L::kStepGroups);
      __syncwarp();
    }
    const int first_group = static_cast<int>(stage % L::kStages) * kStageGroups;
    const uint32_t codes =
        shared_address(tile.shared.codes(stage)) + (lane % 8 + lane / 16 * 8) * kStageElems;
    const uint8_t* scales = tile.shared.scales(stage);
    Weights<F, kPairs> now, next;
    now.load(rows, table, first_group);
#pragma unroll
    for (int g = 0; g < kStageGroups; ++g) {
      if (g + 1 < kStageGroups) next.load(rows, table, first_group + g + 1);
      const int place = (2 * g + lane / 8 % 2) ^ (lane % 8);
      multiply_group<F, kPairs>(sums, now, codes + 16 * place, scales + g * L::kScaleStride);
      now = next;
    }
  }
  wait_copies<0>();
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
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t end = work.begin(blockIdx.x + 1);
  for (int64_t unit = work.begin(blockIdx.x); unit < end;) {
    const int64_t index = unit / work.tile_units, first = unit % work.tile_units;
    const int64_t wanted = first + end - unit, last = wanted < work.tile_units ? wanted : work.tile_units;
    unit += last - first;
    const Tile<F, kPairs> tile{args, L{memory}, index / work.token_tiles * kRows,
                               index % work.token_tiles * L::kTokens};
    Sums<kPairs> sums = {};
    multiply_tile(sums, tile, first, last);
    if (last - first < work.tile_units && !combine<kPairs>(sums, work, index, first == 0)) continue;

    float* staged = reinterpret_cast<float*>(memory);
    const int r = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < kPairs * 16; ++i) {
      const int e = i % 4, rows = i / 4 % 2, h = i / 8 % 2, p = i / 16;
      staged[(16 * p + 8 * h + 2 * c + e % 2) * L::kOutStride + warp * kWarpRows + 16 * rows + e / 2 * 8 + r] =
          sums[p][h][rows][e];
    }
    __syncthreads();
    switch (args.type) {
      case Real::kFloat32:
        store_tile<float, L::kTokens, L::kOutStride>(args, staged, tile.first_row, tile.first_token);
        break;
      case Real::kFloat16:
        store_tile<Half, L::kTokens, L::kOutStride>(args, staged, tile.first_row, tile.first_token);
        break;
      case Real::kBFloat16:
        store_tile<BFloat16, L::kTokens, L::kOutStride>(args, staged, tile.first_row, tile.first_token);
        break;
    }
    __syncthreads();  // before the next tile's copies arrive where this one's results lay
  }
}

}  // namespace quantgemm::mma_q8

// SPDX-License-Identifier: MIT
// What the int8 tensor-core product keeps in shared memory, and how it gets there: native rows of w,
// codes and scales of activations, two buffers of each.
#pragma once
#include "../formats/activation.h"
#include "../formats/gguf_formats.h"
#include "launch.h"
#include "mma_q8.cuh"

namespace quantgemm::mma_q8 {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kWarpRows = 32, kRows = kWarps * kWarpRows;
constexpr int kStageElems = 128, kStageGroups = kStageElems / ActivationRow::kGroup;

// Work is cut into units of one step along k of one tile; block b owns units
// b · num_units / gridDim.x … of them all: whole tiles where the grid is as large as their number,
// else equal shares, and tiles in several hands are summed by the last to finish.
struct Work {
  int64_t num_units, tile_units, token_tiles;
  float4* partials;              // [grid][2][kPairs · 4][kThreads]
  int* arrivals;                 // [tiles], zero at the start
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

  static constexpr int kBlocksPerSm = kPairs == 8 ? 2 : kPairs == 4 ? 3 : 4;

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
  static constexpr int kRowsPerPass = kThreads / L::kPieces,
                       kPasses = (kRows + kRowsPerPass - 1) / kRowsPerPass;
  static constexpr int kTokensPerPass = kThreads / 8, kScalesPerPass = kThreads / kStageGroups;
  const Work& work;
  L shared;
  int rows, tokens;  // from the thread's first row, the tile's first token to the tile's last
  bytes_ptr weights, codes, scales;

  __device__ Copier(const GemmArgs& args, const Work& work, uint8_t* memory, int64_t first_row,
                    int64_t first_token)
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
    const int64_t stride = kRowsPerPass * work.row_bytes;
    if (work.row_bytes % 16 == 0) {  // all rows begin at the same place of their first 16 bytes
      const int misaligned = static_cast<int>(offset & 15), bytes = misaligned + length;
      const int wanted = bytes > 0 ? count : 0, valid = bytes < 16 ? bytes : 16;
      source -= misaligned;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        copy_async<16>(target + i * kRowsPerPass * L::kRowBytes, source, i * kRowsPerPass < wanted, valid);
        source += stride;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(source) & 15);
        const int bytes = misaligned + length;
        copy_async<16>(target + i * kRowsPerPass * L::kRowBytes, source - misaligned,
                       i * kRowsPerPass < count && bytes > 0, bytes < 16 ? bytes : 16);
        source += stride;
      }
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
    const bool inside =
        stage * kStageElems + group * ActivationRow::kGroup < work.k;  // past it scales are zero
    source = inside ? scales + static_cast<int64_t>(stage) * (8 * kStageGroups) : scales;
    count = here - token;
#pragma unroll
    for (int i = 0; i < L::kTokens; i += kScalesPerPass) {
      copy_async<L::kScaleBytes>(target + i * L::kScaleBytes, source, i < count, inside ? L::kScaleBytes : 0);
      source += kScalesPerPass * work.act_bytes;
    }
  }
};

}  // namespace quantgemm::mma_q8

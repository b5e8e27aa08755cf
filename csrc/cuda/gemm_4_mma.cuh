// SPDX-License-Identifier: MIT
// y = x · wᵀ on tensor cores, activations kept in 16 bits. Idea: weights are the A operand (rows of
// w = rows of A), activations the B operand, so that a tile of tokens can be narrow. Warps decode the
// blocks in shared memory straight into A fragments, each weight once per block. Any order of k will do
// as long as A and B agree, so lanes take whole quads. This kernel is for 9 to 128 tokens, a warp keeps
// the fragments that it decodes; fewer tokens: gemm_4_mma_few.cuh, more: gemm_4_mma_many.cuh.
// Limit: decoding.
#pragma once
#include "../formats/gguf_formats.h"
#include "device.h"
#include "gemm_fragments.cuh"
#include "gemm_tiles.cuh"

namespace quantgemm {

// A block's tile is kTokens × 128 rows, 32 for each of four warps.
struct Tokens32 {
  static constexpr int kTokens = 32, kBlocksPerSm = 3;
};
struct Tokens64 {
  static constexpr int kTokens = 64, kBlocksPerSm = 2;
};
struct Tokens128 {
  static constexpr int kTokens = 128, kBlocksPerSm = 2;
};

template <class F, class Tile>
struct MmaLayout {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRowTiles = 2, kStages = 3;
  static constexpr int kRows = 16 * kRowTiles * kWarps, kTokens = Tile::kTokens, kElems = kRows * kTokens;
  static constexpr bool kPaired = F::kElems > 32;  // gemm_fragments.cuh
  // An iteration takes 64 values of k. Weights come in chunks: whole blocks, and enough of them that
  // rounding to 16 bytes does not cost much. There is room for two chunks, as iterations are staged
  // kStages − 1 ahead.
  static constexpr int kIter = 64, kChunk = F::kElems > 128 ? F::kElems : 128;
  static constexpr int kChunkIters = kChunk / kIter, kChunkBytes = kChunk / F::kElems * F::kBytes;
  static_assert(kStages - 1 <= kChunkIters);
  static constexpr int kPieces = (kChunkBytes + 15 + 16 - kAlignOf<F::kBytes>) / 16;
  static constexpr int kPitch = 16 * (kPieces | 1);        // odd: 8 rows begin in different banks
  static constexpr int kTokenBytes = kTokens * kIter * 2;  // of one stage
  static constexpr int kWeightBytes = kRows * kPitch;      // of one chunk
  static constexpr int kWeightsAt = kStages * kTokenBytes, kPipeline = kWeightsAt + 2 * kWeightBytes;
  static constexpr int kOutPitch = 2 * kRows + 16;  // afterwards: [token][row] of y
  static constexpr int kBytes = std::max(kPipeline, kTokens* kOutPitch);
};

// sums += slab · x, part by part: decode, then multiply.
template <BlockFormat F, class T, int RowTiles, int NT, bool Paired>
__device__ __forceinline__ void multiply_own(float (&sums)[RowTiles][NT][4], bytes_ptr tokens,
                                             SlabDecoder<F, T, RowTiles, Paired>& decoder) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    Fragments<2 * RowTiles> a;
    decoder.part(a, part);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const bytes_ptr row = tokens + (8 * j + r) * 128;
      uint2 b[2];
      if constexpr (Paired) {
        const uint4 both = *reinterpret_cast<const uint4*>(row + 16 * ((4 * part + c) ^ swizzle(r)));
        b[0] = make_uint2(both.x, both.y), b[1] = make_uint2(both.z, both.w);
      } else {
        b[0] = load_tokens(row, part, 0), b[1] = load_tokens(row, part, 1);
      }
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < RowTiles; ++i)
          mma_16x8x16(sums[i][j], a.words[2 * i + step], b[step].x, b[step].y, T{});
    }
  }
}

template <BlockFormat F, class T, class Tile>
__global__ void __launch_bounds__(MmaLayout<F, Tile>::kThreads, Tile::kBlocksPerSm)
    gemm_mma_kernel(const MmaProblem p) {
  using L = MmaLayout<F, Tile>;
  constexpr int kRT = L::kRowTiles, kNT = L::kTokens / 8, kStages = L::kStages;
  extern __shared__ __align__(128) uint8_t smem[];
  const uint32_t smem_address = shared_address(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;

  for (TileWalk<L> at(p); at.next(p);) {
    const int iters = (at.num_k + L::kIter - 1) / L::kIter;
    const bytes_ptr tile_w = at.weights(p);
    const RowStager<L::kRows, L::kPieces, L::kPitch, L::kThreads> stage_rows(
        tile_w, p.w + p.n * p.row_bytes, p.row_bytes, at.last_row, threadIdx.x);
    const TokenStager<L::kTokens, L::kThreads> stage_tokens(p.x + 2 * (at.token0 * p.k + at.k0), p.k,
                                                            at.num_tokens, threadIdx.x);
    const auto stage = [&](int iter) {
      const int chunk = iter / L::kChunkIters;
      if (iter % L::kChunkIters == 0 && iter < iters)
        stage_rows(smem_address + L::kWeightsAt + chunk % 2 * L::kWeightBytes,
                   chunk * int64_t{L::kChunkBytes}, threadIdx.x);
      stage_tokens(smem_address + iter % kStages * L::kTokenBytes, iter * L::kIter,
                   at.num_k - iter * L::kIter, threadIdx.x);
      cp_async_commit();
    };

    float sums[kRT][kNT][4] = {};
    SlabDecoder<F, T, kRT, L::kPaired> decoder;
    const int first_row = warp * kRT * 16 + r;  // that the lane decodes
    int skew[kRT][2];                           // bytes from a multiple of 16 to the lane's rows
#pragma unroll
    for (int i = 0; i < kRT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        skew[i][half] = static_cast<int>(reinterpret_cast<uintptr_t>(tile_w)) +
                        (first_row + 16 * i + 8 * half) * static_cast<int>(p.row_bytes);
#pragma unroll 1
    for (int iter = 0; iter < kStages - 1; ++iter) stage(iter);

#pragma unroll 1
    for (int iter = 0; iter < iters; ++iter) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // everybody's copies for iter have arrived; nobody reads the slots of iter - 1
      stage(iter + kStages - 1);
      const int chunk = iter / L::kChunkIters, in_chunk = iter % L::kChunkIters * L::kIter;
      const bytes_ptr rows = smem + L::kWeightsAt + chunk % 2 * L::kWeightBytes + first_row * L::kPitch +
                             in_chunk / F::kElems * F::kBytes;
#pragma unroll
      for (int i = 0; i < kRT; ++i) {
        decoder.slabs[i].within = in_chunk % F::kElems;
        decoder.slabs[i].second = (iter + 1) * L::kIter > at.num_k ? 0 : F::kBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          decoder.slabs[i].blocks[half] =
              rows + (16 * i + 8 * half) * L::kPitch + ((skew[i][half] + chunk * L::kChunkBytes) & 15);
      }
      decoder.load_affines();
      multiply_own<F, T, kRT, kNT>(sums, smem + iter % kStages * L::kTokenBytes, decoder);
    }
    cp_async_wait<0>();
    __syncthreads();  // the pipeline's memory is free

    if (at.is_part(p) && !combine_parts<L::kThreads>(sums, p, at, threadIdx.x, [] { __syncthreads(); }))
      continue;

    // Through shared memory, because a lane's sums of one token are of rows 8 apart.
#pragma unroll
    for (int i = 0; i < kRT; ++i)
#pragma unroll
      for (int j = 0; j < kNT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = (warp * kRT + i) * 16 + 8 * (e / 2) + r, token = j * 8 + 2 * c + e % 2;
          store1(reinterpret_cast<T*>(smem + token * L::kOutPitch) + row, sums[i][j][e]);
        }
    __syncthreads();
    T* const y = static_cast<T*>(p.y) + at.token0 * p.n + at.row0;
    if (p.n % 8 == 0) {
      for (int i = threadIdx.x; i < L::kElems / 8; i += L::kThreads) {
        const int row = i % (L::kRows / 8) * 8, token = i / (L::kRows / 8);
        if (token < at.num_tokens && row <= at.last_row)
          *reinterpret_cast<uint4*>(y + token * p.n + row) =
              *reinterpret_cast<const uint4*>(smem + token * L::kOutPitch + 2 * row);
      }
    } else {
      for (int i = threadIdx.x; i < L::kElems; i += L::kThreads) {
        const int row = i % L::kRows, token = i / L::kRows;
        if (token < at.num_tokens && row <= at.last_row)
          y[token * p.n + row] = reinterpret_cast<const T*>(smem + token * L::kOutPitch)[row];
      }
    }
    __syncthreads();  // the next tile's copies overwrite this memory
  }
}

template <class F, class Tile>
TileSchedule mma_schedule(const GemmArgs& args) {
  using L = MmaLayout<F, Tile>;
  return schedule_tiles((args.n + L::kRows - 1) / L::kRows, (args.m + L::kTokens - 1) / L::kTokens,
                        (args.k + L::kChunk - 1) / L::kChunk,
                        int64_t{current_device().multiprocessors} * Tile::kBlocksPerSm);
}

// Explicitly instantiated in gemm_4_mma_<type>_<tile>.cu, which the compiler can build side by side.
template <class T, class Tile>
cudaError_t launch_gemm_mma_tile(const GemmArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % 32 == 0) {
      using L = MmaLayout<F, Tile>;
      status = launch_tiles(gemm_mma_kernel<F, T, Tile>, L::kThreads, L::kBytes, args,
                            args.k / F::kElems * F::kBytes, mma_schedule<F, Tile>(args), stream);
    }
  });
  return status;
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// y = x · wᵀ on tensor cores, activations kept in 16 bits. Idea: weights are the A operand (rows of
// w = rows of A), activations the B operand, so that the tile of tokens can be as narrow as 8. A warp
// owns its rows of w: it decodes them straight from the blocks in shared memory into A fragments;
// nothing decoded is ever stored, and no weight is decoded twice in a block. Any order of k will do
// as long as A and B agree on it, so a lane takes whole quads of four neighbouring weights.
// Limit: tensor cores with many tokens, reading the weights with few.
#pragma once
#include "../formats/gguf_formats.h"
#include "gemm_tiles.cuh"
#include "memory.cuh"

namespace quantgemm {

// kTokens × (16 kRowTiles kWarpsN) tile of a block; kWarpsK warps share the same rows and split k.
struct Tokens8 {
  static constexpr int kTokens = 8, kRowTiles = 1, kWarpsN = 1, kWarpsK = 8, kStages = 4, kBlocksPerSm = 4;
};
struct Tokens32 {
  static constexpr int kTokens = 32, kRowTiles = 2, kWarpsN = 4, kWarpsK = 1, kStages = 3, kBlocksPerSm = 3;
};
struct Tokens64 {
  static constexpr int kTokens = 64, kRowTiles = 2, kWarpsN = 4, kWarpsK = 1, kStages = 3, kBlocksPerSm = 2;
};
struct Tokens128 {
  static constexpr int kTokens = 128, kRowTiles = 2, kWarpsN = 4, kWarpsK = 1, kStages = 3, kBlocksPerSm = 2;
};

template <class F, class Tile>
struct MmaLayout {
  static constexpr int kThreads = 32 * Tile::kWarpsN * Tile::kWarpsK;
  static constexpr int kRows = 16 * Tile::kRowTiles * Tile::kWarpsN, kElems = kRows * Tile::kTokens;
  // An iteration takes 64 values of k per k-warp. Weights come in chunks: whole blocks, and enough of
  // them that the rounding to 16 bytes does not cost much.
  static constexpr int kIter = 64 * Tile::kWarpsK;
  static constexpr int kChunk = kIter > 128 ? kIter : F::kElems > 128 ? F::kElems : 128;
  static constexpr int kChunkIters = kChunk / kIter, kChunkBytes = kChunk / F::kElems * F::kBytes;
  static constexpr int kPieces = (kChunkBytes + 15 + 16 - kAlignOf<F::kBytes>) / 16;
  static constexpr int kPitch = 16 * (kPieces | 1);  // odd: 8 rows begin in different banks
  // Iterations run kStages − 1 ahead, which is no more than the next chunk if there are two.
  static constexpr int kChunkSlots = kChunkIters == 1 ? Tile::kStages : 2;
  static_assert(kChunkIters == 1 || Tile::kStages - 1 <= kChunkIters);
  static constexpr int kTokenBytes = Tile::kTokens * kIter * 2;  // of one stage
  static constexpr int kWeightBytes = kRows * kPitch;            // of one chunk
  static constexpr int kPipeline = Tile::kStages * kTokenBytes + kChunkSlots * kWeightBytes;
  // After the pipeline the same memory turns tiles around: sums of the k-warps, or [token][row] of y.
  static constexpr int kOutPitch = 2 * kRows + 16;
  static constexpr int kOut = Tile::kWarpsK > 1 ? kThreads * kElems / (32 * Tile::kWarpsN) * 4 : 0;
  static constexpr int kTurn = Tile::kTokens * kOutPitch > kOut ? Tile::kTokens * kOutPitch : kOut;
  static constexpr int kBytes = kPipeline > kTurn ? kPipeline : kTurn;
};

struct MmaProblem {
  bytes_ptr x, w;
  void* y;
  PartialTiles partial;
  TileSchedule schedule;
  int64_t m, n, k, row_bytes;
};

// The 32 weights from `within` of a block, of the two rows a lane holds in each row tile, as A fragments
// of two steps of 16. Lane c of a row takes quads c and c + 4, which share bytes in blocks of 32; in
// larger blocks quads 2c and 2c + 1, so that it needs one affine for both, and one 16-byte load of x.
template <BlockFormat F>
inline constexpr bool kPairedQuads = F::kElems > 32;

template <BlockFormat F, class T>
__device__ __forceinline__ void decode_fragments(uint32_t (&a)[2][4], bytes_ptr block0, bytes_ptr block8,
                                                 int within, int c) {
  const int first = within / 4 + (kPairedQuads<F> ? 2 * c : c);
  constexpr int kNext = kPairedQuads<F> ? 1 : 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bytes_ptr block = half ? block8 : block0;
    const Affine affine = F::affine(block, kPairedQuads<F> ? (within + 8 * c) / F::kGroup : within / F::kGroup);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float v[4];
      decode_quad<F>(block, first + kNext * step, affine, v);
      a[step][half] = pack_pair(v[0], v[1], T{});
      a[step][2 + half] = pack_pair(v[2], v[3], T{});
    }
  }
}

template <BlockFormat F, class T, class Tile>
__global__ void __launch_bounds__(MmaLayout<F, Tile>::kThreads, Tile::kBlocksPerSm)
    gemm_mma_kernel(const MmaProblem p) {
  using L = MmaLayout<F, Tile>;
  constexpr int kRT = Tile::kRowTiles, kNT = Tile::kTokens / 8, kStages = Tile::kStages;
  extern __shared__ __align__(128) uint8_t smem[];
  uint8_t* const tokens_smem = smem;
  uint8_t* const weights_smem = smem + kStages * L::kTokenBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int warp_n = warp % Tile::kWarpsN, warp_k = warp / Tile::kWarpsN;

  int64_t unit = p.schedule.first_unit(blockIdx.x);
  const int64_t end_unit = p.schedule.first_unit(blockIdx.x + 1);
  while (unit < end_unit) {
    const int64_t tile = unit / p.schedule.chunks, chunk0 = unit - tile * p.schedule.chunks;
    const int64_t left = min(p.schedule.chunks - chunk0, end_unit - unit);
    unit += left;
    const int64_t row_tile = tile / p.schedule.token_tiles;
    const int64_t row0 = row_tile * L::kRows, token0 = (tile - row_tile * p.schedule.token_tiles) * Tile::kTokens;
    const int last_row = static_cast<int>(min(p.n - 1 - row0, int64_t{L::kRows - 1}));
    const int num_tokens = static_cast<int>(min(p.m - token0, int64_t{Tile::kTokens}));
    const int64_t k0 = chunk0 * L::kChunk;
    const int iters = static_cast<int>((min(p.k - k0, left * L::kChunk) + L::kIter - 1) / L::kIter);
    const int64_t start = row0 * p.row_bytes + chunk0 * L::kChunkBytes;

    const auto stage = [&](int iter) {
      if (iter < iters) {
        stage_tokens<Tile::kTokens, Tile::kWarpsK, L::kThreads>(
            tokens_smem + iter % kStages * L::kTokenBytes, p.x + 2 * token0 * p.k, num_tokens,
            k0 + iter * L::kIter, p.k);
        if (iter % L::kChunkIters == 0) {
          const int chunk = iter / L::kChunkIters;
          stage_rows<L::kPieces, L::kPitch, L::kRows, L::kThreads>(
              weights_smem + chunk % L::kChunkSlots * L::kWeightBytes, p.w, start + chunk * L::kChunkBytes,
              p.row_bytes, last_row, p.n * p.row_bytes);
        }
      }
      cp_async_commit();
    };

    float sums[kRT][kNT][4] = {};
    int misaligned[kRT][2];  // bytes of the lane's rows behind a 16-byte boundary
#pragma unroll
    for (int i = 0; i < kRT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min((warp_n * kRT + i) * 16 + 8 * half + r, last_row);
        misaligned[i][half] = static_cast<int>(start + row * p.row_bytes) & 15;
      }
    for (int iter = 0; iter < kStages - 1; ++iter) stage(iter);

#pragma unroll 1
    for (int iter = 0; iter < iters; ++iter) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // everybody's copies for iter have arrived; nobody reads the slot of iter - 1
      stage(iter + kStages - 1);

      const int chunk = iter / L::kChunkIters, slot = chunk % L::kChunkSlots;
      const bytes_ptr x_slab = tokens_smem + iter % kStages * L::kTokenBytes + warp_k * Tile::kTokens * 128;
      const int k_chunk = iter % L::kChunkIters * L::kIter + warp_k * 64;  // the warp's k in this chunk
      const int64_t k_left = p.k - (k0 + iter * L::kIter + warp_k * 64);
#pragma unroll
      for (int half_slab = 0; half_slab < 2; ++half_slab) {
        if (k_left < 32 * half_slab + 32) break;
        const int at = k_chunk + 32 * half_slab;
        uint32_t a[kRT][2][4];
#pragma unroll
        for (int i = 0; i < kRT; ++i) {
          bytes_ptr blocks[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int shift = (misaligned[i][half] + chunk * L::kChunkBytes) & 15;
            const int row = (warp_n * kRT + i) * 16 + 8 * half + r;
            blocks[half] = weights_smem + slot * L::kWeightBytes + row * L::kPitch + shift + at / F::kElems * F::kBytes;
          }
          decode_fragments<F, T>(a[i], blocks[0], blocks[1], at % F::kElems, c);
        }
#pragma unroll
        for (int j = 0; j < kNT; ++j) {
          const int token = 8 * j + r;
          const bytes_ptr row = x_slab + token * 128;
          uint4 b;
          if constexpr (kPairedQuads<F>) {
            b = *reinterpret_cast<const uint4*>(row + 16 * ((4 * half_slab + c) ^ swizzle(token)));
          } else {
            const int piece = 4 * half_slab + c / 2, within = 8 * (c % 2);
            const uint2 lo = *reinterpret_cast<const uint2*>(row + 16 * (piece ^ swizzle(token)) + within);
            const uint2 hi = *reinterpret_cast<const uint2*>(row + 16 * ((piece + 2) ^ swizzle(token)) + within);
            b = make_uint4(lo.x, lo.y, hi.x, hi.y);
          }
#pragma unroll
          for (int i = 0; i < kRT; ++i) {
            mma_16x8x16(sums[i][j], a[i][0], b.x, b.y, T{});
            mma_16x8x16(sums[i][j], a[i][1], b.z, b.w, T{});
          }
        }
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // the pipeline's memory is free

    if constexpr (Tile::kWarpsK > 1) {  // the first k-warp gathers the others' sums
      float4* const turn = reinterpret_cast<float4*>(smem);
      const auto place = [&](int k_warp, int i, int j) {
        return turn + (((k_warp * Tile::kWarpsN + warp_n) * kRT + i) * kNT + j) * 32 + lane;
      };
#pragma unroll
      for (int i = 0; i < kRT; ++i)
#pragma unroll
        for (int j = 0; j < kNT; ++j)
          *place(warp_k, i, j) = make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
      __syncthreads();
      if (warp_k == 0)
#pragma unroll
        for (int i = 0; i < kRT; ++i)
#pragma unroll
          for (int j = 0; j < kNT; ++j)
#pragma unroll
            for (int other = 1; other < Tile::kWarpsK; ++other) {
              const float4 v = *place(other, i, j);
              sums[i][j][0] += v.x, sums[i][j][1] += v.y, sums[i][j][2] += v.z, sums[i][j][3] += v.w;
            }
      __syncthreads();
    }

    if (left < p.schedule.chunks) {  // a part of the tile
      const auto slot_of = [&](int64_t block, bool begins) {
        return reinterpret_cast<float4*>(p.partial.sums + (2 * block + begins) * L::kElems) + warp_n * 32 + lane;
      };
      constexpr int kStride = 32 * Tile::kWarpsN;
      const int64_t first = p.schedule.block_of(tile * p.schedule.chunks);
      const int64_t last = p.schedule.block_of((tile + 1) * p.schedule.chunks - 1);
      if (warp_k == 0) {
        float4* out = slot_of(blockIdx.x, chunk0 == 0);
#pragma unroll
        for (int i = 0; i < kRT; ++i)
#pragma unroll
          for (int j = 0; j < kNT; ++j)
            out[(i * kNT + j) * kStride] = make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
      }
      __shared__ bool is_last;
      __threadfence();  // the partial tile is visible before the arrival is
      __syncthreads();
      if (threadIdx.x == 0) is_last = atomicAdd(p.partial.arrivals + tile, 1u) == static_cast<uint32_t>(last - first);
      __syncthreads();
      if (!is_last) continue;
      __threadfence();
      if (warp_k == 0) {
#pragma unroll
        for (int i = 0; i < kRT; ++i)
#pragma unroll
          for (int j = 0; j < kNT; ++j) sums[i][j][0] = sums[i][j][1] = sums[i][j][2] = sums[i][j][3] = 0;
        for (int64_t block = first; block <= last; ++block) {
          const float4* in = slot_of(block, block == first);
#pragma unroll
          for (int i = 0; i < kRT; ++i)
#pragma unroll
            for (int j = 0; j < kNT; ++j) {
              const float4 v = __ldcg(in + (i * kNT + j) * kStride);
              sums[i][j][0] += v.x, sums[i][j][1] += v.y, sums[i][j][2] += v.z, sums[i][j][3] += v.w;
            }
        }
      }
    }

    // Through shared memory, because a lane's sums of one token are of rows 8 apart.
    if (warp_k == 0)
#pragma unroll
      for (int i = 0; i < kRT; ++i)
#pragma unroll
        for (int j = 0; j < kNT; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = (warp_n * kRT + i) * 16 + 8 * (e / 2) + r, token = 8 * j + 2 * c + e % 2;
            store1(reinterpret_cast<T*>(smem + token * L::kOutPitch) + row, sums[i][j][e]);
          }
    __syncthreads();
    T* const y = static_cast<T*>(p.y) + token0 * p.n + row0;
    if (p.n % 8 == 0) {
      for (int i = threadIdx.x; i < L::kElems / 8; i += L::kThreads) {
        const int row = i % (L::kRows / 8) * 8, token = i / (L::kRows / 8);
        if (token < num_tokens && row <= last_row)
          *reinterpret_cast<uint4*>(y + token * p.n + row) =
              *reinterpret_cast<const uint4*>(smem + token * L::kOutPitch + 2 * row);
      }
    } else {
      for (int i = threadIdx.x; i < L::kElems; i += L::kThreads) {
        const int row = i % L::kRows, token = i / L::kRows;
        if (token < num_tokens && row <= last_row)
          y[token * p.n + row] = reinterpret_cast<const T*>(smem + token * L::kOutPitch)[row];
      }
    }
    __syncthreads();  // the next tile's copies overwrite this memory
  }
}

template <class Tile>
TileSchedule mma_schedule(const GemmArgs& args, int64_t chunk) {
  using L = MmaLayout<Q4_0, Tile>;  // its tile is every format's
  return schedule_tiles((args.n + L::kRows - 1) / L::kRows, (args.m + Tile::kTokens - 1) / Tile::kTokens,
                        (args.k + chunk - 1) / chunk, int64_t{multiprocessors()} * Tile::kBlocksPerSm);
}

template <class Tile>
int64_t mma_scratch_bytes(const GemmArgs& args) {
  int64_t bytes = 0;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % 32 == 0)
      bytes = PartialTiles::bytes(mma_schedule<Tile>(args, MmaLayout<F, Tile>::kChunk), MmaLayout<F, Tile>::kElems);
  });
  return bytes;
}

// Explicitly instantiated in gemm_4_mma_<type>_<tile>.cu, which the compiler can build side by side.
template <class T, class Tile>
cudaError_t launch_gemm_mma_tile(const GemmArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % 32 == 0) {
      using L = MmaLayout<F, Tile>;
      const TileSchedule schedule = mma_schedule<Tile>(args, L::kChunk);
      MmaProblem problem{static_cast<bytes_ptr>(args.x), args.w, args.y, {}, schedule, args.m, args.n, args.k,
                         args.k / F::kElems * F::kBytes};
      const auto kernel = gemm_mma_kernel<F, T, Tile>;
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
      if (status != cudaSuccess) return;
      if (schedule.cuts_tiles()) {
        problem.partial = PartialTiles::at(args.scratch, schedule);
        status = cudaMemsetAsync(problem.partial.arrivals, 0, schedule.tiles * 4, stream);
        if (status != cudaSuccess) return;
      }
      kernel<<<static_cast<unsigned>(schedule.blocks), L::kThreads, L::kBytes, stream>>>(problem);
      status = cudaGetLastError();
    }
  });
  return status;
}

}  // namespace quantgemm

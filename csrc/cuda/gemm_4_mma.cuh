// SPDX-License-Identifier: MIT
// y = x · wᵀ on tensor cores, activations kept in 16 bits. Idea: weights are the A operand (rows of
// w = rows of A), activations the B operand, so that the tile of tokens can be as narrow as 8. A warp
// owns its rows of w: it decodes them straight from the blocks in shared memory into A fragments;
// nothing decoded is ever stored, and no weight is decoded twice in a block. Any order of k will do
// as long as A and B agree on it, so a lane takes whole quads of four neighbouring weights.
// Limit: tensor cores with many tokens, reading the weights with few.
#pragma once
#include "../formats/gguf_formats.h"
#include "gemm_fragments.cuh"
#include "gemm_tiles.cuh"

namespace quantgemm {

// kTokens × (16 kRowTiles kWarps) tile of a block, kRowTiles of 16 rows in each warp.
struct Tokens32 {
  static constexpr int kTokens = 32, kRowTiles = 2, kWarps = 4, kStages = 3, kBlocksPerSm = 4;
};
struct Tokens64 {
  static constexpr int kTokens = 64, kRowTiles = 2, kWarps = 4, kStages = 3, kBlocksPerSm = 3;
};
struct Tokens128 {
  static constexpr int kTokens = 128, kRowTiles = 2, kWarps = 4, kStages = 3, kBlocksPerSm = 2;
};

template <class F, class Tile>
struct MmaLayout {
  static constexpr int kThreads = 32 * Tile::kWarps;
  static constexpr int kRows = 16 * Tile::kRowTiles * Tile::kWarps, kElems = kRows * Tile::kTokens;
  // An iteration takes 64 values of k. Weights come in chunks: whole blocks, and enough of them that
  // rounding to 16 bytes does not cost much. There is room for two chunks, as iterations are staged
  // kStages − 1 ahead.
  static constexpr int kIter = 64, kChunk = F::kElems > 128 ? F::kElems : 128;
  static constexpr int kChunkIters = kChunk / kIter, kChunkBytes = kChunk / F::kElems * F::kBytes;
  static_assert(Tile::kStages - 1 <= kChunkIters);
  static constexpr int kPieces = (kChunkBytes + 15 + 16 - kAlignOf<F::kBytes>) / 16;
  static constexpr int kPitch = 16 * (kPieces | 1);  // odd: 8 rows begin in different banks
  static constexpr int kTokenBytes = Tile::kTokens * kIter * 2;  // of one stage
  static constexpr int kWeightBytes = kRows * kPitch;            // of one chunk
  static constexpr int kPipeline = Tile::kStages * kTokenBytes + 2 * kWeightBytes;
  static constexpr int kOutPitch = 2 * kRows + 16;  // afterwards: [token][row] of y
  static constexpr int kBytes = std::max(kPipeline, Tile::kTokens * kOutPitch);
};

struct MmaProblem {
  bytes_ptr x, w;
  void* y;
  PartialTiles partial;
  TileSchedule schedule;
  int64_t m, n, k, row_bytes;
};

// A fragments of a warp's rows for 32 of k, two steps of 16. Lane c of a row takes quads c and c + 4,
// which share bytes in blocks of 32; in larger blocks quads 2c and 2c + 1, so that both are of one
// group and their activations one 16-byte load.
template <BlockFormat F>
inline constexpr bool kPairedQuads = F::kElems > 32;

template <class Tile>
struct Fragments {
  uint32_t words[Tile::kRowTiles][2][4];
};

// What a warp decodes next, quad after quad in between its products.
template <BlockFormat F, class T, class Tile>
struct SlabDecoder {
  static constexpr int kQuads = 4 * Tile::kRowTiles;  // of a lane in 32 of k
  Slab slabs[Tile::kRowTiles];
  SlabAffines<F> shared[Tile::kRowTiles];
  Affine affine;

  __device__ __forceinline__ void load_affines() {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) shared[i].load(slabs[i], threadIdx.x % 4);
  }
  __device__ __forceinline__ void quad(Fragments<Tile>& out, int part, int index) {
    const int i = index / 4, half = index / 2 % 2, step = index % 2, c = threadIdx.x % 4;
    const Slab& slab = slabs[i];
    const bytes_ptr block = slab.blocks[half] + (kPairedQuads<F> || part == 0 ? 0 : slab.second);
    if (step == 0) {
      if constexpr (!kPairedQuads<F>) affine = F::affine(block, 0);
      else if constexpr (SlabAffines<F>::kGroups == 4) affine = shared[i].get(part, c / 2, half);
      else affine = shared[i].get(0, part, half);
    }
    float v[4];
    decode_quad<F>(block, kPairedQuads<F> ? slab.within / 4 + 8 * part + 2 * c + step : c + 4 * step, affine, v);
    out.words[i][step][half] = pack_pair(v[0], v[1], T{});
    out.words[i][step][2 + half] = pack_pair(v[2], v[3], T{});
  }
};

// sums += a · x for one part (32 of k) of a slab of tokens; meanwhile the next part is decoded.
template <BlockFormat F, class T, class Tile>
__device__ __forceinline__ void multiply_and_decode(float (&sums)[Tile::kRowTiles][Tile::kTokens / 8][4],
                                                    const Fragments<Tile>& a, bytes_ptr tokens, int part,
                                                    SlabDecoder<F, T, Tile>& decoder, Fragments<Tile>& next) {
  constexpr int kRT = Tile::kRowTiles, kNT = Tile::kTokens / 8, kQuads = SlabDecoder<F, T, Tile>::kQuads;
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kNT; j += 2) {
    uint4 b[2];
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const bytes_ptr row = tokens + (8 * (j + l) + r) * 128;
      if constexpr (kPairedQuads<F>) {
        b[l] = *reinterpret_cast<const uint4*>(row + 16 * ((4 * part + c) ^ swizzle(r)));
      } else {
        const int piece = 4 * part + c / 2, within = 8 * (c % 2);
        const uint2 low = *reinterpret_cast<const uint2*>(row + 16 * (piece ^ swizzle(r)) + within);
        const uint2 high = *reinterpret_cast<const uint2*>(row + 16 * ((piece + 2) ^ swizzle(r)) + within);
        b[l] = make_uint4(low.x, low.y, high.x, high.y);
      }
    }
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int l = 0; l < 2; ++l)
#pragma unroll
        for (int i = 0; i < kRT; ++i)
          mma_16x8x16(sums[i][j + l], a.words[i][step], step ? b[l].z : b[l].x, step ? b[l].w : b[l].y, T{});
#pragma unroll
    for (int l = 0; l < 2 * kQuads / kNT; ++l) decoder.quad(next, 1 - part, j * kQuads / kNT + l);
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
  const uint32_t smem_address = shared_address(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;

  uint32_t unit = p.schedule.first_unit(blockIdx.x);
  const uint32_t end_unit = p.schedule.first_unit(blockIdx.x + 1);
  while (unit < end_unit) {
    const uint32_t tile = unit / p.schedule.chunks, chunk0 = unit % p.schedule.chunks;
    const uint32_t left = min(p.schedule.chunks - chunk0, end_unit - unit);
    unit += left;
    const int64_t row0 = int64_t{tile / p.schedule.token_tiles} * L::kRows;
    const int64_t token0 = int64_t{tile % p.schedule.token_tiles} * Tile::kTokens;
    const int last_row = static_cast<int>(min(p.n - 1 - row0, int64_t{L::kRows - 1}));
    const int num_tokens = static_cast<int>(min(p.m - token0, int64_t{Tile::kTokens}));
    const int64_t k0 = int64_t{chunk0} * L::kChunk;
    const int num_k = static_cast<int>(min(p.k - k0, int64_t{left} * L::kChunk));
    const int iters = (num_k + L::kIter - 1) / L::kIter;
    const bytes_ptr tile_w = p.w + row0 * p.row_bytes + chunk0 * int64_t{L::kChunkBytes};

    const RowStager<L::kRows, L::kPieces, L::kPitch, L::kThreads> stage_rows(tile_w, p.w + p.n * p.row_bytes,
                                                                             p.row_bytes, last_row, threadIdx.x);
    const TokenStager<Tile::kTokens, L::kThreads> stage_tokens(p.x + 2 * (token0 * p.k + k0), p.k, num_tokens);
    const auto stage = [&](int iter) {
      if (iter < iters) {
        stage_tokens(smem_address + iter % kStages * L::kTokenBytes, iter * L::kIter, num_k - iter * L::kIter);
        const int chunk = iter / L::kChunkIters;
        if (iter % L::kChunkIters == 0)
          stage_rows(smem_address + kStages * L::kTokenBytes + chunk % 2 * L::kWeightBytes,
                     chunk * int64_t{L::kChunkBytes}, threadIdx.x);
      }
      cp_async_commit();
    };

    float sums[kRT][kNT][4] = {};
    const int first_row = warp * kRT * 16 + r;  // of the lane
    int skew[kRT][2];                             // bytes from a multiple of 16 to the lane's rows
#pragma unroll
    for (int i = 0; i < kRT; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        skew[i][half] = static_cast<int>(reinterpret_cast<uintptr_t>(tile_w)) +
                        (first_row + 16 * i + 8 * half) * static_cast<int>(p.row_bytes);
#pragma unroll 1
    for (int iter = 0; iter < kStages - 1; ++iter) stage(iter);

    SlabDecoder<F, T, Tile> decoder;
    const auto decode_from = [&](int iter) {  // behind the last iteration: whatever bytes are there
      const int chunk = iter / L::kChunkIters, in_chunk = iter % L::kChunkIters * L::kIter;
      const bytes_ptr rows = weights_smem + chunk % 2 * L::kWeightBytes + first_row * L::kPitch +
                             in_chunk / F::kElems * F::kBytes;
#pragma unroll
      for (int i = 0; i < kRT; ++i) {
        decoder.slabs[i].within = in_chunk % F::kElems;
        decoder.slabs[i].second = (iter + 1) * L::kIter > num_k ? 0 : F::kBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          decoder.slabs[i].blocks[half] =
              rows + (16 * i + 8 * half) * L::kPitch + ((skew[i][half] + chunk * L::kChunkBytes) & 15);
      }
      decoder.load_affines();
    };
    cp_async_wait<kStages - 2>();
    __syncthreads();
    Fragments<Tile> first, second;
    decode_from(0);
#pragma unroll
    for (int index = 0; index < decoder.kQuads; ++index) decoder.quad(first, 0, index);

#pragma unroll 1
    for (int iter = 0; iter < iters; ++iter) {
      const bytes_ptr tokens = tokens_smem + iter % kStages * L::kTokenBytes;
      multiply_and_decode<F, T, Tile>(sums, first, tokens, 0, decoder, second);
      cp_async_wait<kStages - 3>();
      __syncthreads();  // everybody's copies for iter + 1 have arrived; nobody reads the slots of iter - 1
      stage(iter + kStages - 1);
      decode_from(iter + 1);
      multiply_and_decode<F, T, Tile>(sums, second, tokens, 1, decoder, first);
    }
    cp_async_wait<0>();
    __syncthreads();  // the pipeline's memory is free

    if (left < p.schedule.chunks) {  // a part of the tile
      const auto slot_of = [&](uint32_t block, bool begins) {
        return reinterpret_cast<float4*>(p.partial.sums + (2 * int64_t{block} + begins) * L::kElems) + threadIdx.x;
      };
      constexpr int kStride = L::kThreads;
      const uint32_t first = p.schedule.block_of(tile * p.schedule.chunks);
      const uint32_t last = p.schedule.block_of((tile + 1) * p.schedule.chunks - 1);
      {
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
      if (threadIdx.x == 0) is_last = atomicAdd(p.partial.arrivals + tile, 1u) == last - first;
      __syncthreads();
      if (!is_last) continue;
      __threadfence();
      {
#pragma unroll
        for (int i = 0; i < kRT; ++i)
#pragma unroll
          for (int j = 0; j < kNT; ++j) sums[i][j][0] = sums[i][j][1] = sums[i][j][2] = sums[i][j][3] = 0;
        for (uint32_t block = first; block <= last; ++block) {
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
#pragma unroll
      for (int i = 0; i < kRT; ++i)
#pragma unroll
        for (int j = 0; j < kNT; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = (warp * kRT + i) * 16 + 8 * (e / 2) + r, token = 8 * j + 2 * c + e % 2;
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

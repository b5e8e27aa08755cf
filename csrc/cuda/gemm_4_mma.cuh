// SPDX-License-Identifier: MIT
// y = x · wᵀ on tensor cores, activations kept in 16 bits. Idea: weights are the A operand (rows of
// w = rows of A), activations the B operand, so that a tile of tokens can be narrow. Warps decode the
// blocks in shared memory straight into A fragments, each weight once per block; up to 128 tokens a
// warp keeps its fragments, above it decodes for the next slab of k while it multiplies this one, and
// warps exchange. Any order of k will do as long as A and B agree, so lanes take whole quads.
// Limit: the rate of mma.sync with many tokens, decoding with few.
#pragma once
#include "../formats/gguf_formats.h"
#include "gemm_fragments.cuh"
#include "gemm_tiles.cuh"

namespace quantgemm {

// A block's tile is kTokens × (16 kRowTiles kWarpsN); each of kWarpsN × kWarpsM warps has kRowTiles of
// 16 rows and 1/kWarpsM of the tokens.
struct Tokens32 {
  static constexpr int kTokens = 32, kRowTiles = 2, kWarpsN = 4, kWarpsM = 1, kStages = 3, kBlocksPerSm = 3;
};
struct Tokens64 {
  static constexpr int kTokens = 64, kRowTiles = 2, kWarpsN = 4, kWarpsM = 1, kStages = 3, kBlocksPerSm = 2;
};
struct Tokens128 {
  static constexpr int kTokens = 128, kRowTiles = 2, kWarpsN = 4, kWarpsM = 1, kStages = 3, kBlocksPerSm = 2;
};
struct Tokens256 {
  static constexpr int kTokens = 256, kRowTiles = 4, kWarpsN = 2, kWarpsM = 4, kStages = 3, kBlocksPerSm = 1;
};

template <class F, class Tile>
struct MmaLayout {
  static constexpr int kWarps = Tile::kWarpsN * Tile::kWarpsM, kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * Tile::kRowTiles * Tile::kWarpsN, kElems = kRows * Tile::kTokens;
  // Fragments (16 rows, 16 of k) that a warp decodes of 32 of k. Where several warps multiply the same
  // rows, each decodes a part and they exchange fragments; else they stay in the warp's registers.
  static constexpr bool kExchange = Tile::kWarpsM > 1;
  static constexpr int kDecoded = 2 * Tile::kRowTiles / Tile::kWarpsM;
  static_assert(2 * Tile::kRowTiles % Tile::kWarpsM == 0);
  // An iteration takes 64 values of k. Weights come in chunks: whole blocks, and enough of them that
  // rounding to 16 bytes does not cost much. There is room for two chunks, as iterations are staged
  // kStages − 1 ahead.
  static constexpr int kIter = 64, kChunk = F::kElems > 128 ? F::kElems : 128;
  static constexpr int kChunkIters = kChunk / kIter, kChunkBytes = kChunk / F::kElems * F::kBytes;
  static_assert(Tile::kStages - 1 <= kChunkIters);
  static constexpr int kPieces = (kChunkBytes + 15 + 16 - kAlignOf<F::kBytes>) / 16;
  static constexpr int kPitch = 16 * (kPieces | 1);              // odd: 8 rows begin in different banks
  static constexpr int kTokenBytes = Tile::kTokens * kIter * 2;  // of one stage
  static constexpr int kWeightBytes = kRows * kPitch;            // of one chunk
  static constexpr int kFragmentBytes = kExchange ? kRows * 32 * 2 : 0;  // of 32 of k; room for four
  static constexpr int kWeightsAt = Tile::kStages * kTokenBytes, kFragmentsAt = kWeightsAt + 2 * kWeightBytes;
  static constexpr int kPipeline = kFragmentsAt + 4 * kFragmentBytes;
  static constexpr int kOutPitch = 2 * kRows + 16;  // afterwards: [token][row] of y
  static constexpr int kBytes = std::max(kPipeline, Tile::kTokens* kOutPitch);
};

struct MmaProblem {
  bytes_ptr x, w;
  void* y;
  PartialTiles partial;
  TileSchedule schedule;
  int64_t m, n, k, row_bytes;
};

// A fragments of the row tiles a warp decodes for 32 of k, two steps of 16. Lane c of a row takes
// quads c and c + 4, which share bytes in blocks of 32 and leave each step in one group; in larger
// blocks without exchange quads 2c and 2c + 1, so that a lane has one group and one 16-byte load of x.
template <class F, class Tile>
inline constexpr bool kPairedQuads = F::kElems > 32 && !MmaLayout<F, Tile>::kExchange;

// What a warp decodes next, quad after quad in between its products.
template <BlockFormat F, class T, class Tile>
struct SlabDecoder {
  static constexpr int kCount = MmaLayout<F, Tile>::kDecoded, kQuads = 2 * kCount;
  static constexpr int kTiles = kCount > 1 ? kCount / 2 : 1;
  using Shared = SlabAffines<F>;
  Slab slabs[kTiles];
  Shared shared[kTiles];
  Affine affines[2];

  __device__ __forceinline__ void load_affines() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) shared[i].load(slabs[i], threadIdx.x % 4);
  }
  // Quads go through both rows of a fragment, then the fragments.
  __device__ __forceinline__ void quad(Fragments<kCount>& out, int part, int index) {
    constexpr bool kPaired = kPairedQuads<F, Tile>;
    const int half = index % 2, fragment = index / 2, i = fragment / 2, c = threadIdx.x % 4;
    const int step = kCount == 1 ? threadIdx.x / 32 % 2 : fragment % 2;
    const Slab& slab = slabs[i];
    const bytes_ptr block = slab.blocks[half] + (F::kElems > 32 || part == 0 ? 0 : slab.second);
    if (fragment % 2 == 0 || (Shared::kGroups == 4 && !kPaired)) {
      Affine affine;
      if constexpr (F::kElems == 32)
        affine = F::affine(block, 0);
      else if constexpr (Shared::kGroups == 4)
        affine = shared[i].get(part, kPaired ? c / 2 : step, half);
      else
        affine = shared[i].get(0, part, half);
      affines[half] = for_codes<F>(affine);
    }
    const int first = F::kElems > 32 ? slab.within / 4 + 8 * part : 0;
    float v[4];
    decode_four<F>(block, first + (kPaired ? 2 * c + step : c + 4 * step), affines[half], v);
    out.words[fragment][half] = pack_pair(v[0], v[1], T{});
    out.words[fragment][2 + half] = pack_pair(v[2], v[3], T{});
  }
};

// sums += slab · x, part by part: decode, then multiply.
template <BlockFormat F, class T, class Tile, int NT>
__device__ __forceinline__ void multiply_own(float (&sums)[Tile::kRowTiles][NT][4], bytes_ptr tokens,
                                             SlabDecoder<F, T, Tile>& decoder) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    Fragments<2 * Tile::kRowTiles> a;
#pragma unroll
    for (int index = 0; index < decoder.kQuads; ++index) decoder.quad(a, part, index);
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const bytes_ptr row = tokens + (8 * j + r) * 128;
      uint2 b[2];
      if constexpr (kPairedQuads<F, Tile>) {
        const uint4 both = *reinterpret_cast<const uint4*>(row + 16 * ((4 * part + c) ^ swizzle(r)));
        b[0] = make_uint2(both.x, both.y), b[1] = make_uint2(both.z, both.w);
      } else {
        b[0] = load_tokens(row, part, 0), b[1] = load_tokens(row, part, 1);
      }
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i)
          mma_16x8x16(sums[i][j], a.words[2 * i + step], b[step].x, b[step].y, T{});
    }
  }
}

// sums += a · x for one part (32 of k) of a slab, while that part of the next slab is decoded. Fragments
// are in shared memory, [row tile][step][lane] of 16 bytes: all warps' in `fragments`, the warp's own of
// the next slab go to `next`.
template <BlockFormat F, class T, class Tile, int NT>
__device__ __forceinline__ void multiply_exchanged(float (&sums)[Tile::kRowTiles][NT][4],
                                                   const uint4* fragments, bytes_ptr tokens, int part,
                                                   SlabDecoder<F, T, Tile>& decoder, uint4* next) {
  constexpr int kQuads = SlabDecoder<F, T, Tile>::kQuads;
  const int r = threadIdx.x % 32 / 4;
  Fragments<kQuads / 2> decoded;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      const uint4 v = fragments[(2 * i + step) * 32];
      a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const uint2 b = load_tokens(tokens + (8 * j + r) * 128, part, step);
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) mma_16x8x16(sums[i][j], a[i], b.x, b.y, T{});
      constexpr int kEvery = 2 * NT / kQuads;  // products between two quads
      const int at = step * NT + j, index = at / kEvery;
      if (at % kEvery == 0) {
        decoder.quad(decoded, part, index);
        const uint32_t (&w)[4] = decoded.words[index / 2];
        if (index % 2) next[index / 2 * 32] = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

template <BlockFormat F, class T, class Tile>
__global__ void __launch_bounds__(MmaLayout<F, Tile>::kThreads, Tile::kBlocksPerSm)
    gemm_mma_kernel(const MmaProblem p) {
  using L = MmaLayout<F, Tile>;
  constexpr int kRT = Tile::kRowTiles, kNT = Tile::kTokens / 8 / Tile::kWarpsM, kStages = Tile::kStages;
  extern __shared__ __align__(128) uint8_t smem[];
  const uint32_t smem_address = shared_address(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int warp_n = warp / Tile::kWarpsM, warp_m = warp % Tile::kWarpsM;

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

    const RowStager<L::kRows, L::kPieces, L::kPitch, L::kThreads> stage_rows(
        tile_w, p.w + p.n * p.row_bytes, p.row_bytes, last_row, threadIdx.x);
    const TokenStager<Tile::kTokens, L::kThreads> stage_tokens(p.x + 2 * (token0 * p.k + k0), p.k,
                                                               num_tokens);
    const auto stage = [&](int iter) {
      const int chunk = iter / L::kChunkIters;
      if (iter % L::kChunkIters == 0 && iter < iters)
        stage_rows(smem_address + L::kWeightsAt + chunk % 2 * L::kWeightBytes,
                   chunk * int64_t{L::kChunkBytes}, threadIdx.x);
      stage_tokens(smem_address + iter % kStages * L::kTokenBytes, iter * L::kIter, num_k - iter * L::kIter);
      cp_async_commit();
    };

    float sums[kRT][kNT][4] = {};
    SlabDecoder<F, T, Tile> decoder;
    const int first_row = warp * decoder.kCount / 2 * 16 + r;  // that the lane decodes
    int skew[decoder.kTiles][2];  // bytes from a multiple of 16 to the lane's rows
#pragma unroll
    for (int i = 0; i < decoder.kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        skew[i][half] = static_cast<int>(reinterpret_cast<uintptr_t>(tile_w)) +
                        (first_row + 16 * i + 8 * half) * static_cast<int>(p.row_bytes);
#pragma unroll 1
    for (int iter = 0; iter < kStages - 1; ++iter) stage(iter);

    const auto decode_from = [&](int iter) {  // behind the last iteration: whatever bytes are there
      const int chunk = iter / L::kChunkIters, in_chunk = iter % L::kChunkIters * L::kIter;
      const bytes_ptr rows = smem + L::kWeightsAt + chunk % 2 * L::kWeightBytes + first_row * L::kPitch +
                             in_chunk / F::kElems * F::kBytes;
#pragma unroll
      for (int i = 0; i < decoder.kTiles; ++i) {
        decoder.slabs[i].within = in_chunk % F::kElems;
        decoder.slabs[i].second = (iter + 1) * L::kIter > num_k ? 0 : F::kBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          decoder.slabs[i].blocks[half] =
              rows + (16 * i + 8 * half) * L::kPitch + ((skew[i][half] + chunk * L::kChunkBytes) & 15);
      }
      decoder.load_affines();
    };
    const auto tokens_of = [&](int iter) -> bytes_ptr {
      return smem + iter % kStages * L::kTokenBytes + warp_m * kNT * 8 * 128;
    };
    if constexpr (!L::kExchange) {
#pragma unroll 1
      for (int iter = 0; iter < iters; ++iter) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // everybody's copies for iter have arrived; nobody reads the slots of iter - 1
        stage(iter + kStages - 1);
        decode_from(iter);
        multiply_own<F, T, Tile>(sums, tokens_of(iter), decoder);
      }
    } else {
      // Two slabs of two parts: the one that is multiplied and the one that is decoded meanwhile.
      uint4* const fragments = reinterpret_cast<uint4*>(smem + L::kFragmentsAt) + lane;
      constexpr int kPart = L::kFragmentBytes / 16;
      const int all = warp_n * kRT * 64, own = warp * decoder.kCount * 32;
      cp_async_wait<kStages - 2>();
      __syncthreads();  // iteration 0 has arrived
      decode_from(0);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        Fragments<decoder.kCount> decoded;
#pragma unroll
        for (int index = 0; index < decoder.kQuads; ++index) decoder.quad(decoded, part, index);
#pragma unroll
        for (int i = 0; i < decoder.kCount; ++i) {
          const uint32_t (&w)[4] = decoded.words[i];
          fragments[part * kPart + own + i * 32] = make_uint4(w[0], w[1], w[2], w[3]);
        }
      }
#pragma unroll 1
      for (int iter = 0; iter < iters; ++iter) {
        cp_async_wait<kStages - 3>();
        // Everybody's fragments of iter are there and copies for iter + 1 have arrived; nobody uses the
        // fragments and slots of iter - 1 any more.
        __syncthreads();
        stage(iter + kStages - 1);
        decode_from(iter + 1);
        const uint4* const from = fragments + iter % 2 * 2 * kPart + all;
        uint4* const to = fragments + (iter + 1) % 2 * 2 * kPart + own;
#pragma unroll
        for (int part = 0; part < 2; ++part)
          multiply_exchanged<F, T, Tile>(sums, from + part * kPart, tokens_of(iter), part, decoder,
                                         to + part * kPart);
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // the pipeline's memory is free

    if (left < p.schedule.chunks) {  // a part of the tile
      const auto slot_of = [&](uint32_t block, bool begins) {
        return reinterpret_cast<float4*>(p.partial.sums + (2 * int64_t{block} + begins) * L::kElems) +
               threadIdx.x;
      };
      constexpr int kStride = L::kThreads;
      const uint32_t first = p.schedule.block_of(tile * p.schedule.chunks);
      const uint32_t last = p.schedule.block_of((tile + 1) * p.schedule.chunks - 1);
      float4* out = slot_of(blockIdx.x, chunk0 == 0);
#pragma unroll
      for (int i = 0; i < kRT; ++i)
#pragma unroll
        for (int j = 0; j < kNT; ++j)
          out[(i * kNT + j) * kStride] =
              make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
      __shared__ bool is_last;
      __threadfence();  // the partial tile is visible before the arrival is
      __syncthreads();
      if (threadIdx.x == 0) is_last = atomicAdd(p.partial.arrivals + tile, 1u) == last - first;
      __syncthreads();
      if (!is_last) continue;
      __threadfence();
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

    // Through shared memory, because a lane's sums of one token are of rows 8 apart.
#pragma unroll
    for (int i = 0; i < kRT; ++i)
#pragma unroll
      for (int j = 0; j < kNT; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = (warp_n * kRT + i) * 16 + 8 * (e / 2) + r,
                    token = (warp_m * kNT + j) * 8 + 2 * c + e % 2;
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

template <class F, class Tile>
TileSchedule mma_schedule(const GemmArgs& args) {
  using L = MmaLayout<F, Tile>;
  return schedule_tiles((args.n + L::kRows - 1) / L::kRows, (args.m + Tile::kTokens - 1) / Tile::kTokens,
                        (args.k + L::kChunk - 1) / L::kChunk,
                        int64_t{multiprocessors()} * Tile::kBlocksPerSm);
}

template <class Tile>
int64_t mma_scratch_bytes(const GemmArgs& args) {
  int64_t bytes = 0;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % 32 == 0)
      bytes = PartialTiles::bytes(mma_schedule<F, Tile>(args), MmaLayout<F, Tile>::kElems);
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
      const TileSchedule schedule = mma_schedule<F, Tile>(args);
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

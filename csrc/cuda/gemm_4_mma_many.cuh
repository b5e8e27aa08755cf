// SPDX-License-Identifier: MIT
// The tensor-core rung for more than 128 tokens. Idea: warps specialise. Four decode blocks of weights
// to A fragments and copy activations, a few slabs of k ahead; eight only multiply, 64 rows × 64 tokens
// each, and need 1.5 instructions per product. Slabs pass through a ring in shared memory
// with a barrier for "full" and one for "empty" each. Blocks last for several tiles, so that decoders
// begin the next one while sums are stored. Limit: the rate of mma.sync.
#pragma once
#include "../formats/gguf_formats.h"
#include "device.h"
#include "gemm_fragments.cuh"
#include "gemm_tiles.cuh"

namespace quantgemm {

template <class F>
struct ManyLayout {
  static constexpr int kTokens = 256, kRows = 128, kElems = kRows * kTokens;
  static constexpr int kMultiplierWarps = 8, kMultipliers = 32 * kMultiplierWarps;  // 2 × 4 of 64 × 64
  static constexpr int kDecoderWarps = 4, kDecoders = 32 * kDecoderWarps, kThreads = kMultipliers + kDecoders;
  static constexpr int kRowTiles = 4, kTokenTiles = 8, kWarpRows = kRows / kDecoderWarps;
  // 65536 registers are 168 for each of 384 threads; multipliers take over what decoders do not need.
  static constexpr int kMultiplierRegisters = 200, kDecoderRegisters = 104;
  static constexpr bool kPaired = F::kElems > 32;  // gemm_fragments.cuh
  // Weights come in chunks, as in gemm_4_mma.cuh, but each decoder warp copies its own rows.
  static constexpr int kSlab = 64, kChunk = F::kElems > 128 ? F::kElems : 128;
  static constexpr int kChunkSlabs = kChunk / kSlab, kChunkBytes = kChunk / F::kElems * F::kBytes;
  static constexpr int kPieces = (kChunkBytes + 15 + 16 - kAlignOf<F::kBytes>) / 16;
  static constexpr int kPitch = 16 * (kPieces | 1);        // odd: 8 rows begin in different banks
  static constexpr int kWeightBytes = kWarpRows * kPitch;  // of one chunk and warp
  // A place in the ring: x as [token][64], fragments as [32 of k][row tile][step][lane] of 16 bytes.
  static constexpr int kPlaces = 3, kTokenBytes = kTokens * kSlab * 2, kPartBytes = kRows * 32 * 2;
  static constexpr int kPlaceBytes = kTokenBytes + 2 * kPartBytes;
  static constexpr int kWeightsAt = kPlaces * kPlaceBytes;
  static constexpr int kOutAt = kWeightsAt + 2 * kDecoderWarps * kWeightBytes, kOutBytes = 512;  // of a warp
  static constexpr int kBarriersAt = kOutAt + kMultiplierWarps * kOutBytes;
  static constexpr int kBytes = kBarriersAt + 2 * kPlaces * 8;
};

// Where a side is in the ring; both walk it alike.
template <class L>
struct RingPlace {
  uint32_t smem, at = 0, barriers = L::kBarriersAt, turn = 0;

  __device__ uint32_t address() const { return smem + at; }
  __device__ uint32_t full() const { return smem + barriers; }
  __device__ uint32_t empty() const { return full() + 8; }
  __device__ __forceinline__ void step() {
    at += L::kPlaceBytes, barriers += 16;
    if (at == L::kWeightsAt) at = 0, barriers = L::kBarriersAt, turn ^= 1;
  }
};

// Lane l's fragment of a row tile: its two steps' places. Decoder lanes of blocks of 32 have other
// lanes' quads; with the second step's lanes in another order their stores meet no bank twice.
__device__ __forceinline__ int fragment_place(int lane, int step) { return 32 * step + (lane ^ 2 * step); }

// The decoder warps' part.
template <BlockFormat F, class T>
__device__ __forceinline__ void decode_tiles(const MmaProblem& p, uint8_t* smem) {
  using L = ManyLayout<F>;
  constexpr int kTiles = L::kWarpRows / 16;
  const int thread = threadIdx.x - L::kMultipliers, lane = thread % 32, warp = thread / 32;
  const int r = lane / 4, c = lane % 4;
  RingPlace<L> ring{shared_address(smem)};
  const int weights_at = L::kWeightsAt + 2 * warp * L::kWeightBytes;
  int to[2];  // where the lane's first and second quad of a row go
#pragma unroll
  for (int s = 0; s < 2; ++s)
    to[s] = 16 * (L::kPaired ? fragment_place(lane, s) : fragment_place(4 * r + c / 2 + 2 * s, c % 2));

  for (TileWalk<L> at(p); at.next(p);) {
    const int slabs = (at.num_k + L::kSlab - 1) / L::kSlab;
    const bytes_ptr rows = at.weights(p) + warp * L::kWarpRows * p.row_bytes;
    const RowStager<L::kWarpRows, L::kPieces, L::kPitch, 32> stage_rows(
        rows, p.w + p.n * p.row_bytes, p.row_bytes, min(at.last_row - warp * L::kWarpRows, L::kWarpRows - 1),
        lane);
    const TokenStager<L::kTokens, L::kDecoders> stage_tokens(p.x + 2 * (at.token0 * p.k + at.k0), p.k,
                                                             at.num_tokens, thread);
    const auto stage_chunk = [&](int chunk) {
      stage_rows(ring.smem + weights_at + chunk % 2 * L::kWeightBytes, chunk * int64_t{L::kChunkBytes}, lane);
    };
    int skew[kTiles][2];  // bytes from a multiple of 16 to the lane's rows
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        skew[i][half] = static_cast<int>(reinterpret_cast<uintptr_t>(rows)) +
                        (16 * i + 8 * half + r) * static_cast<int>(p.row_bytes);
    stage_chunk(0);
    cp_async_commit();
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab, ring.step()) {
      mbarrier_wait(ring.empty(), ring.turn ^ 1);
      stage_tokens(ring.address(), slab * L::kSlab, at.num_k - slab * L::kSlab, thread);
      mbarrier_arrive_after_copies(ring.full());
      const int chunk = slab / L::kChunkSlabs, in_chunk = slab % L::kChunkSlabs * L::kSlab;
      if (in_chunk == 0) {
        if (slab + L::kChunkSlabs < slabs) stage_chunk(chunk + 1);
        cp_async_commit();
        cp_async_wait<1>();  // this chunk's group is the one before
        __syncwarp();        // … in every lane
      }
      SlabDecoder<F, T, kTiles, L::kPaired> decoder;
      const bytes_ptr from =
          smem + weights_at + chunk % 2 * L::kWeightBytes + r * L::kPitch + in_chunk / F::kElems * F::kBytes;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        decoder.slabs[i].within = in_chunk % F::kElems;
        decoder.slabs[i].second = (slab + 1) * L::kSlab > at.num_k ? 0 : F::kBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          decoder.slabs[i].blocks[half] =
              from + (16 * i + 8 * half) * L::kPitch + ((skew[i][half] + chunk * L::kChunkBytes) & 15);
      }
      decoder.load_affines();
      uint8_t* const fragments = smem + ring.at + L::kTokenBytes + warp * kTiles * 1024;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        Fragments<2 * kTiles> decoded;
        decoder.part(decoded, part);
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          const uint32_t (&w)[4] = decoded.words[i];
          *reinterpret_cast<uint4*>(fragments + part * L::kPartBytes + i / 2 * 1024 + to[i % 2]) =
              make_uint4(w[0], w[1], w[2], w[3]);
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.full());
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

// Bytes from the start of a place to what a multiplier lane reads first. Kept in registers, as the compiler
// would compute them anew for every slab.
struct LaneOffsets {
  uint32_t fragments, tokens;  // of the first step, of the first part

  template <class L>
  __device__ __forceinline__ static LaneOffsets of(int warp, int lane) {
    const int r = lane / 4, c = lane % 4;
    LaneOffsets at{L::kTokenBytes + warp / 4 * L::kRowTiles * 1024 + 16u * fragment_place(lane, 0),
                   (warp % 4 * 64 + r) * 128 + 16u * (c ^ swizzle(r))};
    keep_in_register(at.fragments), keep_in_register(at.tokens);
    return at;
  }
};

// sums += fragments · x for the 64 of k at a place of the ring.
template <class L, class T>
__device__ __forceinline__ void multiply_slab(float (&sums)[L::kRowTiles][L::kTokenTiles][4],
                                              const uint8_t* place, const LaneOffsets& at, T type) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    uint4 a[L::kRowTiles][2];
#pragma unroll
    for (int i = 0; i < L::kRowTiles; ++i)
#pragma unroll
      for (int step = 0; step < 2; ++step)
        a[i][step] = *reinterpret_cast<const uint4*>(place + (at.fragments ^ 32 * step) + 512 * step +
                                                     part * L::kPartBytes + i * 1024);
#pragma unroll
    for (int j = 0; j < L::kTokenTiles; ++j) {
      const uint4 b = *reinterpret_cast<const uint4*>(place + (at.tokens ^ 64 * part) + j * 8 * 128);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < L::kRowTiles; ++i) {
          const uint32_t words[4] = {a[i][step].x, a[i][step].y, a[i][step].z, a[i][step].w};
          mma_16x8x16(sums[i][j], words, step ? b.z : b.x, step ? b.w : b.y, type);
        }
    }
  }
}

// A warp's sums to y, eight tokens and 32 rows at a time by way of 512 bytes of shared memory.
template <class L, class T>
__device__ __forceinline__ void store_sums(const float (&sums)[L::kRowTiles][L::kTokenTiles][4], T* y,
                                           int64_t n, uint8_t* turn, int rows, int tokens) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
  for (int j = 0; j < L::kTokenTiles; ++j)
#pragma unroll
    for (int first = 0; first < L::kRowTiles; first += 2) {
      __syncwarp();
#pragma unroll
      for (int q = 0; q < 4; ++q) {  // eight rows; afterwards the lane has two of them, of token r
        const float (&d)[4] = sums[first + q / 2][j];
        const uint32_t pair = transpose_8x8(pack_pair(d[q % 2 * 2], d[q % 2 * 2 + 1], T{}));
        *reinterpret_cast<uint32_t*>(turn + 64 * r + 16 * (q ^ (r / 2)) + 4 * c) = pair;
      }
      __syncwarp();
      const uint4 eight = *reinterpret_cast<const uint4*>(turn + 64 * r + 16 * (c ^ (r / 2)));
      const int row = 16 * first + 8 * c;
      if (8 * j + r >= tokens || row >= rows) continue;
      T* const to = y + (8 * j + r) * n + row;
      if (n % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = eight;
      } else {
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (row + e < rows) to[e].bits = static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2));
      }
    }
}

// The multiplier warps' part.
template <BlockFormat F, class T>
__device__ __forceinline__ void multiply_tiles(const MmaProblem& p, uint8_t* smem) {
  using L = ManyLayout<F>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_n = warp / 4, warp_m = warp % 4;
  const auto offsets = LaneOffsets::of<L>(warp, lane);
  RingPlace<L> ring{shared_address(smem)};
  for (TileWalk<L> at(p); at.next(p);) {
    const int slabs = (at.num_k + L::kSlab - 1) / L::kSlab;
    float sums[L::kRowTiles][L::kTokenTiles][4] = {};
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab, ring.step()) {
      mbarrier_wait(ring.full(), ring.turn);
      multiply_slab<L>(sums, smem + ring.at, offsets, T{});
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
    }
    if (at.is_part(p) &&
        !combine_parts<L::kMultipliers>(sums, p, at, threadIdx.x, [] { sync_some<1, L::kMultipliers>(); }))
      continue;
    T* const y = static_cast<T*>(p.y) + (at.token0 + 64 * warp_m) * p.n + at.row0 + 64 * warp_n;
    store_sums<L>(sums, y, p.n, smem + L::kOutAt + warp * L::kOutBytes, at.last_row + 1 - 64 * warp_n,
                  at.num_tokens - 64 * warp_m);
  }
}

template <BlockFormat F, class T>
__global__ void __launch_bounds__(ManyLayout<F>::kThreads, 1) gemm_mma_many_kernel(const MmaProblem p) {
  using L = ManyLayout<F>;
  extern __shared__ __align__(128) uint8_t smem[];
  if (threadIdx.x < L::kPlaces) {
    const uint32_t full = shared_address(smem) + L::kBarriersAt + 16 * threadIdx.x;
    mbarrier_init(full, L::kDecoders + L::kDecoderWarps);  // copies by threads, fragments by warps
    mbarrier_init(full + 8, L::kMultiplierWarps);
  }
  __syncthreads();
  if (threadIdx.x < L::kMultipliers) {
    grow_registers<L::kMultiplierRegisters>();
    multiply_tiles<F, T>(p, smem);
  } else {
    shrink_registers<L::kDecoderRegisters>();
    decode_tiles<F, T>(p, smem);
  }
}

template <class F>
TileSchedule mma_many_schedule(const GemmArgs& args) {
  using L = ManyLayout<F>;
  return schedule_tiles((args.n + L::kRows - 1) / L::kRows, (args.m + L::kTokens - 1) / L::kTokens,
                        (args.k + L::kChunk - 1) / L::kChunk, current_device().multiprocessors, true);
}

// Explicitly instantiated in gemm_4_mma_<type>_256.cu, which the compiler can build side by side.
template <class T>
cudaError_t launch_gemm_mma_many(const GemmArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % 32 == 0) {
      using L = ManyLayout<F>;
      status = launch_tiles(gemm_mma_many_kernel<F, T>, L::kThreads, L::kBytes, args,
                            args.k / F::kElems * F::kBytes, mma_many_schedule<F>(args), stream);
    }
  });
  return status;
}

}  // namespace quantgemm

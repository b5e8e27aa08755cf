// SPDX-License-Identifier: MIT
// The int8 tensor-core product for many tokens on compute capability 9.0: the sums of gemm_5_mma_q8.cuh
// by wgmma. Three warpgroups own 64 rows of w each, 128 tokens together: while one scales the sums of a
// group of 32, the tensor cores add up another's. A fourth copies and decodes (mma_q8_tall_stage.cuh).
// Limit: issue slots, 128 of about 200 per 64 x 128 x 32 for the two FFMA of each sum.
#pragma once
#include "mma_q8_result.cuh"
#include "mma_q8_tall_stage.cuh"

namespace quantgemm::mma_q8 {

// y += s_a · (s_w · Σ) + o_w · sum_a for a lane's sums d.
template <BlockFormat F>
__device__ __forceinline__ void scale_sums(float (&y)[64], const uint32_t (&d)[64], float2 scale,
                                           float2 offset, const uint8_t* scales) {
  const float s[2] = {scale.x, scale.y}, o[2] = {offset.x, offset.y};
  const float minus[2] = {kMinus<F> * s[0], kMinus<F> * s[1]};
#pragma unroll
  for (int p = 0; p < 8; ++p) {
    float token_scale[4], sum[4];
    if constexpr (TallLayout<F>::kSums) {
      for (int h = 0; h < 2; ++h) {
        const float4 q = *reinterpret_cast<const float4*>(scales + 128 * p + 64 * h);
        token_scale[2 * h] = q.x, sum[2 * h] = q.y, token_scale[2 * h + 1] = q.z, sum[2 * h + 1] = q.w;
      }
    } else {
      const float4 q = *reinterpret_cast<const float4*>(scales + 64 * p);
      token_scale[0] = q.x, token_scale[1] = q.y, token_scale[2] = q.z, token_scale[3] = q.w;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = i / 2 % 2, token = i / 4 * 2 + i % 2;
      float& out = y[8 * p + i];
      out = fmaf(fmaf(__uint_as_float(d[8 * p + i]), s[row], minus[row]), token_scale[token], out);
      if constexpr (TallLayout<F>::kSums) out = fmaf(o[row], sum[token], out);
    }
  }
}

// A group's weights in a lane; 16 are followed by zeros.
template <class L>
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], const uint8_t* fragments, int group) {
  if constexpr (L::kGroup == 32) {
    const uint4 fragment = *reinterpret_cast<const uint4*>(fragments + group * 512);
    a[0] = fragment.x, a[1] = fragment.y, a[2] = fragment.z, a[3] = fragment.w;
  } else {
    const uint2 fragment = *reinterpret_cast<const uint2*>(fragments + group / 2 * 512 + group % 2 * 8);
    a[0] = fragment.x, a[1] = fragment.y, a[2] = a[3] = 0;
  }
}

// Stages of a tile out of the ring.
template <BlockFormat F>
__device__ __forceinline__ void multiply_stages(float (&y)[64], const TallLayout<F>& shared,
                                                RingPlace<TallLayout<F>>& place, int stages) {
  using L = TallLayout<F>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const uint64_t start = plain_matrix(shared_address(shared.start()));
  uint32_t d[64];
#pragma unroll 1
  for (; stages > 0; --stages) {
    barrier_wait(shared.full(place.buffer), place.parity);
    const uint64_t codes = swizzled_matrix(shared_address(shared.codes(place.buffer)));
    const uint8_t* fragments = shared.fragments(place.buffer) + (warp * kStageGroups * 32 + lane) * 16;
    const float* table = shared.table(place.buffer, warp) + 2 * r;
    const uint8_t* scales = shared.scales(place.buffer) + 16 * c;
    uint32_t a[4];
    load_fragment<L>(a, fragments, 0);
#pragma unroll 1  // unrolled, the compiler moves sums from register to register, and out of them
    for (int g = 0; g < L::kGroups; ++g) {
      const uint64_t b = codes + g * (L::kGroup / 16);
      if constexpr (kWideScale<F>) {
#pragma unroll
        for (int i = 0; i < 64; ++i) d[i] = kMagicBits;
        add_product(d, a, b);
      } else {
        start_product(d, start, a, b);
      }
      const float2 scale = *reinterpret_cast<const float2*>(table + g * L::kEntry);
      float2 offset{};
      if constexpr (F::kOffset)
        offset = *reinterpret_cast<const float2*>(table + g * L::kEntry + L::kWarpRows);
      wait_for_product(d);
      load_fragment<L>(a, fragments, g + 1 < L::kGroups ? g + 1 : g);
      scale_sums<F>(y, d, scale, offset, scales + g * L::kGroup / 32 * L::kScaleStride);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.free(place.buffer));
    place.advance();
  }
}

// A warp's 16 rows of y, 16 tokens at a time by way of shared memory, where they lie as [token][row].
template <class Out, class L>
__device__ __forceinline__ void store_warp(const GemmArgs& args, const float (&y)[64], float* staged,
                                           int64_t first_row, int64_t first_token, float factor) {
  constexpr int kVector = kPerVector<Out>, kLanes = L::kWarpRows / kVector;  // of a token
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int64_t row = first_row + lane % kLanes * kVector;
  const bool aligned = args.n % kVector == 0;
#pragma unroll
  for (int p = 0; p < 8; ++p) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; ++i)
      staged[(i / 4 * 8 + 2 * c + i % 2) * L::kOutStride + i / 2 % 2 * 8 + r] = y[8 * p + i] * factor;
    __syncwarp();
#pragma unroll
    for (int first = 0; first < 16; first += 32 / kLanes) {
      const int within = first + lane / kLanes;
      const int64_t token = first_token + 16 * p + within;
      if (token >= args.m || row >= args.n) continue;
      const float* from = staged + within * L::kOutStride + lane % kLanes * kVector;
      float v[kVector];
      for (int j = 0; j < kVector; ++j) v[j] = from[j];
      Out* to = static_cast<Out*>(args.y) + token * args.n + row;
      if (aligned) {
        store_vector(to, v);
      } else {
        for (int j = 0; j < kVector; ++j)
          if (row + j < args.n) store1(to + j, v[j]);
      }
    }
  }
}

// A block's parts of tiles, one after the other.
template <class L, class Fn>
__device__ __forceinline__ void for_each_part(const Work& work, Fn&& fn) {
  const int64_t end = work.begin(blockIdx.x + 1);
  for (int64_t unit = work.begin(blockIdx.x); unit < end;) {
    const int64_t tile = unit / work.tile_units;
    const int first = static_cast<int>(unit % work.tile_units), units = static_cast<int>(work.tile_units);
    const int last = end - unit < units - first ? first + static_cast<int>(end - unit) : units;
    unit += last - first;
    fn(tile, tile / work.token_tiles * L::kRows, tile % work.token_tiles * L::kTokens, first, last);
  }
}

template <BlockFormat F>
__global__ void __launch_bounds__(TallLayout<F>::kThreads + kCopyThreads, 1)
    gemm_mma_q8_tall_kernel(const __grid_constant__ GemmArgs args, const __grid_constant__ Work work) {
#ifdef QG_WGMMA
  using L = TallLayout<F>;
  extern __shared__ __align__(1024) uint8_t tall_memory[];
  const L shared{{}, tall_memory};
  for (int i = threadIdx.x; i < L::kStartBytes / 4; i += L::kThreads + kCopyThreads)
    reinterpret_cast<uint32_t*>(shared.start())[i] = 0x80808080u;  // -128 everywhere
  if (threadIdx.x < L::kBuffers) {
    barrier_init(shared.full(threadIdx.x), kCopyThreads);
    barrier_init(shared.free(threadIdx.x), L::kWarps);
  }
  publish_to_wgmma();
  __syncthreads();
  RingPlace<L> place;
  if (threadIdx.x >= L::kThreads) {
    fewer_registers<56>();
    for_each_part<L>(work, [&](int64_t, int64_t first_row, int64_t first_token, int first, int last) {
      fill_ring<F>(args, {args, work, tall_memory, first_row, first_token}, place, first_row, first, last);
    });
  } else {
    more_registers<152>();
    for_each_part<L>(work, [&](int64_t tile, int64_t first_row, int64_t first_token, int first, int last) {
      const int all_stages = (work.k + kStageElems - 1) / kStageElems;
      const int end = last * L::kStages < all_stages ? last * L::kStages : all_stages;
      float y[64] = {};
      multiply_stages<F>(y, shared, place, end - first * L::kStages);
      if (last - first < work.tile_units && !combine<L>(y, work, tile, first == 0)) return;
      const int warp = threadIdx.x / 32;
      first_row += warp * L::kWarpRows;
      constexpr float kFactor = 1 / kOffsetFactor<F>;
      switch (args.type) {
        case Real::kFloat32:
          return store_warp<float, L>(args, y, shared.out(warp), first_row, first_token, kFactor);
        case Real::kFloat16:
          return store_warp<Half, L>(args, y, shared.out(warp), first_row, first_token, kFactor);
        case Real::kBFloat16:
          return store_warp<BFloat16, L>(args, y, shared.out(warp), first_row, first_token, kFactor);
      }
    });
  }
#endif
}

}  // namespace quantgemm::mma_q8

// SPDX-License-Identifier: MIT
// The int8 tensor-core product for more than 128 tokens, in the shape of gemm_4_mma_many.cuh: four warps
// copy activations and turn blocks of weights to A fragments and a table of scales, a few slabs of k
// ahead; the others only multiply and scale. y += s_a · (s_w · Σ q_w q_a) per group of 32, and o_w · sum_a
// of four groups by one product of bfloat16.
// Limit: a product holds up dispatch for 7 clocks, in which no FFMA starts, and has 8 FFMA.
#pragma once
#include "gemm_5_mma_q8_many_decode.cuh"

namespace quantgemm::mma_q8 {

// Bytes from the start of a place to what a multiplier lane reads first.
struct ManyOffsets {
  uint32_t codes, fragments, scales, table, offsets, sums;

  template <class L>
  __device__ __forceinline__ static ManyOffsets of(int warp, int lane) {
    const int r = lane / 4, c = lane % 4, row_tile = warp / L::kWarpsM * L::kRowTiles;
    const int token = warp % L::kWarpsM * L::kTokenTiles * 8;
    ManyOffsets at;
    at.codes = (token + lane % 8 + lane / 16 * 8) * 128 + 16 * ((lane / 8 % 2) ^ (lane % 8));
    at.fragments = L::kGroupsAt + row_tile * 512 + 16 * lane;
    at.scales = L::kGroupsAt + L::kScalesAt + token * 4 + 16 * c;
    at.table = L::kGroupsAt + L::kTableAt + (row_tile * 8 + r) * 16;
    at.offsets = L::kGroupsAt + c * L::kGroupBytes + L::kOffsetsAt + (row_tile * 8 + r) * 8;
    at.sums = L::kGroupsAt + c * L::kGroupBytes + L::kSumsAt + (token + r) * 4;
    keep_in_register(at.codes), keep_in_register(at.fragments), keep_in_register(at.scales);
    keep_in_register(at.table);
    return at;
  }
};

// sums += s_w · s_a · w · x over one group. s · Σ without converting: fma(magic + Σ, s, −magic · s) is s · Σ
// rounded once. While the sums of a row tile are scaled, the products of the next one are under way and what
// the one behind it needs is loaded.
template <class L>
__device__ __forceinline__ void multiply_group(float (&sums)[L::kRowTiles][L::kTokenTiles][4], uint32_t group,
                                               uint32_t codes, const ManyOffsets& at) {
  const uint32_t fragments = group + at.fragments, table = group + at.table;
  static_assert(L::kTokenTiles == 4);
  uint4 a[2], t[2], c[2];  // fragments and table entries of two row tiles, scales of four token tiles
  uint32_t b[2][4], d[2][L::kTokenTiles][4];
  load_matrices(b[0], codes);
  a[0] = load_shared(fragments);
  load_matrices(b[1], codes + 16 * 128);
  a[1] = load_shared(fragments + 512);
  t[0] = load_shared(table);
  c[0] = load_shared(group + at.scales), c[1] = load_shared(group + at.scales + 64);
  const auto multiply = [&](int i) {
    const uint32_t w[4] = {a[i % 2].x, a[i % 2].y, a[i % 2].z, a[i % 2].w};
#pragma unroll
    for (int j = 0; j < L::kTokenTiles; ++j)
      multiply_32(d[i % 2][j], w, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  };
  multiply(0);
#pragma unroll
  for (int i = 0; i < L::kRowTiles; ++i) {
    if (i + 1 < L::kRowTiles) {
      t[(i + 1) % 2] = load_shared(table + (i + 1) * 128);
      multiply(i + 1);
    }
    if (i + 2 < L::kRowTiles) a[i % 2] = load_shared(fragments + (i + 2) * 512);
    const uint4 q = t[i % 2];
    const float s[2] = {__uint_as_float(q.x), __uint_as_float(q.z)};
    const float minus[2] = {__uint_as_float(q.y), __uint_as_float(q.w)};
#pragma unroll
    for (int j = 0; j < L::kTokenTiles; ++j) {
      const uint4 x = c[j / 2];
      const float scale[2] = {__uint_as_float(j % 2 ? x.z : x.x), __uint_as_float(j % 2 ? x.w : x.y)};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& y = sums[i][j][e];
        y = fmaf(fmaf(__uint_as_float(d[i % 2][j][e]), s[e / 2], minus[e / 2]), scale[e % 2], y);
      }
    }
  }
}

// sums += o_w · sum_a over the four groups of a slab, by one product of bfloat16 for each tile: group c takes
// columns 2c, 2c + 1, 2c + 8, 2c + 9, where (o, o', o, o') meet (s, s, s', s'): o_w = o + o', sum_a = s + s'.
template <class L>
__device__ __forceinline__ void add_offsets(float (&sums)[L::kRowTiles][L::kTokenTiles][4],
                                            const uint8_t* place, const ManyOffsets& at) {
  static_assert(L::kGroups == 4);
  uint32_t o[L::kRowTiles][4];
#pragma unroll
  for (int i = 0; i < L::kRowTiles; ++i) {
    const uint2 both = *reinterpret_cast<const uint2*>(place + at.offsets + i * 64);
    o[i][0] = o[i][2] = both.x, o[i][1] = o[i][3] = both.y;
  }
#pragma unroll
  for (int j = 0; j < L::kTokenTiles; ++j) {
    const uint32_t s = split_in_two(*reinterpret_cast<const float*>(place + at.sums + j * 32));
    const uint32_t first = __byte_perm(s, s, 0x1010), second = __byte_perm(s, s, 0x3232);
#pragma unroll
    for (int i = 0; i < L::kRowTiles; ++i) mma_16x8x16(sums[i][j], o[i], first, second, BFloat16{});
  }
}

// A warp's sums to y as they are, eight tokens and 32 rows at a time by way of shared memory [token][row].
template <class L>
__device__ __forceinline__ void store_floats(const float (&sums)[L::kRowTiles][L::kTokenTiles][4], float* y,
                                             int64_t n, float* turn, int rows, int tokens) {
  const unsigned lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int row = lane % 8 * 4, token = lane / 8;
#pragma unroll
  for (int j = 0; j < L::kTokenTiles; ++j)
#pragma unroll
    for (int first = 0; first < L::kRowTiles; first += 2) {
      __syncwarp();
#pragma unroll
      for (int e = 0; e < 8; ++e)
        turn[(2 * c + e % 2) * L::kOutStride + e / 4 * 16 + e / 2 % 2 * 8 + r] =
            sums[first + e / 4][j][e % 4];
      __syncwarp();
#pragma unroll 1
      for (int t = token; t < 8; t += 4) {
        const float4 q = *reinterpret_cast<const float4*>(turn + t * L::kOutStride + row);
        const float v[4] = {q.x, q.y, q.z, q.w};
        const int count = rows - row - 16 * first;
        if (8 * j + t >= tokens) continue;
        float* const to = y + (8 * j + t) * n + row + 16 * first;
        if (n % 4 == 0) {
          if (count > 0) store_vector(to, v);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (i < count) to[i] = v[i];
        }
      }
    }
}

// A warp's sums to y.
template <class L>
__device__ __forceinline__ void store_many(float (&sums)[L::kRowTiles][L::kTokenTiles][4],
                                           const MmaProblem& p, int64_t at, uint8_t* turn, int rows,
                                           int tokens) {
#pragma unroll
  for (int i = 0; i < L::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < L::kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] *= kScaledUp;
  switch (p.type) {
    case Real::kFloat32:
      store_floats<L>(sums, static_cast<float*>(p.y) + at, p.n, reinterpret_cast<float*>(turn), rows, tokens);
      break;
    case Real::kFloat16: store_sums<L>(sums, static_cast<Half*>(p.y) + at, p.n, turn, rows, tokens); break;
    case Real::kBFloat16:
      store_sums<L>(sums, static_cast<BFloat16*>(p.y) + at, p.n, turn, rows, tokens);
      break;
  }
}

// The multiplier warps' part.
template <BlockFormat F>
__device__ __forceinline__ void multiply_many(const MmaProblem& p, uint8_t* smem) {
  using L = ManyTokens<F>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / L::kWarpsM * L::kRowTiles * 16, token = warp % L::kWarpsM * L::kTokenTiles * 8;
  const auto offsets = ManyOffsets::of<L>(warp, lane);
  RingPlace<L> ring{shared_address(smem)};
  for (TileWalk<L> at(p); at.next(p);) {
    const int slabs = (at.num_k + L::kSlab - 1) / L::kSlab;
    float sums[L::kRowTiles][L::kTokenTiles][4] = {};  // times 2^-24
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab, ring.step()) {
      mbarrier_wait(ring.full(), ring.turn);
#pragma unroll 1
      for (int at_group = 0, piece = 0; piece < L::kSlab; at_group += L::kGroupBytes, piece += 32)
        multiply_group<L>(sums, ring.address() + at_group, ring.address() + (offsets.codes ^ piece), offsets);
      if constexpr (F::kOffset) add_offsets<L>(sums, smem + ring.at, offsets);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
    }
    if (at.is_part(p) &&
        !combine_parts<L::kMultipliers>(sums, p, at, threadIdx.x, [] { sync_some<1, L::kMultipliers>(); }))
      continue;
    store_many<L>(sums, p, (at.token0 + token) * p.n + at.row0 + row, smem + L::kOutAt + warp * L::kOutBytes,
                  at.last_row + 1 - row, at.num_tokens - token);
  }
}

template <BlockFormat F>
__global__ void __launch_bounds__(ManyTokens<F>::kThreads, 1)
    gemm_mma_q8_many_kernel(const MmaProblem p, const __grid_constant__ CUtensorMap codes) {
  using L = ManyTokens<F>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const smem = dynamic + (-shared_address(dynamic) & (L::kAlign - 1));
  if (threadIdx.x < L::kPlaces) {
    const uint32_t full = shared_address(smem) + L::kBarriersAt + 16 * threadIdx.x;
    mbarrier_init(full, L::kDecoders + L::kDecoderWarps + 1);  // scales by threads, fragments by warps, codes
    mbarrier_init(full + 8, L::kMultiplierWarps);
  }
  publish_barriers();
  __syncthreads();
  if (threadIdx.x < L::kMultipliers) {
    grow_registers<L::kMultiplierRegisters>();
    multiply_many<F>(p, smem);
  } else {
    shrink_registers<L::kDecoderRegisters>();
    decode_many<F>(p, codes, smem);
  }
}

}  // namespace quantgemm::mma_q8

// SPDX-License-Identifier: MIT
// The int8 tensor-core product for a thousand tokens and more: that of gemm_5_mma_q8_many.cuh, but weights
// come as fragments (gemm_5_mma_q8_most_fragments.cuh), so that four warps only copy and the others have
// registers to be a group ahead: what the next group needs is loaded, and its first products are under way,
// while the sums of this one are scaled.
// Limit: a product holds up dispatch for 6 clocks, in which no FFMA starts, and has 8 FFMA.
#pragma once
#include "dependent_launch.cuh"
#include "gemm_5_mma_q8_many.cuh"

namespace quantgemm::mma_q8 {

// Offset: whether weights have one. As ManyTokens, but for what is said here.
template <bool Offset>
struct MostTokens {
  static constexpr bool kOffset = Offset;
  static constexpr int kRowTiles = 4, kTokenTiles = 4, kWarpsN = 2, kWarpsM = 6;
  static constexpr int kRows = kWarpsN * kRowTiles * 16, kTokens = kWarpsM * kTokenTiles * 8;
  static constexpr int kElems = kRows * kTokens;
  static constexpr int kMultiplierWarps = kWarpsN * kWarpsM, kMultipliers = 32 * kMultiplierWarps;
  static constexpr int kDecoders = 128, kThreads = kMultipliers + kDecoders;  // which only copy
  static constexpr int kMultiplierRegisters = 160, kDecoderRegisters = 32;
  static constexpr int kSlab = 128, kGroups = kSlab / 32;
  // Of a group in a place of the ring, what is of w comes as it is in memory, [row of tiles][slab][group].
  static constexpr int kTableAt = kRows * 32, kOffsetsAt = kTableAt + kRows * 8;
  static constexpr int kWeightBytes = kOffsetsAt + (kOffset ? kRows * 4 : 0);
  static constexpr int kScalesAt = kWeightBytes, kSumsAt = kScalesAt + kTokens * 4;
  static constexpr int kGroupBytes = kSumsAt + (kOffset ? kTokens * 4 : 0) + 32;
  static_assert(kGroupBytes % 128 == 32);  // lanes of four groups meet in no bank
  static constexpr int kGroupsAt = kTokens * kSlab, kAlign = 1024, kPlaces = 4;
  static constexpr int kPlaceBytes = (kGroupsAt + kGroups * kGroupBytes + kAlign - 1) / kAlign * kAlign;
  static constexpr int kWeightsAt = kPlaces * kPlaceBytes;  // the end of the ring
  static constexpr int kOutStride = 36, kOutBytes = 8 * kOutStride * 4;
  static constexpr int kOutAt = kWeightsAt, kBarriersAt = kOutAt + kMultiplierWarps * kOutBytes;
  static constexpr int kMagicAt = kBarriersAt + 2 * kPlaces * 8;  // what sums start from, four times
  static constexpr int kBytes = kAlign + kMagicAt + 16;
  static constexpr int kChunk = kSlab, kChunkBytes = 0;  // for TileWalk
  static constexpr bool kUneven = true;

  static int64_t weight_bytes(int64_t n, int64_t k) {
    return (n + kRows - 1) / kRows * ((k + kSlab - 1) / kSlab) * kGroups * kWeightBytes;
  }
};

// What a multiplier lane has of a group: codes of x, fragments and table entries of two row tiles, scales of
// four token tiles, and the products of two row tiles.
template <class L>
struct GroupOperands {
  uint32_t b[2][4];
  uint4 a[2], t[2], c[2];
  uint32_t d[2][L::kTokenTiles][4];
  uint4 magic;

  __device__ __forceinline__ void load_codes(uint32_t codes) {
    load_matrices(b[0], codes), load_matrices(b[1], codes + 16 * 128);
  }
  __device__ __forceinline__ void multiply(int i) {
    const uint32_t w[4] = {a[i].x, a[i].y, a[i].z, a[i].w};
#pragma unroll
    for (int j = 0; j < L::kTokenTiles; ++j)
      multiply_32(d[i][j], w, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], magic);
  }
  // s · Σ without converting: fma(magic + Σ, s, −magic · s) is s · Σ rounded once.
  __device__ __forceinline__ void scale(float (&sums)[L::kTokenTiles][4], int i, int half) const {
    const float s[2] = {__uint_as_float(t[i].x), __uint_as_float(t[i].z)};
    const float minus[2] = {__uint_as_float(t[i].y), __uint_as_float(t[i].w)};
    const uint4 x = c[half];
    const float scales[2][2] = {{__uint_as_float(x.x), __uint_as_float(x.y)},
                                {__uint_as_float(x.z), __uint_as_float(x.w)}};
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& y = sums[2 * half + j][e];
        y = fmaf(fmaf(__uint_as_float(d[i][2 * half + j][e]), s[e / 2], minus[e / 2]), scales[j][e % 2], y);
      }
  }
};

// What multiply_ahead() takes over from the group before.
template <class L>
__device__ __forceinline__ void begin_group(GroupOperands<L>& now, uint32_t group, uint32_t codes,
                                            const ManyOffsets& at) {
  now.load_codes(codes);
  now.a[0] = load_shared(group + at.fragments), now.a[1] = load_shared(group + at.fragments + 512);
  now.t[0] = load_shared(group + at.table);
  now.c[0] = load_shared(group + at.scales), now.c[1] = load_shared(group + at.scales + 64);
  now.multiply(0);
}

// sums += s_w · s_a · w · x over one group. While the sums of a row tile are scaled, the products of the next
// one are under way and what the one behind it needs is loaded; behind the last one comes the next group.
template <class L>
__device__ __forceinline__ void multiply_ahead(float (&sums)[L::kRowTiles][L::kTokenTiles][4],
                                               GroupOperands<L>& now, uint32_t group, uint32_t next,
                                               uint32_t next_codes, const ManyOffsets& at) {
  static_assert(L::kTokenTiles == 4 && L::kRowTiles == 4);
  const uint32_t fragments = group + at.fragments, table = group + at.table;
  now.t[1] = load_shared(table + 128);
  now.multiply(1);
  now.a[0] = load_shared(fragments + 2 * 512);
  now.scale(sums[0], 0, 0), now.scale(sums[0], 0, 1);
  now.t[0] = load_shared(table + 2 * 128);
  now.multiply(0);
  now.a[1] = load_shared(fragments + 3 * 512);
  now.scale(sums[1], 1, 0), now.scale(sums[1], 1, 1);
  now.t[1] = load_shared(table + 3 * 128);
  now.multiply(1);
  now.load_codes(next_codes);
  now.a[0] = load_shared(next + at.fragments);
  now.scale(sums[2], 0, 0), now.scale(sums[2], 0, 1);
  now.t[0] = load_shared(next + at.table);
  now.multiply(0);
  now.a[1] = load_shared(next + at.fragments + 512);
  now.scale(sums[3], 1, 0);
  now.c[0] = load_shared(next + at.scales);
  now.scale(sums[3], 1, 1);
  now.c[1] = load_shared(next + at.scales + 64);
}

// All slabs of a tile, of which a warp is a group ahead.
template <class L>
__device__ __forceinline__ void multiply_slabs(float (&sums)[L::kRowTiles][L::kTokenTiles][4],
                                               RingPlace<L>& ring, const uint8_t* smem, int slabs,
                                               const uint4& magic, const ManyOffsets& offsets) {
  const int lane = threadIdx.x % 32;
  GroupOperands<L> operands;
  operands.magic = magic;
  mbarrier_wait(ring.full(), ring.turn);
  uint32_t group = ring.address(), place = group, next = group + L::kGroupBytes, empty = 0;
  begin_group<L>(operands, group, group + offsets.codes, offsets);
#pragma unroll 1
  for (int slab = 1, piece = 32;; ++slab) {
#pragma unroll 1
    for (; piece < L::kSlab; piece += 32) {  // from the last group of a slab to the third of the next one
      multiply_ahead<L>(sums, operands, group, next, place + (offsets.codes ^ piece), offsets);
      group = next, next += L::kGroupBytes;
      __syncwarp();
      if (lane == 0 && piece == 0) mbarrier_arrive(empty);
    }
    if constexpr (L::kOffset) add_offsets<L>(sums, smem + ring.at, offsets);
    empty = ring.empty();
    ring.step();
    if (slab == slabs) break;
    mbarrier_wait(ring.full(), ring.turn);
    place = next = ring.address(), piece = 0;
  }
  group = place + (L::kGroups - 1) * L::kGroupBytes;
  multiply_ahead<L>(sums, operands, group, group, place + offsets.codes, offsets);
  __syncwarp();
  if (lane == 0) mbarrier_arrive(empty);
}

// The multiplier warps' part.
template <class L>
__device__ __forceinline__ void multiply_most(const MmaProblem& p, uint8_t* smem) {
  const int thread = threadIdx.x - L::kDecoders, lane = thread % 32, warp = thread / 32;
  const int row = warp / L::kWarpsM * L::kRowTiles * 16, token = warp % L::kWarpsM * L::kTokenTiles * 8;
  const auto offsets = ManyOffsets::of<L>(warp, lane);
  RingPlace<L> ring{shared_address(smem)};
  const uint4 magic = load_shared(ring.smem + L::kMagicAt);
  for (TileWalk<L> at(p); at.next(p);) {
    const int slabs = (at.num_k + L::kSlab - 1) / L::kSlab;
    float sums[L::kRowTiles][L::kTokenTiles][4] = {};  // times 2^-24
    if (__shfl_sync(~0u, token, 0) < at.num_tokens) {  // the same in all lanes, and the compiler knows
      multiply_slabs<L>(sums, ring, smem, slabs, magic, offsets);
    } else {  // leaves the tensor cores to the others
#pragma unroll 1
      for (int slab = 0; slab < slabs; ++slab, ring.step()) {
        mbarrier_wait(ring.full(), ring.turn);
        if (lane == 0) mbarrier_arrive(ring.empty());
      }
    }
    if (at.is_part(p) &&
        !combine_parts<L::kMultipliers>(sums, p, at, thread, [] { sync_some<1, L::kMultipliers>(); }))
      continue;
    store_many<L>(sums, p, (at.token0 + token) * p.n + at.row0 + row, smem + L::kOutAt + warp * L::kOutBytes,
                  at.last_row + 1 - row, at.num_tokens - token);
  }
}

// The loader warps' part.
template <class L>
__device__ __forceinline__ void load_most(const MmaProblem& p, const CUtensorMap& codes, uint8_t* smem) {
  const int thread = threadIdx.x;
  RingPlace<L> ring{shared_address(smem)};
  const int64_t token_bytes = ActivationRow::bytes(p.k), all_slabs = p.schedule.chunks;
  wait_for_previous_kernel();

  for (TileWalk<L> at(p); at.next(p);) {
    const int slabs = (at.num_k + L::kSlab - 1) / L::kSlab;
    const ScaleStager<L, L::kOffset> stage_scales(p.x + at.token0 * token_bytes, p.k, at.k0, at.num_tokens,
                                                  thread);
    bytes_ptr weights =
        p.w + (at.row0 / L::kRows * all_slabs + at.k0 / L::kSlab) * (L::kGroups * L::kWeightBytes);
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab, ring.step(), weights += L::kGroups * L::kWeightBytes) {
      mbarrier_wait(ring.empty(), ring.turn ^ 1);
      if (thread == 0) {
        mbarrier_arrive_expecting(ring.full(), L::kGroupsAt + L::kGroups * L::kWeightBytes);
        copy_tile(ring.address(), codes, static_cast<int>(at.k0) + slab * L::kSlab,
                  static_cast<int>(at.token0), ring.full());
#pragma unroll
        for (int g = 0; g < L::kGroups; ++g)
          copy_bulk(ring.address() + L::kGroupsAt + g * L::kGroupBytes, weights + g * L::kWeightBytes,
                    L::kWeightBytes, ring.full());
      }
      stage_scales(ring.address(), slab * L::kSlab, at.num_k - slab * L::kSlab);
      mbarrier_arrive_after_copies(ring.full());
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

// x: rounded activations, w: fragments
template <bool Offset>
__global__ void __launch_bounds__(MostTokens<Offset>::kThreads, 1)
    gemm_mma_q8_most_kernel(const MmaProblem p, const __grid_constant__ CUtensorMap codes) {
  using L = MostTokens<Offset>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const smem = dynamic + (-shared_address(dynamic) & (L::kAlign - 1));
  if (threadIdx.x < L::kPlaces) {
    const uint32_t full = shared_address(smem) + L::kBarriersAt + 16 * threadIdx.x;
    mbarrier_init(full, L::kDecoders + 1);  // scales of x by threads, the rest by the copy engine
    mbarrier_init(full + 8, L::kMultiplierWarps);
  }
  if (threadIdx.x == 0)
    *reinterpret_cast<uint4*>(smem + L::kMagicAt) =
        make_uint4(kMagicBits, kMagicBits, kMagicBits, kMagicBits);
  publish_barriers();
  __syncthreads();
  if (threadIdx.x < L::kDecoders) {
    shrink_registers<L::kDecoderRegisters>();
    load_most<L>(p, codes, smem);
  } else {
    grow_registers<L::kMultiplierRegisters>();
    multiply_most<L>(p, smem);
  }
}

}  // namespace quantgemm::mma_q8

// SPDX-License-Identifier: MIT
// The int8 tensor-core product for more than 128 tokens, in the shape of gemm_4_mma_many.cuh: four warps
// copy activations and turn blocks of weights to A fragments and a table of scales, a few slabs of k
// ahead; the others only multiply and scale. y += s_a · (s_w · Σ q_w q_a) + o_w · sum_a per group of 32.
// Limit: issue slots and latency. A product, which takes 7.5 clocks, has 8 FFMA.
#pragma once
#include "../formats/activation.h"
#include "gemm_4_mma_many.cuh"
#include "mma_q8.cuh"
#include "tensor_copy.cuh"

namespace quantgemm::mma_q8 {

template <class F>
struct ManyTokens {
  static constexpr int kRowTiles = 4, kTokenTiles = 4;  // of a multiplier warp: 64 × 32
  static constexpr int kWarpsN = 2, kWarpsM = 6;
  static constexpr int kRows = kWarpsN * kRowTiles * 16, kTokens = kWarpsM * kTokenTiles * 8;
  static constexpr int kElems = kRows * kTokens;
  static constexpr int kMultiplierWarps = kWarpsN * kWarpsM, kMultipliers = 32 * kMultiplierWarps;
  static constexpr int kDecoderWarps = 4, kDecoders = 32 * kDecoderWarps, kThreads = kMultipliers + kDecoders;
  static constexpr int kWarpRows =
      kRows / kDecoderWarps;  // of a decoder warp, a lane's row each in the table
  static_assert(kWarpRows == 32);
  static constexpr int kMultiplierRegisters = 136, kDecoderRegisters = 104;
  // Weights come in chunks, which hold whole blocks.
  static constexpr int kSlab = 128, kGroups = kSlab / 32, kChunk = F::kElems > 128 ? F::kElems : 128;
  static constexpr int kChunkSlabs = kChunk / kSlab, kChunkBytes = kChunk / F::kElems * F::kBytes;
  static constexpr int kPieces = (kChunkBytes + 15 + 16 - kAlignOf<F::kBytes>) / 16;
  static constexpr int kPitch = 16 * (kPieces | 1);        // odd: 8 rows begin in different banks
  static constexpr int kWeightBytes = kWarpRows * kPitch;  // of one chunk and warp
  // A place in the ring: codes of x, [token][128] with 16-byte pieces swapped within a token, then per group
  //   fragments     [row tile][lane] of 16 bytes
  //   scales of w   [row tile][r] s_w, −magic · s_w of row r, then of row r + 8
  //   offsets of w  [row tile][r] of row r, then of row r + 8, as two bfloat16 each
  //   scales of x   [token] s_a in the order in which a lane reads them
  //   sums of x     [token], if there are offsets
  static constexpr int kTableAt = kRows * 32, kOffsetsAt = kTableAt + kRows * 8;
  static constexpr int kScalesAt = kOffsetsAt + (F::kOffset ? kRows * 4 : 0),
                       kSumsAt = kScalesAt + kTokens * 4;
  static constexpr int kGroupBytes = kSumsAt + (F::kOffset ? kTokens * 4 : 0) + 32;
  static_assert(kGroupBytes % 128 == 32);  // lanes of four groups meet in no bank
  static constexpr int kGroupsAt = kTokens * kSlab, kAlign = 1024;
  static constexpr int kPlaceBytes = (kGroupsAt + kGroups * kGroupBytes + kAlign - 1) / kAlign * kAlign;
  static_assert(kTokens % 64 == 0);
  // The rest: weights as they are in the file, results on their way to y, barriers.
  static constexpr int kOutStride = 36, kOutBytes = 8 * kOutStride * 4;  // of a warp, floats
  static constexpr int kRestBytes =
      kAlign + 2 * kDecoderWarps * kWeightBytes + kMultiplierWarps * kOutBytes + 2 * 3 * 8;
  static constexpr int kPlaces = 232448 - kRestBytes >= 3 * kPlaceBytes ? 3 : 2;
  static constexpr int kWeightsAt = kPlaces * kPlaceBytes;
  static constexpr int kOutAt = kWeightsAt + 2 * kDecoderWarps * kWeightBytes;
  static constexpr int kBarriersAt = kOutAt + kMultiplierWarps * kOutBytes;
  static constexpr int kBytes = kPlaces * kPlaceBytes + kRestBytes;
};

// Codes of kCodeBits bits around a zero in their middle are moved to the top of their bytes, where one bit
// makes them signed: 2^shift times what quad() returns, for less.
template <class F>
inline constexpr int kCodeShift = [] {
  if constexpr (StoresZero<F> && requires { F::kCodeBits; })
    if constexpr (2 * F::kZero == 1 << F::kCodeBits) return 8 - F::kCodeBits;
  return 0;
}();
template <BlockFormat F>
__device__ __forceinline__ uint32_t shifted_quad(bytes_ptr block, int i, uint32_t signs) {
  if constexpr (kCodeShift<F> > 0) return F::codes(block, i) << kCodeShift<F> ^ signs;
  return F::quad(block, i);
}

// As in gemm_5_mma_q8.cuh: scales are kept times 2^-24 and with two bits of mantissa cleared.
constexpr float kScaledDown = 0x1p-24f, kScaledUp = 0x1p24f;

// A decoder thread's part in copying scales of activations. Instead of tokens behind m the last one's are
// copied; groups behind k get zeros.
template <class L, bool Sums>
struct ScaleStager {
  static constexpr int kStep = L::kDecoders / L::kGroups, kCopies = L::kTokens / kStep;

  bytes_ptr scales;           // of the thread's group
  uint32_t offsets[kCopies];  // to each of its tokens
  uint32_t place, sum_place;  // in shared memory
  int group;

  __device__ __forceinline__ ScaleStager(bytes_ptr tokens, int64_t k, int64_t k0, int num_tokens, int thread)
      : scales(tokens + ActivationRow::scales_offset(k) + k0 / 4 + 8 * (thread % L::kGroups)),
        group(thread % L::kGroups) {
    const auto row_bytes = static_cast<uint32_t>(ActivationRow::bytes(k));
    const int token = thread / L::kGroups;
    // Token 8h + 2c + e of 16 to place 4c + 2h + e: what a lane reads for two token tiles are neighbours.
    const int at = (token & ~15) + 4 * (token / 2 % 4) + 2 * (token / 8 % 2) + token % 2;
    place = L::kGroupsAt + group * L::kGroupBytes + L::kScalesAt + 4 * at;
    sum_place = L::kGroupsAt + group * L::kGroupBytes + L::kSumsAt + 4 * token;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) offsets[i] = row_bytes * min(token + i * kStep, num_tokens - 1);
  }
  // From value k0 of the tile on, of which num_values are left.
  __device__ __forceinline__ void operator()(uint32_t target, int k0, int num_values) const {
    const bool inside = 32 * group < num_values;
    bytes_ptr source = scales + (inside ? k0 / 4 : 0) - (inside ? 0 : 8 * group);
    keep_in_register(source);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      copy_async<4>(target + place + i * kStep * 4, source + offsets[i], true, inside ? 4 : 0);
      if constexpr (Sums)
        copy_async<4>(target + sum_place + i * kStep * 4, source + offsets[i] + 4, true, inside ? 4 : 0);
    }
  }
};

// x as the sum of two bfloat16, up to 2^-18 of it; the first is in the low half.
__device__ __forceinline__ uint32_t split_in_two(float x) {
  const uint32_t first = pack_pair(x, x, BFloat16{});
  return __byte_perm(first, pack_pair(x - __uint_as_float(first << 16), 0.0f, BFloat16{}), 0x5410);
}

// The scales of a row of the tile in a slab, to its entries of the table.
template <BlockFormat F>
__device__ __forceinline__ void fill_table(uint8_t* groups, bytes_ptr bytes, int within, int num_groups,
                                           unsigned row) {
  using L = ManyTokens<F>;
  Affine affine[L::kGroups];  // all loads first: they cannot pass the stores
#pragma unroll
  for (int g = 0; g < L::kGroups; ++g) {
    const int e = within + 32 * g;
    affine[g] = F::affine(bytes + e / F::kElems * F::kBytes, e % F::kElems / F::kGroup);
  }
  const unsigned place = 16 * (row / 16 * 8 + row % 8), half = row / 8 % 2;  // r and r + 8 are neighbours
#pragma unroll
  for (int g = 0; g < L::kGroups; ++g) {
    const bool valid = g < num_groups;
    const float cut = __uint_as_float(__float_as_uint(affine[g].scale) & ~3u);
    const float scale = valid ? cut * (kScaledDown / (1 << kCodeShift<F>)) : 0.0f;
    *reinterpret_cast<float2*>(groups + g * L::kGroupBytes + L::kTableAt + place + 8 * half) =
        make_float2(scale, -kMagic * scale);
    if constexpr (F::kOffset)
      *reinterpret_cast<uint32_t*>(groups + g * L::kGroupBytes + L::kOffsetsAt + place / 2 + 4 * half) =
          valid ? split_in_two(affine[g].offset * kScaledDown) : 0u;
  }
}

// The decoder warps' part.
template <BlockFormat F>
__device__ __forceinline__ void decode_many(const MmaProblem& p, const CUtensorMap& codes, uint8_t* smem) {
  using L = ManyTokens<F>;
  constexpr int kTiles = L::kWarpRows / 16;
  // Unsigned: knowing the ranges of r and c, the compiler makes fewer instructions of their quads.
  const unsigned thread = threadIdx.x - L::kMultipliers, lane = threadIdx.x % 32, warp = thread / 32;
  const unsigned r = lane / 4, c = lane % 4;
  // The compiler must not know: an instruction has room for one constant, and the mask of the codes is one.
  const uint32_t signs = 0x80808080u | static_cast<uint32_t>(p.k >> 62);
  RingPlace<L> ring{shared_address(smem)};
  const int weights_at = L::kWeightsAt + 2 * warp * L::kWeightBytes;
  const int64_t token_bytes = ActivationRow::bytes(p.k);

  for (TileWalk<L> at(p); at.next(p);) {
    const int slabs = (at.num_k + L::kSlab - 1) / L::kSlab;
    const bytes_ptr rows = at.weights(p) + warp * L::kWarpRows * p.row_bytes;
    const RowStager<L::kWarpRows, L::kPieces, L::kPitch, 32> stage_rows(
        rows, p.w + p.n * p.row_bytes, p.row_bytes,
        min(at.last_row - static_cast<int>(warp) * L::kWarpRows, L::kWarpRows - 1), lane);
    const ScaleStager<L, F::kOffset> stage_scales(p.x + at.token0 * token_bytes, p.k, at.k0, at.num_tokens,
                                                  thread);
    const auto stage_chunk = [&](int chunk) {
      stage_rows(ring.smem + weights_at + chunk % 2 * L::kWeightBytes, chunk * int64_t{L::kChunkBytes}, lane);
    };
    const auto first_byte = [&](unsigned row) {  // modulo 16
      return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(rows)) +
             row * static_cast<uint32_t>(p.row_bytes);
    };
    uint32_t skew[2];  // of rows r and r + 8; 16 rows further it is the same
#pragma unroll
    for (int half = 0; half < 2; ++half) skew[half] = first_byte(8 * half + r);
    const uint32_t lane_skew = first_byte(lane);
    stage_chunk(0);
    cp_async_commit();
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab, ring.step()) {
      const int left = at.num_k - slab * L::kSlab;
      mbarrier_wait(ring.empty(), ring.turn ^ 1);
      if (thread == 0)
        copy_tile(ring.address(), codes, static_cast<int>(at.k0) + slab * L::kSlab,
                  static_cast<int>(at.token0), ring.full(), L::kGroupsAt);
      stage_scales(ring.address(), slab * L::kSlab, left);
      mbarrier_arrive_after_copies(ring.full());
      const int chunk = slab / L::kChunkSlabs, within = slab % L::kChunkSlabs * L::kSlab;
      if (within == 0) {
        if (slab + L::kChunkSlabs < slabs) stage_chunk(chunk + 1);
        cp_async_commit();
        cp_async_wait<1>();  // this chunk's group is the one before
        __syncwarp();        // … in every lane
      }
      const bytes_ptr from = smem + weights_at + chunk % 2 * L::kWeightBytes;
      const uint32_t skipped = chunk * L::kChunkBytes;
      uint8_t* const groups = smem + ring.at + L::kGroupsAt;
      fill_table<F>(groups, from + lane * L::kPitch + ((lane_skew + skipped) & 15), within, left / 32,
                    warp * L::kWarpRows + lane);
      const bytes_ptr pair[2] = {from + r * L::kPitch + ((skew[0] + skipped) & 15),
                                 from + (8 + r) * L::kPitch + ((skew[1] + skipped) & 15)};
      uint8_t* const fragments = groups + warp * kTiles * 512 + 16 * lane;
#pragma unroll
      for (int first = 0; first < L::kGroups; first += 2) {
        uint4 decoded[2][kTiles];  // loads first here too
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const int e = within + 32 * (first + g), block = e / F::kElems * F::kBytes;
          const int quad = e % F::kElems / 4 + static_cast<int>(c);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const bytes_ptr low = pair[0] + 16 * i * L::kPitch + block;
            const bytes_ptr high = pair[1] + 16 * i * L::kPitch + block;
            decoded[g][i] =
                make_uint4(shifted_quad<F>(low, quad, signs), shifted_quad<F>(high, quad, signs),
                           shifted_quad<F>(low, quad + 4, signs), shifted_quad<F>(high, quad + 4, signs));
          }
        }
#pragma unroll
        for (int g = 0; g < 2; ++g)
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
            *reinterpret_cast<uint4*>(fragments + (first + g) * L::kGroupBytes + i * 512) = decoded[g][i];
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.full());
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

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
// rounded once. The compiler keeps one or two products under way while those before them are scaled.
template <class L>
__device__ __forceinline__ void multiply_group(float (&sums)[L::kRowTiles][L::kTokenTiles][4],
                                               const uint8_t* group, uint32_t codes, const ManyOffsets& at) {
  const uint8_t* const fragments = group + at.fragments;
  const uint8_t* const table = group + at.table;
  uint32_t a[L::kRowTiles][4];
  float s[L::kRowTiles][2], minus[L::kRowTiles][2];
#pragma unroll
  for (int i = 0; i < L::kRowTiles; ++i) {
    const uint4 w = *reinterpret_cast<const uint4*>(fragments + i * 512);
    a[i][0] = w.x, a[i][1] = w.y, a[i][2] = w.z, a[i][3] = w.w;
    const float4 q = *reinterpret_cast<const float4*>(table + i * 128);
    s[i][0] = q.x, minus[i][0] = q.y, s[i][1] = q.z, minus[i][1] = q.w;
  }
#pragma unroll
  for (int pair = 0; pair < L::kTokenTiles / 2; ++pair) {
    uint32_t b[4];
    load_matrices(b, codes + pair * 16 * 128);
    const float4 q = *reinterpret_cast<const float4*>(group + at.scales + pair * 64);
    const float scale[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < L::kRowTiles; ++i) {
        uint32_t d[4];
        multiply_32(d, a[i], b[2 * h], b[2 * h + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& y = sums[i][2 * pair + h][e];
          const float v = fmaf(__uint_as_float(d[e]), s[i][e / 2], minus[i][e / 2]);
          y = fmaf(v, scale[2 * h + e % 2], y);
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
        multiply_group<L>(sums, smem + ring.at + at_group, ring.address() + (offsets.codes ^ piece), offsets);
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

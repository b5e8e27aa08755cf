// SPDX-License-Identifier: MIT
// What the multipliers of gemm_5_mma_q8_many.cuh find in shared memory, and how four warps get it there:
// codes of x by the copy engine, their scales by cp.async, blocks of w as A fragments and a table of scales.
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
      if (thread == 0) {
        mbarrier_arrive_expecting(ring.full(), L::kGroupsAt);
        copy_tile(ring.address(), codes, static_cast<int>(at.k0) + slab * L::kSlab,
                  static_cast<int>(at.token0), ring.full());
      }
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

}  // namespace quantgemm::mma_q8

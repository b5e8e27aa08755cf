// SPDX-License-Identifier: MIT
// Blocks of weights to what the multipliers of gemm_5_mma_q8_most.cuh read: int8 A fragments and a table of
// scales, of 128 rows and 128 of k in one piece. A launch of its own, beside the one that rounds the
// activations: within the product, every token tile would decode the same weights again.
// Limit: DRAM.
#pragma once
#include "gemm_5_mma_q8_most.cuh"

namespace quantgemm::mma_q8 {

struct FragmentArgs {
  bytes_ptr w;
  uint8_t* to;
  int64_t n, k, row_bytes;
  uint32_t* arrivals;  // of the product, to be cleared
  uint32_t num_arrivals;
};

// A warp's weights in shared memory: a chunk of whole blocks of 32 rows.
template <class F>
struct FragmentChunk {
  static constexpr int kWarps = 4, kWarpRows = 32;
  static constexpr int kElems = F::kElems > 256 ? F::kElems : 256, kBytes = kElems / F::kElems * F::kBytes;
  static constexpr int kPieces = (kBytes + 15 + 16 - kAlignOf<F::kBytes>) / 16;
  static constexpr int kPitch = 16 * (kPieces | 1);  // odd: 8 rows begin in different banks
};

// The scales of a row of the tile in a slab, to its entries of the table.
template <BlockFormat F>
__device__ __forceinline__ void store_scales(uint8_t* groups, bytes_ptr bytes, int within, int num_groups,
                                             unsigned row) {
  using L = MostTokens<F::kOffset>;
  const unsigned place = 16 * (row / 16 * 8 + row % 8), half = row / 8 % 2;  // r and r + 8 are neighbours
#pragma unroll
  for (int g = 0; g < L::kGroups; ++g, groups += L::kWeightBytes) {
    const int e = within + 32 * g;
    const Affine affine = F::affine(bytes + e / F::kElems * F::kBytes, e % F::kElems / F::kGroup);
    const bool valid = g < num_groups;
    const float cut = __uint_as_float(__float_as_uint(affine.scale) & ~3u);
    const float scale = valid ? cut * (kScaledDown / (1 << kCodeShift<F>)) : 0.0f;
    *reinterpret_cast<float2*>(groups + L::kTableAt + place + 8 * half) = make_float2(scale, -kMagic * scale);
    if constexpr (F::kOffset)
      *reinterpret_cast<uint32_t*>(groups + L::kOffsetsAt + place / 2 + 4 * half) =
          valid ? split_in_two(affine.offset * kScaledDown) : 0u;
  }
}

// grid (chunks of k, rows of tiles)
template <BlockFormat F>
__global__ void __launch_bounds__(32 * FragmentChunk<F>::kWarps)
    mma_q8_fragments_kernel(const FragmentArgs args) {
  using L = MostTokens<F::kOffset>;
  using C = FragmentChunk<F>;
  static_assert(L::kRows == C::kWarps * C::kWarpRows);
  __shared__ __align__(16) uint8_t staged[C::kWarps][C::kWarpRows * C::kPitch];
  let_next_kernel_start();
  // Unsigned: knowing the ranges of r and c, the compiler makes fewer instructions of their quads.
  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32, r = lane / 4, c = lane % 4;
  if (blockIdx.x == 0 && blockIdx.y == 0)
    for (uint32_t i = thread; i < args.num_arrivals; i += blockDim.x) args.arrivals[i] = 0;

  const int64_t row0 = int64_t{blockIdx.y} * L::kRows + C::kWarpRows * warp,
                skip = int64_t{blockIdx.x} * C::kBytes;
  const bytes_ptr rows = args.w + row0 * args.row_bytes;
  const RowStager<C::kWarpRows, C::kPieces, C::kPitch, 32> stage(
      rows, args.w + args.n * args.row_bytes, args.row_bytes,
      static_cast<int>(min(args.n - 1 - row0, int64_t{C::kWarpRows - 1})), lane);
  stage(shared_address(staged[warp]), skip, lane);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();

  const auto row = [&](unsigned i) {
    const auto from = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(rows + skip)) +
                      i * static_cast<uint32_t>(args.row_bytes);
    return static_cast<bytes_ptr>(staged[warp]) + i * C::kPitch + (from & 15);
  };
  const bytes_ptr mine = row(lane), pair[2] = {row(r), row(8 + r)};  // 16 rows further it is the same
  const int64_t slabs = (args.k + L::kSlab - 1) / L::kSlab;
#pragma unroll
  for (int s = 0; s < C::kElems / L::kSlab; ++s) {
    const int64_t slab = int64_t{blockIdx.x} * (C::kElems / L::kSlab) + s;
    if (slab >= slabs) break;
    uint8_t* const groups = args.to + (blockIdx.y * slabs + slab) * (L::kGroups * L::kWeightBytes);
    uint8_t* const fragments = groups + warp * (2 * 512) + 16 * lane;
#pragma unroll
    for (int g = 0; g < L::kGroups; ++g) {
      const int e = s * L::kSlab + 32 * g, block = e / F::kElems * F::kBytes;
      const int quad = e % F::kElems / 4 + static_cast<int>(c);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bytes_ptr low = pair[0] + 16 * i * C::kPitch + block,
                        high = pair[1] + 16 * i * C::kPitch + block;
        constexpr uint32_t kSigns = 0x80808080u;
        *reinterpret_cast<uint4*>(fragments + g * L::kWeightBytes + i * 512) =
            make_uint4(shifted_quad<F>(low, quad, kSigns), shifted_quad<F>(high, quad, kSigns),
                       shifted_quad<F>(low, quad + 4, kSigns), shifted_quad<F>(high, quad + 4, kSigns));
      }
    }
    store_scales<F>(groups, mine, s * L::kSlab,
                    static_cast<int>(min(args.k - slab * L::kSlab, int64_t{128})) / 32,
                    C::kWarpRows * warp + lane);
  }
  wait_for_previous_kernel();  // the product waits for this kernel only, and by way of it for the one before
}

}  // namespace quantgemm::mma_q8

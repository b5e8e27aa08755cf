// SPDX-License-Identifier: MIT
// The tensor-core rung for up to 8 tokens. A block owns 16 rows and its warps take turns along k, each
// with copies of its own in flight and no barrier before the end. The products are of bare codes, and
// the sums of each group of weights are scaled: fewer multiplications, and no weight is rounded.
// Offsets multiply Σ x, which is the product with a row of ones. Limit: reading the weights.
#pragma once
#include "../formats/gguf_formats.h"
#include "gemm_fragments.cuh"
#include "gemm_tiles.cuh"

namespace quantgemm {

inline constexpr int kFewTokens = 8, kFewRows = 16, kFewWarps = 8, kFewBlocksPerSm = 4;

template <class F>
struct FewLayout {
  static constexpr int kChunk = 256,
                       kSlots = 2;  // of k; copies of one chunk are under way beside the one in use
  static constexpr int kChunkBytes = kChunk / F::kElems * F::kBytes;
  static constexpr int kPieces = (kChunkBytes + 15 + 16 - kAlignOf<F::kBytes>) / 16;
  static constexpr int kPitch = 16 * (kPieces | 1);  // odd: 8 rows begin in different banks
  static constexpr int kSlotBytes = kFewRows * kPitch, kBytes = kFewWarps * kSlots * kSlotBytes;
};

// sums += slab · x: b[s] are the lane's token's values 16 s + 4 c … + 3 of the slab.
template <BlockFormat F, class T>
__device__ __forceinline__ void multiply_codes(float (&sums)[4], const Slab& slab, const uint2 (&b)[4]) {
  constexpr int kGroupSteps = F::kGroup < 64 ? F::kGroup / 16 : 4;
  const int c = threadIdx.x % 4;
  SlabAffines<F> affines;
  affines.load(slab, c);
#pragma unroll
  for (int first = 0; first < 4; first += kGroupSteps) {
    float parts[4] = {}, x_sums[4] = {};
    bytes_ptr blocks[2] = {slab.blocks[0], slab.blocks[1]};
    if (F::kElems == 32 && first > 0) blocks[0] += slab.second, blocks[1] += slab.second;
    const int quad0 = F::kElems == 32 ? c - 4 * first : slab.within / 4 + c;
#pragma unroll
    for (int step = first; step < first + kGroupSteps; ++step) {
      uint32_t a[4];
      load_codes<F>(blocks[0], quad0 + 4 * step, a[0], a[2], T{});
      load_codes<F>(blocks[1], quad0 + 4 * step, a[1], a[3], T{});
      mma_16x8x16(parts, a, b[step].x, b[step].y, T{});
      const uint32_t ones[4] = {kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>};
      if (F::kOffset) mma_16x8x16(x_sums, ones, b[step].x, b[step].y, T{});
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Affine affine;
      if constexpr (F::kElems == 32)
        affine = F::affine(blocks[half], 0);
      else if constexpr (SlabAffines<F>::kGroups == 4)
        affine = affines.get(first / 2, first % 2, half);
      else
        affine = affines.get(0, first / 2, half);
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        sums[e] += affine.scale * parts[e];
        if (F::kOffset) sums[e] += affine.offset * x_sums[e];
      }
    }
  }
}

// One output from decoded weights. Codes times infinity are not weights times infinity (∞ − ∞ where
// the zero is taken back), so a sum that came out as NaN is computed again this way.
template <BlockFormat F, class T>
__device__ __noinline__ float dot_decoded(bytes_ptr w, const T* x, int64_t k) {
  float sum = 0;
  for (int64_t e = 0; e < k; e += 4) {
    const bytes_ptr block = w + e / F::kElems * F::kBytes;
    const int within = static_cast<int>(e % F::kElems);
    float v[4];
    decode_quad<F>(block, within / 4, F::affine(block, within / F::kGroup), v);
    for (int j = 0; j < 4; ++j) sum += to_float(x[e + j]) * v[j];
  }
  return sum;
}

template <BlockFormat F, class T>
__global__ void __launch_bounds__(32 * kFewWarps, kFewBlocksPerSm)
    gemm_mma_few_kernel(bytes_ptr x, bytes_ptr w, T* y, int m, int64_t n, int64_t k, int64_t row_bytes) {
  using L = FewLayout<F>;
  extern __shared__ __align__(128) uint8_t smem[];
  __shared__ float turn[kFewWarps][kFewTokens][kFewRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int64_t row0 = int64_t{blockIdx.x} * kFewRows;
  const int last_row = static_cast<int>(min(n - 1 - row0, int64_t{kFewRows - 1}));
  const int chunks = static_cast<int>((k + L::kChunk - 1) / L::kChunk);
  const bytes_ptr tile = w + row0 * row_bytes;

  const RowStager<kFewRows, L::kPieces, L::kPitch, 32> stage_rows(tile, w + n * row_bytes, row_bytes,
                                                                  last_row, lane);
  uint8_t* const slots = smem + warp * L::kSlots * L::kSlotBytes;
  const uint32_t slots_address = shared_address(slots);
  const auto stage = [&](int chunk, int slot) {
    if (chunk < chunks)
      stage_rows(slots_address + slot * L::kSlotBytes, int64_t{chunk} * L::kChunkBytes, lane);
    cp_async_commit();
  };
  for (int slot = 0; slot < L::kSlots; ++slot) stage(warp + slot * kFewWarps, slot);

  // A lane whose token does not exist takes the last one: its results are not stored.
  const bytes_ptr token = x + 2 * (min(r, m - 1) * k + 4 * c);
  const auto load_x = [&](uint2(&b)[4], int64_t at, int64_t left) {  // zeros behind k
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      b[step] = make_uint2(0, 0);
      if (16 * step < left) b[step] = __ldg(reinterpret_cast<const uint2*>(token + 2 * at) + 4 * step);
    }
  };
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(tile)) + r * static_cast<int>(row_bytes);
  const int skew8 = skew + 8 * static_cast<int>(row_bytes);

  float sums[4] = {};
  int slot = 0;
#pragma unroll 1
  for (int chunk = warp; chunk < chunks; chunk += kFewWarps) {
    const int64_t k0 = int64_t{chunk} * L::kChunk;
    uint2 b[2][4];
    load_x(b[0], k0, k - k0);
    cp_async_wait<L::kSlots - 1>();
    __syncwarp();
    const bytes_ptr rows = slots + slot * L::kSlotBytes + r * L::kPitch;
    const bytes_ptr row0 = rows + ((skew + chunk * L::kChunkBytes) & 15);
    const bytes_ptr row8 = rows + 8 * L::kPitch + ((skew8 + chunk * L::kChunkBytes) & 15);
    if (k0 + L::kChunk <= k) {
#pragma unroll
      for (int at = 0; at < L::kChunk; at += 64) {
        if (at + 64 < L::kChunk) load_x(b[(at / 64 + 1) % 2], k0 + at + 64, 64);
        const int offset = at / F::kElems * F::kBytes;
        const Slab slab{{row0 + offset, row8 + offset}, at % F::kElems, F::kBytes};
        multiply_codes<F, T>(sums, slab, b[at / 64 % 2]);
      }
    } else {
#pragma unroll 1
      for (int at = 0; k0 + at < k; at += 64) {
        const int offset = at / F::kElems * F::kBytes;
        const Slab slab{{row0 + offset, row8 + offset}, at % F::kElems, k0 + at + 64 > k ? 0 : F::kBytes};
        load_x(b[0], k0 + at, k - k0 - at);
        multiply_codes<F, T>(sums, slab, b[0]);
      }
    }
    __syncwarp();  // everybody has read the slot
    stage(chunk + L::kSlots * kFewWarps, slot);
    slot = slot + 1 == L::kSlots ? 0 : slot + 1;
  }

#pragma unroll
  for (int e = 0; e < 4; ++e) turn[warp][2 * c + e % 2][r + e / 2 * 8] = sums[e];
  __syncthreads();
  const int row = threadIdx.x % kFewRows, t = threadIdx.x / kFewRows;
  if (t < m && t < kFewTokens && row <= last_row) {
    float sum = 0;
    for (int other = 0; other < kFewWarps; ++other) sum += turn[other][t][row];
    if (sum != sum) sum = dot_decoded<F>(tile + row * row_bytes, reinterpret_cast<const T*>(x) + t * k, k);
    store1(y + t * n + row0 + row, sum);
  }
}

// Explicitly instantiated in gemm_4_mma_few_<type>.cu, which the compiler can build side by side.
template <class T>
cudaError_t launch_gemm_mma_few(const GemmArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % 32 == 0) {
      using L = FewLayout<F>;
      const auto kernel = gemm_mma_few_kernel<F, T>;
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
      if (status != cudaSuccess) return;
      const auto grid = static_cast<unsigned>((args.n + kFewRows - 1) / kFewRows);
      kernel<<<grid, 32 * kFewWarps, L::kBytes, stream>>>(static_cast<bytes_ptr>(args.x), args.w,
                                                          static_cast<T*>(args.y), static_cast<int>(args.m),
                                                          args.n, args.k, args.k / F::kElems * F::kBytes);
      status = cudaGetLastError();
    }
  });
  return status;
}

}  // namespace quantgemm

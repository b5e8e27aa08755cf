// SPDX-License-Identifier: MIT
// y[m, n] = x[m, k] · w[n, k]ᵀ with int8 tensor cores, both sides' scales applied per group of 32:
//     y += s_a · (s_w · Σ q_w q_a) + o_w · sum_a        (Σ exact, the rest float32)
// A thread block of 4 warps owns kRows rows of w and 16·kPairs tokens, a warp 32 of the rows. Weights
// are the A operand, made of the native bytes by F::quad where they lie in shared memory; tokens are B.
// Limit: issue slots. Beside one mma, which holds up dispatch for about 7, stand 8 FFMA and 5 others.
#pragma once
#include "memory.cuh"
#include "mma_q8_stage.cuh"

namespace quantgemm::mma_q8 {

__device__ __forceinline__ void load4(float (&v)[4], const float* p) {
  const float4 q = *reinterpret_cast<const float4*>(p);
  v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}

// A group's weights as a lane holds them: two 16-row A fragments, and what its four rows
// r, r+8, r+16, r+24 make of an integer sum (a sum per 16 where scales are).
template <BlockFormat F, int kPairs>
struct Weights {
  using L = Layout<F, kPairs>;
  static constexpr int kParts = 32 / L::kGroup;
  uint32_t a[2][4];
  float scale[kParts][4], offset[kParts][4];

  // group: of the step
  __device__ void load(bytes_ptr const (&rows)[2], const float* table, int group) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int block = group * 32 / F::kElems * F::kBytes, quad = group * 32 % F::kElems / 4 + c;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bytes_ptr row = rows[i % 2] + i / 2 * 16 * L::kRowBytes + block;
      a[i / 2][i % 2] = F::quad(row, quad);
      a[i / 2][i % 2 + 2] = F::quad(row, quad + 4);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float* entry = table + (group * kParts + part) * kWarpRows * (F::kOffset ? 2 : 1) + 4 * r;
      load4(scale[part], entry);
      if constexpr (F::kOffset) load4(offset[part], entry + kWarpRows);
    }
  }
};

// Scales and offsets of a warp's 32 rows for all groups of a step, lane = row, into its table
// [group][scale, offset][r][row / 8]. They are kept times 2^-24, which keeps magic · scale finite
// and, with two bits of mantissa cleared (only Q8_K's float32 scales have them), exact.
constexpr float kDown = 0x1p-24f, kUp = 0x1p24f;
template <BlockFormat F, int kPairs>
__device__ __forceinline__ void fill_table(float* table, bytes_ptr row, int valid_groups) {
  using L = Layout<F, kPairs>;
  const int lane = threadIdx.x % 32;
  Affine affine[L::kStepGroups];  // all loads first: they cannot pass the stores
#pragma unroll
  for (int g = 0; g < L::kStepGroups; ++g) {
    const int e = g * L::kGroup;
    affine[g] = F::affine(row + e / F::kElems * F::kBytes, e % F::kElems / F::kGroup);
  }
  float* entry = table + 4 * (lane % 8) + lane / 8;
#pragma unroll
  for (int g = 0; g < L::kStepGroups; ++g) {
    const bool valid = g < valid_groups;  // groups past the row's end count nothing
    const uint32_t scale = __float_as_uint(affine[g].scale) & ~3u;
    entry[g * kWarpRows * (F::kOffset ? 2 : 1)] = valid ? __uint_as_float(scale) * kDown : 0.0f;
    if constexpr (F::kOffset) entry[g * kWarpRows * 2 + kWarpRows] = valid ? affine[g].offset * kDown : 0.0f;
  }
}

// Accumulators of a warp: [pair of token tiles][token tile][row tile][fragment].
template <int kPairs>
using Sums = float[kPairs][2][2][4];

// One group of 32. s · Σ without converting: fma(magic + Σ, s, −magic · s) is s · Σ rounded once,
// because magic · s is exact.
template <BlockFormat F, int kPairs>
__device__ __forceinline__ void multiply_group(Sums<kPairs>& sums, const Weights<F, kPairs>& w,
                                               uint32_t codes, const uint8_t* scales) {
  using L = Layout<F, kPairs>;
  constexpr int kParts = Weights<F, kPairs>::kParts;
  constexpr bool kPartSums = F::kOffset && kParts == 2;  // sums of 16 activations: by a matrix of ones
  float minus[kParts][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part)
    for (int i = 0; i < 4; ++i) minus[part][i] = -kMagic * w.scale[part][i];
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    uint32_t b[4];
    load_matrices(b, codes + p * 16 * kStageElems);
    float scale[4], sum[4];
    if constexpr (L::kSums) {
      for (int h = 0; h < 2; ++h) {
        const float4 q = *reinterpret_cast<const float4*>(scales + 8 * (16 * p + 8 * h + 2 * c));
        scale[2 * h] = q.x, sum[2 * h] = q.y, scale[2 * h + 1] = q.z, sum[2 * h + 1] = q.w;
      }
    } else {
      load4(scale, reinterpret_cast<const float*>(scales) + 16 * p + 4 * c);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 8 tokens, 16 rows
      const int h = i / 2, tile = i % 2;
      const uint32_t (&a)[4] = w.a[tile];
      uint32_t d[kParts][4], ones[kParts][4];
      if constexpr (kParts == 1) {
        multiply_32(d[0], a, b[2 * h], b[2 * h + 1]);
      } else {
        multiply_16(d[0], a[0], a[1], b[2 * h]);
        multiply_16(d[1], a[2], a[3], b[2 * h + 1]);
      }
      if constexpr (kPartSums)
        for (int part = 0; part < 2; ++part)
          multiply_16(ones[part], 0x01010101u, 0x01010101u, b[2 * h + part]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 2 * tile + e / 2, token = 2 * h + e % 2;
        float& y = sums[p][h][tile][e];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          float v = fmaf(__uint_as_float(d[part][e]), w.scale[part][row], minus[part][row]);
          if constexpr (kPartSums)
            v = fmaf(__uint_as_float(ones[part][e % 2]) - kMagic, w.offset[part][row], v);
          y = fmaf(v, scale[token], y);
        }
        if constexpr (L::kSums) y = fmaf(w.offset[0][row], sum[token], y);
      }
    }
  }
}

// Steps [first, last) of a tile, added up in the lanes' fragments, times 2^-24.
template <BlockFormat F, int kPairs>
__device__ __forceinline__ void multiply_tile(Sums<kPairs>& sums, const Copier<F, kPairs>& copier,
                                              uint32_t first_row_bytes, int first, int last) {
  using L = Layout<F, kPairs>;
  using C = Copier<F, kPairs>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4;
  const int all_stages = (copier.work.k + kStageElems - 1) / kStageElems;
  const int end = last * L::kStages < all_stages ? last * L::kStages : all_stages;
  // Where a row's step begins within its first 16-byte piece.
  const auto misalignment = [&](int row, int step) {
    return (first_row_bytes + row * static_cast<uint32_t>(copier.work.row_bytes) + step * L::kStepBytes) & 15;
  };
  copier.copy_activations(first * L::kStages, end);
  copier.template copy_weights<C::kPasses>(first, last);
  cp_async_commit();

  float* table = copier.shared.table(warp);
  bytes_ptr rows[2];  // r and r+8; 16 rows further a step begins at the same place of its 16 bytes
  for (int stage = first * L::kStages; stage < end; ++stage) {
    const int step = stage / L::kStages;
    cp_async_wait<0>();
    __syncthreads();  // the stage is there for all, and the one before it has been read by all
    if (stage % L::kStages == 0) {
      bytes_ptr staged = copier.shared.weights(step) + warp * kWarpRows * L::kRowBytes;
      for (int i = 0; i < 2; ++i)
        rows[i] = staged + (8 * i + r) * L::kRowBytes + misalignment(warp * kWarpRows + 8 * i + r, step);
      fill_table<F, kPairs>(table, staged + lane * L::kRowBytes + misalignment(warp * kWarpRows + lane, step),
                            (copier.work.k - step * L::kStep) / L::kGroup);
      __syncwarp();
    }
    const int first_group = stage % L::kStages * kStageGroups;
    const uint32_t codes =
        shared_address(copier.shared.codes(stage)) + (lane % 8 + lane / 16 * 8) * kStageElems;
    const uint8_t* scales = copier.shared.scales(stage);
    Weights<F, kPairs> now;
#pragma unroll
    for (int g = 0; g < kStageGroups; ++g) {
      now.load(rows, table, first_group + g);
      // The next stage's activations, and its share of the next step's weights.
      if (g == 0) copier.copy_activations(stage + 1, end);
      if (g == 1) {
        constexpr int kShare = (C::kPasses + L::kStages - 1) / L::kStages;
        copier.template copy_weights<kShare>(step + 1, last, stage % L::kStages * kShare);
      }
      if (g == 1) cp_async_commit();
      const int place = (2 * g + lane / 8 % 2) ^ (lane % 8);
      multiply_group<F, kPairs>(sums, now, codes + 16 * place, scales + g * L::kScaleStride);
    }
  }
  __syncthreads();  // shared memory is free again
}

// y's tile, by way of shared memory [token][row], so that a warp writes whole lines.
template <class Out, int kTokens, int kStride>
__device__ __forceinline__ void store_tile(const GemmArgs& args, const float* staged, int64_t first_row,
                                           int64_t first_token) {
  constexpr int kVector = kPerVector<Out>, kPerToken = kRows / kVector;
  Out* y = static_cast<Out*>(args.y);
  const bool aligned = args.n % kVector == 0;
  for (int i = threadIdx.x; i < kTokens * kPerToken; i += kThreads) {
    const int64_t token = first_token + i / kPerToken, row = first_row + i % kPerToken * kVector;
    if (token >= args.m || row >= args.n) continue;
    const float* from = staged + i / kPerToken * kStride + i % kPerToken * kVector;
    float v[kVector];
    for (int j = 0; j < kVector; ++j) v[j] = from[j] * kUp;
    Out* to = y + token * args.n + row;
    if (aligned) {
      store_vector(to, v);
    } else {
      for (int j = 0; j < kVector; ++j)
        if (row + j < args.n) store1(to + j, v[j]);
    }
  }
}

// Adds up a tile that several blocks hold parts of. Returns whether this block is the last, which
// then has the sum, taken in the order of k whoever is last.
template <int kPairs>
__device__ __forceinline__ bool combine(Sums<kPairs>& sums, const Work& work, int64_t tile, bool from_zero) {
  constexpr int kVectors = kPairs * 4;
  const auto slot = [&](int64_t block, bool head) {
    return work.partials + (2 * block + head) * (kVectors * kThreads) + threadIdx.x;
  };
  float* own = &sums[0][0][0][0];
  float4* mine = slot(blockIdx.x, from_zero);
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    __stcg(mine + i * kThreads, make_float4(own[4 * i], own[4 * i + 1], own[4 * i + 2], own[4 * i + 3]));
  __threadfence();  // the part is visible before it is counted
  __syncthreads();
  __shared__ bool is_last;
  const int64_t unit = tile * work.tile_units;
  const int64_t first = work.owner(unit), last = work.owner(unit + work.tile_units - 1);
  if (threadIdx.x == 0) is_last = atomicAdd(work.arrivals + tile, 1) == last - first;
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < 4 * kVectors; ++i) own[i] = 0;
  for (int64_t block = first; block <= last; ++block) {
    const float4* part = slot(block, block == first);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const float4 v = __ldcg(part + i * kThreads);
      own[4 * i] += v.x, own[4 * i + 1] += v.y, own[4 * i + 2] += v.z, own[4 * i + 3] += v.w;
    }
  }
  return true;
}

template <BlockFormat F, int kPairs>
__global__ void __launch_bounds__(kThreads, Layout<F, kPairs>::kBlocksPerSm)
    gemm_mma_q8_kernel(const __grid_constant__ GemmArgs args, const __grid_constant__ Work work) {
  using L = Layout<F, kPairs>;
  extern __shared__ __align__(16) uint8_t memory[];
  const int64_t end = work.begin(blockIdx.x + 1);
  for (int64_t unit = work.begin(blockIdx.x); unit < end;) {
    const int64_t index = unit / work.tile_units;
    const int first = static_cast<int>(unit % work.tile_units), units = static_cast<int>(work.tile_units);
    const int last = end - unit < units - first ? first + static_cast<int>(end - unit) : units;
    unit += last - first;
    const int64_t first_row = index / work.token_tiles * kRows;
    const int64_t first_token = index % work.token_tiles * L::kTokens;
    Sums<kPairs> sums = {};
    multiply_tile<F, kPairs>(sums, {args, work, memory, first_row, first_token},
                             static_cast<uint32_t>(first_row * work.row_bytes), first, last);
    if (last - first < units && !combine<kPairs>(sums, work, index, first == 0)) continue;

    float* staged = reinterpret_cast<float*>(memory);
    const int warp = threadIdx.x / 32, r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kPairs * 16; ++i) {
      const int e = i % 4, rows = i / 4 % 2, h = i / 8 % 2, p = i / 16;
      staged[(16 * p + 8 * h + 2 * c + e % 2) * L::kOutStride + warp * kWarpRows + 16 * rows + e / 2 * 8 +
             r] = sums[p][h][rows][e];
    }
    __syncthreads();
    switch (args.type) {
      case Real::kFloat32:
        store_tile<float, L::kTokens, L::kOutStride>(args, staged, first_row, first_token);
        break;
      case Real::kFloat16:
        store_tile<Half, L::kTokens, L::kOutStride>(args, staged, first_row, first_token);
        break;
      case Real::kBFloat16:
        store_tile<BFloat16, L::kTokens, L::kOutStride>(args, staged, first_row, first_token);
        break;
    }
    __syncthreads();  // before the next tile's copies arrive where this one's results lay
  }
}

// Launches the kernel of args.qtype. Instantiated for 16 and 32 tokens in gemm_5_mma_q8_narrow.cu, for 64
// and 128 in gemm_5_mma_q8_wide.cu, since so many kernels take long to compile.
template <int kPairs>
cudaError_t launch_tiles(const GemmArgs& args, const Work& work, int64_t grid, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % ActivationRow::kGroup == 0) {
      constexpr int kBytes = Layout<F, kPairs>::kBytes;
      const auto kernel = gemm_mma_q8_kernel<F, kPairs>;
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      if (status != cudaSuccess) return;
      kernel<<<static_cast<unsigned>(grid), kThreads, kBytes, stream>>>(args, work);
      status = cudaGetLastError();
    }
  });
  return status;
}

}  // namespace quantgemm::mma_q8

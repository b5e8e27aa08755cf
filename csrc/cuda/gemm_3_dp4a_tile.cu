// SPDX-License-Identifier: MIT
// y[m, n] for many tokens. A block owns 64 outputs × 16 · PerThread tokens and walks along k in
// steps of 128: weights are decoded once to int8 in shared memory, activations copied beside them,
// scales and offsets kept per part of 16 or 32. A thread owns 4 outputs × PerThread tokens.
// Two blocks per multiprocessor: one decodes while the other multiplies. Limit: dp4a, which runs at
// half the rate of float arithmetic, so the float work per part hides behind it.
#include "gemm_3_dp4a.cuh"

namespace quantgemm::dp4a {
namespace {

constexpr int kThreads = 256, kOutputs = 64, kOutputsPerThread = 4;
constexpr int kStep = 128, kStepGroups = kStep / kGroup;
constexpr int kPitch = kStep + 16;  // bytes from row to row: 8 rows' vectors lie in 8 different bank groups

template <BlockFormat F, int PerThread>
struct Tile {
  static constexpr int kTokens = 16 * PerThread, kParts = kStep / kPart<F>;
  alignas(16) uint8_t weights[kOutputs][kPitch];
  alignas(16) uint8_t activations[kTokens][kPitch];
  float weight_scale[kParts][kOutputs], weight_offset[F::kOffset ? kParts : 1][kOutputs];
  float scale[kStepGroups][kTokens], sum[F::kOffset ? kParts : 1][kTokens];
};

// Each thread decodes a group of one row.
template <BlockFormat F, class T>
__device__ __forceinline__ void decode_weights(T& tile, const GemmArgs& args, int64_t first_output,
                                               int64_t k0) {
  const int row = threadIdx.x / kStepGroups, g = threadIdx.x % kStepGroups;
  const int64_t wanted = first_output + row, output = wanted < args.n ? wanted : args.n - 1;
  const int64_t e = k0 + g * kGroup;
  if (e >= args.k) return;
  const int64_t block = output * (args.k / F::kElems) + e / F::kElems;
  const bytes_ptr b = args.w + block * F::kBytes;
  const int within = static_cast<int>(e % F::kElems);
  uint32_t q[kGroup / 4];
#pragma unroll
  for (int j = 0; j < kGroup / 4; ++j) q[j] = F::quad(b, within / 4 + j);
  auto* to = reinterpret_cast<uint4*>(tile.weights[row] + g * kGroup);
  to[0] = make_uint4(q[0], q[1], q[2], q[3]);
  to[1] = make_uint4(q[4], q[5], q[6], q[7]);
  constexpr int kPerGroup = kGroup / kPart<F>;
#pragma unroll
  for (int p = 0; p < kPerGroup; ++p) {
    const Affine affine = F::affine(b, (within + p * kPart<F>) / F::kGroup);
    tile.weight_scale[g * kPerGroup + p][row] = affine.scale;
    if constexpr (F::kOffset) tile.weight_offset[g * kPerGroup + p][row] = affine.offset;
  }
}

// Each thread copies 16 bytes at a time; two neighbours have a group.
template <BlockFormat F, class T>
__device__ __forceinline__ void copy_activations(T& tile, const GemmArgs& args, int64_t first_token,
                                                 int64_t k0) {
  constexpr int kPieces = kStep / 16;
#pragma unroll
  for (int i = 0; i < T::kTokens * kPieces / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x, t = index / kPieces, piece = index % kPieces;
    const int64_t wanted = first_token + t, token = wanted < args.m ? wanted : args.m - 1;
    const bool inside = k0 + piece * 16 < args.k;
    const int64_t e = inside ? k0 + piece * 16 : 0;
    const uint8_t* row = args.activations + token * ActivationRow::bytes(args.k);
    const uint4 words = *reinterpret_cast<const uint4*>(row + e);
    *reinterpret_cast<uint4*>(tile.activations[t] + piece * 16) = words;
    const float scale =
        reinterpret_cast<const float2*>(row + ActivationRow::scales_offset(args.k))[e / kGroup].x;
    if (piece % 2 == 0) tile.scale[piece / 2][t] = scale;
    if constexpr (F::kOffset) {
      int integers = dot4(words.x, 0x01010101u, dot4(words.y, 0x01010101u, 0));
      integers = dot4(words.z, 0x01010101u, dot4(words.w, 0x01010101u, integers));
      if constexpr (kPart<F> == kGroup) integers += __shfl_xor_sync(~0u, integers, 1);
      const float sum = scale * static_cast<float>(integers);
      if (kPart<F> < kGroup)
        tile.sum[piece][t] = sum;
      else if (piece % 2 == 0)
        tile.sum[piece / 2][t] = sum;
    }
  }
}

template <BlockFormat F, int PerThread>
__global__ void __launch_bounds__(kThreads, 2) tile_kernel(const GemmArgs args, int output_tiles) {
  static_assert(kPart<F> == 16 || kPart<F> == kGroup);
  using T = Tile<F, PerThread>;
  extern __shared__ uint4 shared[];
  T& tile = *reinterpret_cast<T*>(shared);
  const int64_t first_output = static_cast<int64_t>(blockIdx.x % output_tiles) * kOutputs;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x / output_tiles) * T::kTokens;
  // A warp covers 16 outputs × 8 · PerThread tokens, neighbouring lanes neighbouring rows.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int o = warp % 4 * 16 + lane / 8, t = warp / 4 * (8 * PerThread) + lane % 8;

  float y[PerThread][kOutputsPerThread] = {};
  for (int64_t k0 = 0; k0 < args.k; k0 += kStep) {
    decode_weights<F>(tile, args, first_output, k0);
    copy_activations<F>(tile, args, first_token, k0);
    __syncthreads();
    const int64_t rest = (args.k - k0) / kPart<F>;
    const int parts = rest < T::kParts ? static_cast<int>(rest) : T::kParts;
#pragma unroll 1
    for (int p = 0; p < parts; ++p) {
      int dots[PerThread][kOutputsPerThread];
#pragma unroll
      for (int i = 0; i < PerThread; ++i)
        for (int j = 0; j < kOutputsPerThread; ++j) dots[i][j] = kMagicBits;
#pragma unroll
      for (int v = 0; v < kPart<F>; v += 16) {
        uint4 w[kOutputsPerThread];
#pragma unroll
        for (int j = 0; j < kOutputsPerThread; ++j)
          w[j] = *reinterpret_cast<const uint4*>(tile.weights[o + 4 * j] + p * kPart<F> + v);
#pragma unroll
        for (int i = 0; i < PerThread; ++i) {
          const uint4 a = *reinterpret_cast<const uint4*>(tile.activations[t + 8 * i] + p * kPart<F> + v);
#pragma unroll
          for (int j = 0; j < kOutputsPerThread; ++j) {
            dots[i][j] = dot4(w[j].x, a.x, dots[i][j]);
            dots[i][j] = dot4(w[j].y, a.y, dots[i][j]);
            dots[i][j] = dot4(w[j].z, a.z, dots[i][j]);
            dots[i][j] = dot4(w[j].w, a.w, dots[i][j]);
          }
        }
      }
      float scale[kOutputsPerThread], offset[kOutputsPerThread];
#pragma unroll
      for (int j = 0; j < kOutputsPerThread; ++j) {
        scale[j] = tile.weight_scale[p][o + 4 * j];
        if constexpr (F::kOffset) offset[j] = tile.weight_offset[p][o + 4 * j];
      }
#pragma unroll
      for (int i = 0; i < PerThread; ++i) {
        const float s = tile.scale[p * kPart<F> / kGroup][t + 8 * i];
#pragma unroll
        for (int j = 0; j < kOutputsPerThread; ++j) {
          y[i][j] += scale[j] * s * (__int_as_float(dots[i][j]) - kMagic);
          if constexpr (F::kOffset) y[i][j] += offset[j] * tile.sum[p][t + 8 * i];
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < PerThread; ++i) {
    const int64_t token = first_token + t + 8 * i;
    if (token >= args.m) break;
#pragma unroll
    for (int j = 0; j < kOutputsPerThread; ++j) {
      const int64_t output = first_output + o + 4 * j;
      if (output < args.n) store_real(args.y, token * args.n + output, y[i][j], args.type);
    }
  }
}

template <BlockFormat F, int PerThread>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  using T = Tile<F, PerThread>;
  const int64_t outputs = (args.n + kOutputs - 1) / kOutputs, tokens = (args.m + T::kTokens - 1) / T::kTokens;
  const auto kernel = tile_kernel<F, PerThread>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(T)));
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(outputs * tokens), kThreads, sizeof(T), stream>>>(args,
                                                                                   static_cast<int>(outputs));
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_tiles(const GemmArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (kServes<F>) status = args.m <= 32 ? launch<F, 2>(args, stream) : launch<F, 8>(args, stream);
  });
  return status;
}

}  // namespace quantgemm::dp4a

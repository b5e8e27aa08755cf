// SPDX-License-Identifier: MIT
// What an int8 product multiplies (int8_product.h): x and packed weights as int8 with a scale per row and 256
// columns. Weights leave the lanes as they lay in the strip, 16 of a row's 64 columns to a lane: byte
// 16 c + 4 s + 2 b + h of the 64 is column 16 s + 8 b + 2 c + h; x follows. Both run at once: the second
// waits for the first at its end. Limit: DRAM.
#include "../formats/activation.h"
#include "dependent_launch.cuh"
#include "gemm_packed_int8.h"
#include "memory.cuh"
#include "packed_tile.cuh"

namespace quantgemm::packed_int8 {
namespace {

// Four codes at a time.
struct Rounding {
  float scale, inverse;
  bool plain;

  __device__ __forceinline__ explicit Rounding(float largest) {
    plain = largest > kInt8Least && largest < kInt8Most;
    if (plain) {  // the same numbers: one step of correction makes this quotient the nearest float
      constexpr float kPart = 1.0f / 127.0f;
      const float about = largest * kPart;
      scale = __fmaf_rn(__fmaf_rn(-127.0f, about, largest), kPart, about);
      inverse = __frcp_rn(scale);
    } else {
      scale = activation_scale(largest);
      inverse = inverse_activation_scale(scale);
    }
  }
  __device__ __forceinline__ uint32_t codes(float a, float b, float c, float d) const {
    if (!plain)
      return (activation_code(a, inverse) & 0xff) | (activation_code(b, inverse) & 0xff) << 8 |
             (activation_code(c, inverse) & 0xff) << 16 | activation_code(d, inverse) << 24;
    const auto bits = [&](float x) { return __float_as_uint(__fmaf_rn(x, inverse, 12582912.0f)); };
    return __byte_perm(__byte_perm(bits(a), bits(b), 0x0040), __byte_perm(bits(c), bits(d), 0x0040), 0x5410);
  }
};

// The larger magnitude; NaN above them all. PTX ISA 9.7.3.12 (max), sm_80.
__device__ __forceinline__ float larger(float largest, float x) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(x)));
  return largest;
}
template <int Lanes>
__device__ __forceinline__ float largest_of(float largest) {
#pragma unroll
  for (int lane = 1; lane < Lanes; lane *= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, lane));
  return largest;
}

constexpr int kThreads = 128, kPerThread = 16, kTogether = 2;  // rows of x whose loads are under way

template <class In>
__global__ void __launch_bounds__(kThreads)
    round_tokens_kernel(const __grid_constant__ GemmPackedArgs args, uint8_t* scratch) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Int8Layout layout(args.m, args.n, args.k);
  const int64_t col = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread;
  const int s = threadIdx.x % 4;  // of the tile that this lane has its columns of
  const In* const x = static_cast<const In*>(args.x) + col;
  uint8_t* const codes = scratch + col / kTileCols * kTileCols + 16 * s;
  float* const scales =
      reinterpret_cast<float*>(scratch + layout.token_scales_at()) + col / kInt8Group * layout.tokens;
  for (int64_t row = int64_t{blockIdx.y} * kTogether; row < args.m; row += int64_t{gridDim.y} * kTogether) {
    float v[kTogether][2][8];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[i][b][j] = 0;
        if (row + i < args.m && col + 8 * b < args.k) load8(v[i][b], x + (row + i) * args.k + 8 * b);
      }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      float largest = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) largest = larger(largest, v[i][j / 8][j % 8]);
      const Rounding rounding(largest_of<kInt8Group / kPerThread>(largest));
      uint32_t words[4];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        words[c] = rounding.codes(v[i][0][2 * c], v[i][0][2 * c + 1], v[i][1][2 * c], v[i][1][2 * c + 1]);
      transpose_quad(words);
      if (row + i >= args.m || col >= layout.cols) continue;
      *reinterpret_cast<uint4*>(codes + (row + i) * layout.cols) =
          make_uint4(words[0], words[1], words[2], words[3]);
      if (threadIdx.x % (kInt8Group / kPerThread) == 0) scales[row + i] = rounding.scale;
    }
  }
}

constexpr int kWeightBlocks = 4;  // at once on a multiprocessor

// A warp has a group of columns of a strip.
template <PackableFormat F>
__global__ void __launch_bounds__(kThreads, kWeightBlocks)
    round_weights_kernel(const __grid_constant__ GemmPackedArgs args, uint8_t* scratch, bool again) {
  using L = PackedLayout<F>;
  using Batch = PackedBatch<F>;
  constexpr int kTiles = kInt8Group / kTileCols, kBatches = kTiles / Batch::kTiles;
  static_assert(kTiles % Batch::kTiles == 0);
  let_next_kernel_start();  // before the wait: the product, which comes next, reads nothing before its own
  if (again) wait_for_previous_kernel();
  const Int8Layout layout(args.m, args.n, args.k);
  const int lane = threadIdx.x % 32, tiles = static_cast<int>(L::tiles(args.k));
  const int group = blockIdx.y * (kThreads / 32) + threadIdx.x / 32, tile = group * kTiles;
  if (tile < tiles) {
    const int64_t strip = blockIdx.x, row = strip * kStripRows + lane / 4;
    bytes_ptr const from = args.packed + strip * L::strip_bytes(args.k);
    Batch batches[kBatches];
#pragma unroll
    for (int i = 0; i < kBatches; ++i)
      if (tile + i * Batch::kTiles < tiles)
        batches[i].load(from, args.k, tile + i * Batch::kTiles, tiles - tile - i * Batch::kTiles);
    float* const scales = reinterpret_cast<float*>(scratch + layout.row_scales_at());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float w[kTiles][4][4] = {};  // tile, step, column 0 1 8 9
      float largest = 0;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (tile + i >= tiles) continue;
        const Batch& batch = batches[i / Batch::kTiles];
        BatchAffines<F> affines;
        affines.prepare(batch, half);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          uint32_t pairs[4];
          PackedFragment<F, BFloat16, true>::make(batch, i % Batch::kTiles, s, pairs);
          const Affine affine = affines.get(batch, i % Batch::kTiles * kTileCols + 16 * s, half);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t pair = pairs[half + e / 2 * 2];
            const float q = __uint_as_float(e % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
            w[i][s][e] = weight<F>(affine, q);
            largest = larger(largest, w[i][s][e]);
          }
        }
      }
      const Rounding rounding(largest_of<4>(largest));
      uint8_t* const to = scratch + layout.weights_at() + (row + 8 * half) * layout.cols +
                          int64_t{tile} * kTileCols + 16 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int s = 0; s < 4; ++s) words[s] = rounding.codes(w[i][s][0], w[i][s][1], w[i][s][2], w[i][s][3]);
        *reinterpret_cast<uint4*>(to + i * kTileCols) = make_uint4(words[0], words[1], words[2], words[3]);
      }
      if (lane % 4 == 0) scales[group * layout.all_rows + row + 8 * half] = rounding.scale;
    }
  }
  wait_for_previous_kernel();
}

}  // namespace

cudaError_t launch_round_tokens(const GemmPackedArgs& args, uint8_t* scratch, const Device& device,
                                cudaStream_t stream) {
  constexpr int kCols = kThreads * kPerThread;
  const int64_t cols = Int8Layout(args.m, args.n, args.k).cols, rows = (args.m + kTogether - 1) / kTogether;
  const dim3 grid(static_cast<unsigned>((cols + kCols - 1) / kCols),
                  static_cast<unsigned>(rows < 65535 ? rows : 65535));
  const DependentLaunch launch(grid, kThreads, device, stream);
  cudaError_t status = cudaErrorInvalidValue;
  visit_real(args.type, [&]<class In>(In) {
    status = cudaLaunchKernelEx(&launch.config, round_tokens_kernel<In>, args, scratch);
  });
  return status;
}

cudaError_t launch_round_weights(const GemmPackedArgs& args, uint8_t* scratch, bool again,
                                 const Device& device, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) {
      const int64_t groups = Int8Layout(args.m, args.n, args.k).groups, at_once = kThreads / 32;
      const dim3 grid(static_cast<unsigned>(num_strips(args.n)),
                      static_cast<unsigned>((groups + at_once - 1) / at_once));
      const DependentLaunch launch(grid, kThreads, device, stream);
      status = cudaLaunchKernelEx(&launch.config, round_weights_kernel<F>, args, scratch, again);
    }
  });
  return status;
}

}  // namespace quantgemm::packed_int8

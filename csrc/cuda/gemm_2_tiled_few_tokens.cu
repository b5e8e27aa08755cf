// SPDX-License-Identifier: MIT
// y = x · wᵀ for a few tokens, where reading w is the work. A warp owns kRows rows of w and up to
// kTokens tokens; its lanes take neighbouring units along k, so that a row is read once, in order.
// kAhead units of each row are loaded before the first is used: enough bytes have to be on the way.
// More tokens are more thread blocks, which find the weights in the L2.
// Limit: DRAM for one token; loads of x and float32 multiply-adds for eight.
#include "gemm_2_tiled.cuh"
#include "launch.h"
#include "units.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 2, kMaxTokens = 8;

template <class F, class X, int kTokens>
struct FewTokens {
  const X* x;          // [num_tokens, k]
  bytes_ptr w[kRows];  // rows
  int k;
  int num_tokens;
  float sum[kTokens][kRows];

  // Products of the units u, u + 32, … u + 32 (kUnits - 1).
  template <bool kInside, int kUnits>
  __device__ __forceinline__ void add(int u) {
    float weights[kUnits][kRows][kUnit];
    for (int a = 0; a < kUnits; ++a)
      for (int r = 0; r < kRows; ++r) load_weights<F, kInside>(weights[a][r], w[r], u + 32 * a, k);
    const X* x_row = x;
#pragma unroll
    for (int t = 0; t < kTokens; ++t, x_row += k) {
      if (t > 0 && t >= num_tokens) break;  // without a branch before the first
      for (int a = 0; a < kUnits; ++a) {
        float values[kUnit];
        load_activations<F, kInside>(values, x_row, u + 32 * a, k);
        for (int r = 0; r < kRows; ++r)
          for (int j = 0; j < kUnit; ++j) sum[t][r] += values[j] * weights[a][r][j];
      }
    }
  }
};

template <class F, class X, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens == 1 ? 5 : 4) gemm_few_tokens_kernel(GemmArgs args) {
  const int64_t passes = (args.m + kTokens - 1) / kTokens;
  const int64_t first_token = blockIdx.x % passes * kTokens;
  const int64_t first_row = (blockIdx.x / passes * kWarps + threadIdx.x / 32) * kRows;
  if (first_row >= args.n) return;
  FewTokens<F, X, kTokens> tile{static_cast<const X*>(args.x) + first_token * args.k,
                                {},
                                static_cast<int>(args.k),
                                static_cast<int>(min(args.m - first_token, int64_t{kTokens})),
                                {}};
  for (int r = 0; r < kRows; ++r)  // past the end: the last row again, not stored
    tile.w[r] = args.w + min(first_row + r, args.n - 1) * (args.k / F::kElems * F::kBytes);

  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kAhead = kTokens == 1 ? 4 : 2;  // as many as registers hold
  const int num_units = static_cast<int>((args.k + kUnit - 1) / kUnit);
  int u = lane;
  if (BlockFormat<F> || args.k % kUnit == 0)
    for (; u - lane + 32 * kAhead <= num_units; u += 32 * kAhead) tile.template add<true, kAhead>(u);
#pragma unroll 1
  for (; u < num_units; u += 32) tile.template add<false, 1>(u);

#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= tile.num_tokens) break;
    for (int r = 0; r < kRows; ++r) {
      float sum = tile.sum[t][r];
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0 && first_row + r < args.n)
        store1(static_cast<X*>(args.y) + (first_token + t) * args.n + first_row + r, sum);
    }
  }
}

template <int kTokens>
cudaError_t launch_tokens(const GemmArgs& args, cudaStream_t stream) {
  const int64_t passes = (args.m + kTokens - 1) / kTokens;
  const int64_t blocks = (args.n + kWarps * kRows - 1) / (kWarps * kRows);
  const auto grid = static_cast<unsigned>(passes * blocks);
  visit_real(args.type, [&]<class X>(X) {
    const auto launch = [&]<class F>(F) {
      gemm_few_tokens_kernel<F, X, kTokens><<<grid, kThreads, 0, stream>>>(args);
    };
    if (!BlockFormats::visit(args.qtype, launch)) PlainFormats::visit(args.qtype, launch);
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gemm_few_tokens(const GemmArgs& args, cudaStream_t stream) {
  return args.m == 1 ? launch_tokens<1>(args, stream) : launch_tokens<kMaxTokens>(args, stream);
}

}  // namespace quantgemm

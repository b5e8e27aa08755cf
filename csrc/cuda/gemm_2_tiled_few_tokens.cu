// SPDX-License-Identifier: MIT
// y = x · wᵀ for a few tokens, where reading w is the work. A warp owns kRows rows of w and up to
// kTokens tokens; its lanes take neighbouring units along k, so that a row is read once, in order.
// kAhead units of each row are fetched before the first is used, to keep enough bytes on the way.
// More tokens are more thread blocks, which find the weights in the L2.
// Limit: DRAM for one token; loads of x and float32 multiply-adds for eight.
#include "gemm_2_tiled.cuh"
#include "launch.h"
#include "units.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokens = 8, kRows = 2, kAhead = 2;

template <class F, class X>
__global__ void __launch_bounds__(kThreads, 3) gemm_few_tokens_kernel(GemmArgs args) {
  const int64_t passes = (args.m + kTokens - 1) / kTokens;
  const int64_t first_token = blockIdx.x % passes * kTokens;
  const int num_tokens = static_cast<int>(min(args.m - first_token, int64_t{kTokens}));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first_row = (blockIdx.x / passes * kWarps + threadIdx.x / 32) * kRows;
  if (first_row >= args.n) return;
  const X* x = static_cast<const X*>(args.x) + first_token * args.k;
  bytes_ptr w[kRows];  // past the end: the last row again, not stored
  for (int r = 0; r < kRows; ++r)
    w[r] = args.w + min(first_row + r, args.n - 1) * (args.k / F::kElems * F::kBytes);

  float sum[kTokens][kRows] = {};
  const int num_units = static_cast<int>((args.k + kUnit - 1) / kUnit);
  for (int first_unit = lane; first_unit < num_units; first_unit += 32 * kAhead) {
    WeightUnit<F> fetched[kAhead][kRows];
    for (int a = 0; a < kAhead; ++a)
      for (int r = 0; r < kRows; ++r) fetched[a][r].load(w[r], first_unit + 32 * a, args.k);
    float weights[kAhead][kRows][kUnit];
    for (int a = 0; a < kAhead; ++a)
      for (int r = 0; r < kRows; ++r) fetched[a][r].decode(weights[a][r]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= num_tokens) break;
      for (int a = 0; a < kAhead; ++a) {
        ActivationUnit<X> unit;
        unit.template load<F>(x + t * args.k, first_unit + 32 * a, args.k);
        float values[kUnit];
        unit.decode(values);
        for (int r = 0; r < kRows; ++r)
          for (int j = 0; j < kUnit; ++j) sum[t][r] += values[j] * weights[a][r][j];
      }
    }
  }

#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= num_tokens) break;
    for (int r = 0; r < kRows; ++r) {
      for (int step = 16; step > 0; step /= 2) sum[t][r] += __shfl_xor_sync(~0u, sum[t][r], step);
      if (lane == 0 && first_row + r < args.n)
        store1(static_cast<X*>(args.y) + (first_token + t) * args.n + first_row + r, sum[t][r]);
    }
  }
}

}  // namespace

cudaError_t launch_gemm_few_tokens(const GemmArgs& args, cudaStream_t stream) {
  const int64_t passes = (args.m + kTokens - 1) / kTokens;
  const int64_t blocks = (args.n + kWarps * kRows - 1) / (kWarps * kRows);
  visit_real(args.type, [&]<class X>(X) {
    const auto launch = [&]<class F>(F) {
      gemm_few_tokens_kernel<F, X><<<static_cast<unsigned>(passes * blocks), kThreads, 0, stream>>>(args);
    };
    if (!BlockFormats::visit(args.qtype, launch)) PlainFormats::visit(args.qtype, launch);
  });
  return cudaGetLastError();
}

}  // namespace quantgemm

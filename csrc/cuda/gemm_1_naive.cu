// SPDX-License-Identifier: MIT
// y[i, j] = sum over e of x[i, e] · w[j, e], the textbook way: a thread owns one output and walks
// along k, decoding the weights of row j as it meets them.
// Runs of 64 are summed before they are added to the rest: short sums round less than one of length k.
// Limit: loads of w, where neighbouring threads read different rows, and decoding every weight again
// for each token.
#include "../formats/gguf_formats.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {
namespace {

constexpr int kSide = 16;  // a thread block's outputs: kSide tokens × kSide rows of w
constexpr int kRun = 64;   // weights that are summed on their own (shorter blocks: a block)

// Weights first … first + Run − 1 of a block.
template <BlockFormat F, int Run, class X>
__device__ float dot_run(bytes_ptr block, int first, const X* x) {
  constexpr int kSpan = F::kGroup < Run ? F::kGroup : Run;  // with one scale
  float sum = 0;
  for (int begin = first; begin < first + Run; begin += kSpan) {
    const Affine affine = F::affine(block, begin / F::kGroup);
    for (int e = begin; e < begin + kSpan; e += 4) {
      float w[4];
      decode_quad<F>(block, e / 4, affine, w);
      for (int j = 0; j < 4; ++j) sum += to_float(x[e + j]) * w[j];
    }
  }
  return sum;
}

template <PlainFormat F, class X>
__device__ float dot_plain(bytes_ptr w, const X* x, int count) {
  float sum = 0;
  for (int e = 0; e < count; ++e) sum += to_float(x[e]) * F::value(w + e * F::kBytes);
  return sum;
}

// threadIdx.x runs along n, as y does in memory; the grid is tiles of n, then of m.
template <class F, class X>
__global__ void __launch_bounds__(kSide* kSide) gemm_naive_kernel(GemmArgs args) {
  const int64_t tiles_n = (args.n + kSide - 1) / kSide;
  const int64_t i = blockIdx.x / tiles_n * kSide + threadIdx.y;  // token
  const int64_t j = blockIdx.x % tiles_n * kSide + threadIdx.x;  // row of w
  if (i >= args.m || j >= args.n) return;
  const X* x = static_cast<const X*>(args.x) + i * args.k;
  bytes_ptr w = args.w + j * (args.k / F::kElems * F::kBytes);

  float sum = 0;
  if constexpr (BlockFormat<F>) {
    constexpr int kBlockRun = F::kElems < kRun ? F::kElems : kRun;
    for (int64_t e = 0; e < args.k; e += F::kElems, w += F::kBytes)
      for (int first = 0; first < F::kElems; first += kBlockRun)
        sum += dot_run<F, kBlockRun>(w, first, x + e);
  } else {
    for (int64_t e = 0; e < args.k; e += kRun, w += kRun * F::kBytes)
      sum += dot_plain<F>(w, x + e, static_cast<int>(min(args.k - e, int64_t{kRun})));
  }
  store1(static_cast<X*>(args.y) + i * args.n + j, sum);
}

}  // namespace

cudaError_t launch_gemm_naive(const GemmArgs& args, cudaStream_t stream) {
  const int64_t tiles_m = (args.m + kSide - 1) / kSide, tiles_n = (args.n + kSide - 1) / kSide;
  const auto grid = static_cast<unsigned>(tiles_m * tiles_n);
  visit_real(args.type, [&]<class X>(X) {
    const auto launch = [&]<class F>(F) {
      gemm_naive_kernel<F, X><<<grid, dim3(kSide, kSide), 0, stream>>>(args);
    };
    if (!BlockFormats::visit(args.qtype, launch)) PlainFormats::visit(args.qtype, launch);
  });
  return cudaGetLastError();
}

}  // namespace quantgemm

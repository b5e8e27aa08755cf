// SPDX-License-Identifier: MIT
// The small steps between a layer's products, one launch each where torch takes six and ten: RMS norm, a
// thread block per row, and rotary embedding, a thread per pair of channels. Products and sums are rounded
// one by one (no fused multiply-add), so that results are torch's.
// Limit: with one token the launch itself, with many DRAM.
#include "dependent_launch.cuh"
#include "launch.h"
#include "rms_norm.cuh"
#include "rotary.cuh"

namespace quantgemm {
namespace {

constexpr int kNormThreads = rms::kThreads, kRotaryThreads = 256;

// Eight values of a row, 8 v and on.
template <class T>
__device__ __forceinline__ void store_scaled(T* out, const float (&x)[8], const float (&weight)[8],
                                             float factor) {
  alignas(16) T stored[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) store1(stored + j, rms::normalized<T>(x[j], weight[j], factor));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i)
    reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(stored)[i];
}

template <class T>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(RmsNormArgs args) {
  __shared__ float sums[rms::kWarps];
  const int64_t row = blockIdx.x;
  const T* const x = static_cast<const T*>(args.x) + row * args.cols;
  const T* const weight = static_cast<const T*>(args.weight);
  T* const out = static_cast<T*>(args.out) + row * args.cols;
  const int64_t vectors = args.cols / 8, first = threadIdx.x;
  const bool aligned = args.cols % 8 == 0;  // other rows start anywhere
  wait_for_previous_kernel();
  let_next_kernel_start();
  float sum = 0, values[8], scales[8];  // of the first vector, the only one of rows up to 4096
  if (aligned) {
    if (first < vectors) load8(values, x + 8 * first), load8(scales, weight + 8 * first);
    for (int64_t unit = first; unit < rms::num_units(args.cols); unit += kNormThreads)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t col = rms::first_col(unit) + 8 * w;
        if (col < args.cols) rms::add_squares(sum, x + col);
      }
  } else {
    for (int64_t i = first; i < args.cols; i += kNormThreads) sum += to_float(x[i]) * to_float(x[i]);
  }
  sum = rms::sum_of_lanes(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  const float factor = rms::factor_of(rms::sum_of_warps(sums), args.cols, args.eps);
  if (aligned) {
    for (int64_t v = first; v < vectors; v += kNormThreads) {
      if (v != first) load8(values, x + 8 * v), load8(scales, weight + 8 * v);
      store_scaled(out + 8 * v, values, scales, factor);
    }
  } else {
    for (int64_t i = first; i < args.cols; i += kNormThreads)
      store1(out + i, rms::normalized<T>(to_float(x[i]), to_float(weight[i]), factor));
  }
}

// Grid: pairs of channels of all heads and tokens, of queries, then of keys.
template <class T>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(RotaryArgs args, int64_t pairs) {
  int64_t pair = blockIdx.x * int64_t{kRotaryThreads} + threadIdx.x;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (pair >= pairs) return;
  const int64_t half = args.channels / 2, queries = args.batch * args.sides[0].heads * args.tokens * half;
  const bool is_key = pair >= queries;
  if (is_key) pair -= queries;
  const RotatedHeads& side = args.sides[is_key];
  const int64_t i = pair % half, row = pair / half, t = row % args.tokens, h = row / args.tokens % side.heads,
                b = row / args.tokens / side.heads;
  const T* const x =
      static_cast<const T*>(side.x) + b * side.strides[0] + h * side.strides[1] + t * side.strides[2];
  const int64_t angle = b * args.angle_stride + t * args.channels;
  const T *const cos = static_cast<const T*>(args.cos) + angle, *const sin =
                                                                    static_cast<const T*>(args.sin) + angle;
  T* const out = static_cast<T*>(side.out) + row * args.channels;
  const float low = to_float(x[i]), high = to_float(x[i + half]);
  const auto store = [&](float own, float other, int64_t at) {
    store1(out + at, turned<T>(own, other, to_float(cos[at]), to_float(sin[at])));
  };
  store(low, -high, i);
  store(high, low, i + half);
}

}  // namespace

cudaError_t launch_rms_norm(const RmsNormArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  const DependentLaunch launch(static_cast<unsigned>(args.rows), kNormThreads, device, stream);
  visit_real(args.type,
             [&]<class T>(T) { status = cudaLaunchKernelEx(&launch.config, rms_norm_kernel<T>, args); });
  return status;
}

cudaError_t launch_rotary(const RotaryArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  const int64_t heads = args.sides[0].heads + args.sides[1].heads,
                pairs = args.batch * heads * args.tokens * (args.channels / 2),
                blocks = (pairs + kRotaryThreads - 1) / kRotaryThreads;
  const DependentLaunch launch(static_cast<unsigned>(blocks), kRotaryThreads, device, stream);
  visit_real(args.type,
             [&]<class T>(T) { status = cudaLaunchKernelEx(&launch.config, rotary_kernel<T>, args, pairs); });
  return status;
}

}  // namespace quantgemm

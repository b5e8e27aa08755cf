// SPDX-License-Identifier: MIT
// y = x · wᵀ by tiles. New against naive: what a thread block needs of x and w is read and decoded
// once, into shared memory as float32, and a thread owns a square of outputs in registers, so that
// eight values read from shared memory feed up to 16 multiply-adds.
// A block owns Edge tokens × Edge outputs and walks along k in steps; while it multiplies one step,
// its threads fetch the next: each one unit of x and one of w. Sums of kFlush along k are added to
// totals in shared memory, since short sums round less. Limit: float32 multiply-adds.
#include "gemm_2_tiled.cuh"
#include "launch.h"
#include "units.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 256;
constexpr int kFlush = 128;

// Shared memory of a tile of one step, transposed: unit u of row r is at [u][j · Edge + r], j = 0…7.
// The padding puts the stores of a warp, kUnits lanes to a row, into different banks.
template <int Edge>
struct Step {
  static constexpr int kUnits = kThreads / Edge;
  float x[kUnits][kUnit * Edge + 32 / kUnits];
  float w[kUnits][kUnit * Edge + 32 / kUnits];
};

// A thread's outputs are squares of 4 × 4. Lanes are 4 along m × 8 along n, warps 4 × 2:
//   token  warp / 2 · Edge/4 + 16 h + 4 (lane / 8) + i      h < Edge / 64, i < 4
//   output warp % 2 · Edge/2 + 32 h + 4 (lane % 8) + i
template <int Edge>
struct Shared {
  static constexpr int kSide = Edge / 16;
  Step<Edge> steps[2];
  float4 totals[kSide * kSide / 4][kThreads];  // a column is one thread's
};

__device__ __forceinline__ void store4(float* y, const float* v) {
  *reinterpret_cast<float4*>(y) = make_float4(v[0], v[1], v[2], v[3]);
}
template <class Real16>
__device__ __forceinline__ void store4(Real16* y, const float* v) {
  *reinterpret_cast<uint2*>(y) = make_uint2(pack_pair(v[0], v[1], Real16{}), pack_pair(v[2], v[3], Real16{}));
}

// sum[i][j] += products of one step
template <int Edge, int Side>
__device__ __forceinline__ void multiply(float (&sum)[Side][Side], const Step<Edge>& step, int token,
                                         int output) {
#pragma unroll 1
  for (int u = 0; u < Step<Edge>::kUnits; ++u) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      float x[Side], w[Side];
      for (int h = 0; h < Side; h += 4) {
        *reinterpret_cast<float4*>(x + h) =
            *reinterpret_cast<const float4*>(&step.x[u][j * Edge + token + 4 * h]);
        *reinterpret_cast<float4*>(w + h) =
            *reinterpret_cast<const float4*>(&step.w[u][j * Edge + output + 8 * h]);
      }
      for (int a = 0; a < Side; ++a)
        for (int b = 0; b < Side; ++b) sum[a][b] += x[a] * w[b];
    }
  }
}

// totals += sum, sum = 0
template <int Edge, int Side>
__device__ __forceinline__ void flush(float (&sum)[Side][Side], Shared<Edge>& shared) {
  for (int i = 0; i < Side * Side / 4; ++i) {
    float4& total = shared.totals[i][threadIdx.x];
    float* s = &sum[4 * i / Side][4 * i % Side];
    total = make_float4(total.x + s[0], total.y + s[1], total.z + s[2], total.w + s[3]);
    s[0] = s[1] = s[2] = s[3] = 0;
  }
}

template <class F, class X, int Edge>
__global__ void __launch_bounds__(kThreads, 2) gemm_tiled_kernel(GemmArgs args) {
  constexpr int kUnits = Step<Edge>::kUnits, kStep = kUnits * kUnit, kSide = Edge / 16;
  extern __shared__ float4 memory[];
  Shared<Edge>& shared = *reinterpret_cast<Shared<Edge>*>(memory);

  const int64_t tiles_m = (args.m + Edge - 1) / Edge;
  const int64_t first_token = blockIdx.x % tiles_m * Edge, first_output = blockIdx.x / tiles_m * Edge;

  // What this thread fetches. Rows past the end repeat the last one; their outputs are not stored.
  const int r = static_cast<int>(threadIdx.x) / kUnits, u = static_cast<int>(threadIdx.x) % kUnits;
  const X* x_row = static_cast<const X*>(args.x) + min(first_token + r, args.m - 1) * args.k;
  bytes_ptr w_row = args.w + min(first_output + r, args.n - 1) * (args.k / F::kElems * F::kBytes);
  ActivationUnit<X> x;
  WeightUnit<F> w;
  const auto fetch = [&](int step) {
    x.template load<F>(x_row, step * kUnits + u, args.k);
    w.load(w_row, step * kUnits + u, args.k);
  };
  const auto put = [&](Step<Edge>& step) {
    float v[kUnit];
    x.decode(v);
    for (int j = 0; j < kUnit; ++j) step.x[u][j * Edge + r] = v[j];
    w.decode(v);
    for (int j = 0; j < kUnit; ++j) step.w[u][j * Edge + r] = v[j];
  };

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int token = warp / 2 * (Edge / 4) + lane / 8 * 4, output = warp % 2 * (Edge / 2) + lane % 8 * 4;
  float sum[kSide][kSide] = {};
  for (auto& column : shared.totals) column[threadIdx.x] = make_float4(0, 0, 0, 0);

  const int num_steps = static_cast<int>((args.k + kStep - 1) / kStep);
  fetch(0);
  put(shared.steps[0]);
  __syncthreads();
  for (int step = 0; step < num_steps; ++step) {
    const bool more = step + 1 < num_steps;
    if (more) fetch(step + 1);
    multiply(sum, shared.steps[step % 2], token, output);
    if ((step + 1) % (kFlush / kStep) == 0 || !more) flush(sum, shared);
    if (more) put(shared.steps[(step + 1) % 2]);
    __syncthreads();  // the step is complete; and nobody reads any more what the next one replaces
  }

  for (int i = 0; i < kSide * kSide / 4; ++i) {
    const int a = 4 * i / kSide, b = 4 * i % kSide;
    const int64_t row = first_token + token + a / 4 * 16 + a % 4;
    const int64_t col = first_output + output + b / 4 * 32;
    if (row >= args.m) continue;
    const float4 total = shared.totals[i][threadIdx.x];
    const float values[4] = {total.x, total.y, total.z, total.w};
    X* y = static_cast<X*>(args.y) + row * args.n + col;
    if (args.n % 4 == 0 && col < args.n) {
      store4(y, values);
    } else {
      for (int j = 0; j < 4 && col + j < args.n; ++j) store1(y + j, values[j]);
    }
  }
}

template <int Edge>
cudaError_t launch_tiles(const GemmArgs& args, cudaStream_t stream) {
  const int64_t tiles = ((args.m + Edge - 1) / Edge) * ((args.n + Edge - 1) / Edge);
  cudaError_t status = cudaSuccess;
  visit_real(args.type, [&]<class X>(X) {
    const auto launch = [&]<class F>(F) {
      const auto kernel = gemm_tiled_kernel<F, X, Edge>;
      status =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<Edge>));
      if (status == cudaSuccess)
        kernel<<<static_cast<unsigned>(tiles), kThreads, sizeof(Shared<Edge>), stream>>>(args);
    };
    if (!BlockFormats::visit(args.qtype, launch)) PlainFormats::visit(args.qtype, launch);
  });
  return status == cudaSuccess ? cudaGetLastError() : status;
}

}  // namespace

cudaError_t launch_gemm_tiled(const GemmArgs& args, cudaStream_t stream) {
  if (args.m <= kFewTokens) return launch_gemm_few_tokens(args, stream);
  return args.m <= 512 ? launch_tiles<64>(args, stream) : launch_tiles<128>(args, stream);
}

}  // namespace quantgemm

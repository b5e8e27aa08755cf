// SPDX-License-Identifier: MIT
// y = x · wᵀ by tiles. New against naive: what a thread block needs of x and w is read and decoded
// once, into shared memory as float32, and a thread owns a square of outputs in registers, so that
// 16 values read from shared memory feed 64 multiply-adds.
// A block owns Edge tokens × Edge outputs and walks along k in steps of kStep; a second block on the
// same multiprocessor multiplies while this one loads. Sums of kFlush along k are added to totals in
// shared memory: short sums round less. Limit: float32 multiply-adds, and reads of shared memory.
#include "gemm_2_tiled.cuh"

#include <climits>

#include "device.h"
#include "launch.h"
#include "units.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 256, kStep = 32, kFlush = 128;
constexpr int kUnits = kStep / kUnit;     // of a row: as many neighbouring lanes fetch them
constexpr int kPass = kThreads / kUnits;  // rows fetched at a time

// A thread's outputs are squares of 4 × 4; a warp is 4 lanes along m × 8 along n, a block 4 × 2 warps.
// Lanes 0-3 are a square of 2 × 2, and so on: groups of neighbouring lanes then read few addresses.
//    0  1  4  5  8  9 12 13
//    2  3  6  7 10 11 14 15
//   16 17 20 21 24 25 28 29
//   18 19 22 23 26 27 30 31
__device__ __forceinline__ int lane_m(int lane) { return lane / 2 % 2 + lane / 16 * 2; }
__device__ __forceinline__ int lane_n(int lane) { return lane % 2 + lane / 4 % 4 * 2; }

template <int Edge>
struct Shared {
  static constexpr int kSide = Edge / 16;  // a thread's outputs: kSide × kSide
  // Transposed: value j of unit u of row r is at [u][j · Edge + r]. The padding puts the units that
  // neighbouring lanes store into different banks.
  static constexpr int kSlab = kUnit * Edge + 32 / kUnits;
  float x[kUnits][kSlab], w[kUnits][kSlab];
  float4 totals[kSide * kSide / 4][kThreads];  // a column is one thread's
};

__device__ __forceinline__ void store4(float* y, const float* v) {
  *reinterpret_cast<float4*>(y) = make_float4(v[0], v[1], v[2], v[3]);
}
template <class Real16>
__device__ __forceinline__ void store4(Real16* y, const float* v) {
  *reinterpret_cast<uint2*>(y) = make_uint2(pack_pair(v[0], v[1], Real16{}), pack_pair(v[2], v[3], Real16{}));
}

// The rows of x and w that a block needs. Rows past the end repeat the last one; nobody stores their
// outputs.
struct Rows {
  int64_t first_token, first_output;
  int last_token, last_output;  // counted from the first
};

// One step of both into shared memory: a thread takes units of rows r, r + kPass, …
template <class F, int Edge>
__device__ __forceinline__ void fetch(Shared<Edge>& shared, const GemmArgs& args, const Rows& rows, int k,
                                      int step) {
  const int u = static_cast<int>(threadIdx.x) % kUnits;
#pragma unroll
  for (int r = static_cast<int>(threadIdx.x) / kUnits; r < Edge; r += kPass) {
    float v[kUnit];
    load_activations<F>(v, args.x, args.type, rows.first_token + min(r, rows.last_token), step * kUnits + u,
                        k);
    for (int j = 0; j < kUnit; ++j) shared.x[u][j * Edge + r] = v[j];
    load_weights<F>(v, args.w + (rows.first_output + min(r, rows.last_output)) * (k / F::kElems) * F::kBytes,
                    step * kUnits + u, k);
    for (int j = 0; j < kUnit; ++j) shared.w[u][j * Edge + r] = v[j];
  }
}

// sum[a][b] += products of one step
template <int Edge, int Side>
__device__ __forceinline__ void multiply(float (&sum)[Side][Side], const Shared<Edge>& shared, int token,
                                         int output) {
#pragma unroll 1
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      float x[Side], w[Side];
      for (int h = 0; h < Side; h += 4) {
        *reinterpret_cast<float4*>(x + h) =
            *reinterpret_cast<const float4*>(&shared.x[u][j * Edge + token + 4 * h]);
        *reinterpret_cast<float4*>(w + h) =
            *reinterpret_cast<const float4*>(&shared.w[u][j * Edge + output + 8 * h]);
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

// A thread's outputs, the first of which is y[token, output].
template <class Y, int Edge>
__device__ __forceinline__ void store_tile(const GemmArgs& args, const Shared<Edge>& shared, int64_t token,
                                           int64_t output) {
  constexpr int kSide = Edge / 16;
  for (int i = 0; i < kSide * kSide / 4; ++i) {
    const int a = 4 * i / kSide, b = 4 * i % kSide;
    const int64_t row = token + a / 4 * 16 + a % 4, col = output + b / 4 * 32;
    if (row >= args.m) continue;
    const float4 total = shared.totals[i][threadIdx.x];
    const float values[4] = {total.x, total.y, total.z, total.w};
    Y* y = static_cast<Y*>(args.y) + row * args.n + col;
    if (args.n % 4 == 0 && col < args.n) {
      store4(y, values);
    } else {
      for (int j = 0; j < 4 && col + j < args.n; ++j) store1(y + j, values[j]);
    }
  }
}

template <class F, int Edge>
__global__ void __launch_bounds__(kThreads, 2) gemm_tiled_kernel(GemmArgs args) {
  constexpr int kSide = Edge / 16;
  extern __shared__ float4 memory[];
  Shared<Edge>& shared = *reinterpret_cast<Shared<Edge>*>(memory);

  const int64_t tiles_m = (args.m + Edge - 1) / Edge;
  const int64_t first_token = blockIdx.x % tiles_m * Edge, first_output = blockIdx.x / tiles_m * Edge;
  const int k = static_cast<int>(args.k);
  const Rows rows{first_token, first_output, static_cast<int>(min(args.m - first_token, int64_t{Edge})) - 1,
                  static_cast<int>(min(args.n - first_output, int64_t{Edge})) - 1};
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int token = warp / 2 * (Edge / 4) + lane_m(lane) * 4;
  const int output = warp % 2 * (Edge / 2) + lane_n(lane) * 4;

  float sum[kSide][kSide] = {};
  for (auto& column : shared.totals) column[threadIdx.x] = make_float4(0, 0, 0, 0);
  const int num_steps = (k + kStep - 1) / kStep;
  for (int step = 0; step < num_steps; ++step) {
    fetch<F>(shared, args, rows, k, step);
    __syncthreads();  // the step is complete
    multiply(sum, shared, token, output);
    if ((step + 1) % (kFlush / kStep) == 0 || step + 1 == num_steps) flush(sum, shared);
    __syncthreads();  // nobody reads any more what the next step replaces
  }

  switch (args.type) {
    case Real::kFloat32: return store_tile<float>(args, shared, first_token + token, first_output + output);
    case Real::kFloat16: return store_tile<Half>(args, shared, first_token + token, first_output + output);
    case Real::kBFloat16:
      return store_tile<BFloat16>(args, shared, first_token + token, first_output + output);
  }
}

template <int Edge>
cudaError_t launch_tiles(const GemmArgs& args, cudaStream_t stream) {
  const int64_t tiles = ((args.m + Edge - 1) / Edge) * ((args.n + Edge - 1) / Edge);
  cudaError_t status = cudaSuccess;
  const auto launch = [&]<class F>(F) {
    const auto kernel = gemm_tiled_kernel<F, Edge>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<Edge>));
    if (status == cudaSuccess)
      kernel<<<static_cast<unsigned>(tiles), kThreads, sizeof(Shared<Edge>), stream>>>(args);
  };
  if (!BlockFormats::visit(args.qtype, launch)) PlainFormats::visit(args.qtype, launch);
  return status == cudaSuccess ? cudaGetLastError() : status;
}

}  // namespace

cudaError_t launch_gemm_tiled(const GemmArgs& args, cudaStream_t stream) {
  if (args.k > INT_MAX) return cudaErrorInvalidValue;  // places in a row are 32-bit
  if (args.m <= kFewTokens) return launch_gemm_few_tokens(args, stream);
  const int64_t large_tiles = ((args.m + 127) / 128) * ((args.n + 127) / 128);
  return large_tiles < current_device().multiprocessors ? launch_tiles<64>(args, stream)
                                                        : launch_tiles<128>(args, stream);
}

}  // namespace quantgemm

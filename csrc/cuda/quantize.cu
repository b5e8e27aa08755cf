// SPDX-License-Identifier: MIT
// Blocks of real numbers to GGUF blocks: one thread encodes one block with the encoder the CPU uses,
// so the bytes are equal. Small blocks (≤ 64 values) are staged through shared memory in both
// directions, which makes the global accesses wide; blocks of 256 are bound by the scale search, not
// by memory, and read through the cache.
#include "../formats/encode.h"
#include "../formats/gguf_formats.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 128;  // and blocks of values per thread block

// Eight values of any storage type. A branch that all threads take alike, so that the encoders, which
// are long, are compiled once per format.
__device__ __forceinline__ void load_any8(float (&v)[8], const QuantizeArgs& args, int64_t e) {
  switch (args.x_type) {
    case Real::kFloat32: return load8(v, static_cast<const float*>(args.x) + e);
    case Real::kFloat16: return load8(v, static_cast<const Half*>(args.x) + e);
    case Real::kBFloat16: return load8(v, static_cast<const BFloat16*>(args.x) + e);
  }
}

__device__ __forceinline__ const float* importance_of(const QuantizeArgs& args, int64_t block, int elems) {
  return args.importance ? args.importance + block % args.blocks_per_row * elems : nullptr;
}

template <class F>
__global__ void __launch_bounds__(kThreads) quantize_staged_kernel(QuantizeArgs args) {
  constexpr int kStride = F::kElems + 1;  // a word of padding spreads a column of blocks over the banks
  __shared__ float values[kThreads * kStride];
  __shared__ alignas(16) uint8_t encoded[kThreads * F::kBytes];

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int64_t left = args.num_blocks - first;
  const int count = left < kThreads ? static_cast<int>(left) : kThreads;
  for (int e = 8 * static_cast<int>(threadIdx.x); e < count * F::kElems; e += 8 * kThreads) {
    float v[8];
    load_any8(v, args, first * F::kElems + e);
    for (int j = 0; j < 8; ++j) values[e / F::kElems * kStride + e % F::kElems + j] = v[j];
  }
  __syncthreads();  // a thread's block was loaded by several threads
  const int b = static_cast<int>(threadIdx.x);
  if (b < count)
    Encoder<F>::encode(values + b * kStride, importance_of(args, first + b, F::kElems),
                       encoded + b * F::kBytes);
  __syncthreads();  // the encoded blocks are copied by other threads than their encoders
  copy_bytes<kThreads>(args.blocks + first * F::kBytes, encoded, count * F::kBytes);
}

template <class F>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= args.num_blocks) return;
  float values[F::kElems];
  for (int i = 0; i < F::kElems; i += 8) {
    float v[8];
    load_any8(v, args, b * F::kElems + i);
    for (int j = 0; j < 8; ++j) values[i + j] = v[j];
  }
  Encoder<F>::encode(values, importance_of(args, b, F::kElems), args.blocks + b * F::kBytes);
}

}  // namespace

cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>((args.num_blocks + kThreads - 1) / kThreads);
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (Encodable<F>) {
      if constexpr (F::kElems <= 64) {
        quantize_staged_kernel<F><<<grid, kThreads, 0, stream>>>(args);
      } else {
        quantize_kernel<F><<<grid, kThreads, 0, stream>>>(args);
      }
    }
  });
  return cudaGetLastError();
}

}  // namespace quantgemm

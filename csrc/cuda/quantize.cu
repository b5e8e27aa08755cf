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
constexpr int kPad = 16;       // bytes between staged blocks: a column of 16-byte reads meets no bank twice

// Eight values of any storage type. A branch that all threads take alike, so that the encoders, which
// are long, are compiled once per format.
__device__ __forceinline__ void load_any8(float (&v)[8], const uint8_t* x, Real type) {
  switch (type) {
    case Real::kFloat32: return load8(v, reinterpret_cast<const float*>(x));
    case Real::kFloat16: return load8(v, reinterpret_cast<const Half*>(x));
    case Real::kBFloat16: return load8(v, reinterpret_cast<const BFloat16*>(x));
  }
}

template <class F>
__device__ __forceinline__ void load_block(float (&values)[F::kElems], const uint8_t* x, Real type) {
  const int size = type == Real::kFloat32 ? 4 : 2;
#pragma unroll
  for (int i = 0; i < F::kElems; i += 8) {
    float v[8];
    load_any8(v, x + i * size, type);
    for (int j = 0; j < 8; ++j) values[i + j] = v[j];
  }
}

// Weighted: with importance. Without it the compiler drops the search, and with it most registers.
template <class F, bool Weighted>
__global__ void __launch_bounds__(kThreads) quantize_staged_kernel(QuantizeArgs args) {
  __shared__ alignas(16) uint8_t staged[kThreads * (F::kElems * sizeof(float) + kPad)];
  __shared__ alignas(16) uint8_t encoded[kThreads * F::kBytes];

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int64_t left = args.num_blocks - first;
  const int count = left < kThreads ? static_cast<int>(left) : kThreads;
  const int block_bytes = F::kElems * (args.x_type == Real::kFloat32 ? 4 : 2), vectors = block_bytes / 16;
  const auto* x = static_cast<const uint4*>(args.x) + first * vectors;
  for (int i = threadIdx.x; i < count * vectors; i += kThreads)
    *reinterpret_cast<uint4*>(staged + i * 16 + i / vectors * kPad) = __ldcs(x + i);
  __syncthreads();  // a thread's block was loaded by several threads
  const int b = static_cast<int>(threadIdx.x);
  if (b < count) {
    float values[F::kElems];
    load_block<F>(values, staged + b * (block_bytes + kPad), args.x_type);
    const int64_t column = (first + b) % args.blocks_per_row * F::kElems;
    Encoder<F>::encode(values, Weighted ? args.importance + column : nullptr, encoded + b * F::kBytes);
  }
  __syncthreads();  // the encoded blocks are copied by other threads than their encoders
  copy_bytes<kThreads>(args.blocks + first * F::kBytes, encoded, count * F::kBytes);
}

template <class F>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= args.num_blocks) return;
  const int block_bytes = F::kElems * (args.x_type == Real::kFloat32 ? 4 : 2);
  float values[F::kElems];
  load_block<F>(values, static_cast<const uint8_t*>(args.x) + b * block_bytes, args.x_type);
  const int64_t column = b % args.blocks_per_row * F::kElems;
  Encoder<F>::encode(values, args.importance ? args.importance + column : nullptr,
                     args.blocks + b * F::kBytes);
}

}  // namespace

cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>((args.num_blocks + kThreads - 1) / kThreads);
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (Encodable<F>) {
      if constexpr (F::kElems <= 64) {
        if constexpr (Encoder<F>::kUsesImportance)
          if (args.importance) return quantize_staged_kernel<F, true><<<grid, kThreads, 0, stream>>>(args);
        quantize_staged_kernel<F, false><<<grid, kThreads, 0, stream>>>(args);
      } else {
        quantize_kernel<F><<<grid, kThreads, 0, stream>>>(args);
      }
    }
  });
  return cudaGetLastError();
}

}  // namespace quantgemm

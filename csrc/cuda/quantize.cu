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

// Values per thread block: 128 blocks of 32. One word of padding per block spreads a column of
// blocks over the banks.
constexpr int kThreads = 128;

template <class F, class In>
__global__ void __launch_bounds__(kThreads) quantize_staged_kernel(QuantizeArgs args) {
  constexpr int kStride = F::kElems + 1;
  __shared__ float values[kThreads * kStride];
  __shared__ alignas(16) uint8_t encoded[kThreads * F::kBytes];

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int64_t left = args.num_blocks - first;
  const int count = left < kThreads ? static_cast<int>(left) : kThreads;
  const In* x = static_cast<const In*>(args.x) + first * F::kElems;
  for (int e = 8 * static_cast<int>(threadIdx.x); e < count * F::kElems; e += 8 * kThreads) {
    float v[8];
    load8(v, x + e);
    for (int j = 0; j < 8; ++j) values[e / F::kElems * kStride + e % F::kElems + j] = v[j];
  }
  __syncthreads();  // a thread's block was loaded by several threads
  if (static_cast<int>(threadIdx.x) < count) {
    const int64_t column = (first + threadIdx.x) % args.blocks_per_row * F::kElems;
    Encoder<F>::encode(values + threadIdx.x * kStride, args.importance ? args.importance + column : nullptr,
                       encoded + threadIdx.x * F::kBytes);
  }
  __syncthreads();  // the encoded blocks are copied by other threads than their encoders
  copy_bytes<kThreads>(args.blocks + first * F::kBytes, encoded, count * F::kBytes);
}

template <class F, class In>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= args.num_blocks) return;
  float values[F::kElems];
  const In* x = static_cast<const In*>(args.x) + b * F::kElems;
  for (int i = 0; i < F::kElems; ++i) values[i] = to_float(x[i]);
  const int64_t column = b % args.blocks_per_row * F::kElems;
  Encoder<F>::encode(values, args.importance ? args.importance + column : nullptr,
                     args.blocks + b * F::kBytes);
}

}  // namespace

cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>((args.num_blocks + kThreads - 1) / kThreads);
  visit_real(args.x_type, [&]<class In>(In) {
    BlockFormats::visit(args.qtype, [&]<class F>(F) {
      if constexpr (Encodable<F>) {
        if constexpr (F::kElems <= 64) {
          quantize_staged_kernel<F, In><<<grid, kThreads, 0, stream>>>(args);
        } else {
          quantize_kernel<F, In><<<grid, kThreads, 0, stream>>>(args);
        }
      }
    });
  });
  return cudaGetLastError();
}

}  // namespace quantgemm

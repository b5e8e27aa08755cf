// SPDX-License-Identifier: MIT
// out[b, e] = scale · q + offset for all blocks b of a tensor, e.g. Q4_0 -> bfloat16.
// Idea: few GGUF blocks have a size that allows wide loads, but many together do. A thread block
// copies kTileElems weights' worth of blocks to shared memory in 16-byte pieces; then a thread
// decodes as many neighbouring weights as make a 16-byte store, so that a warp writes whole lines.
// Limit: DRAM, bytes in + bytes out.
#include "../formats/gguf_formats.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 128, kBlocksPerSm = 16;
constexpr int kTileElems = 8192;  // 32 blocks of 256: a multiple of 16 bytes for every format

// Thread t owns vector t of each step. A step is a whole number of blocks, so the place inside a
// block, and with it every shift and field offset, is the same in all steps.
template <BlockFormat F, class Out>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    dequantize_kernel(bytes_ptr blocks, Out* out, int64_t num_blocks) {
  constexpr int kVector = kPerVector<Out>, kStepElems = kVector * kThreads;
  constexpr int kStepBytes = kStepElems / F::kElems * F::kBytes, kTileBlocks = kTileElems / F::kElems;
  static_assert(kStepElems % F::kElems == 0 && F::kGroup % kVector == 0);
  __shared__ alignas(16) uint8_t tile[kTileBlocks * F::kBytes];

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileBlocks;
  const int64_t left = num_blocks - first;
  const int count = left < kTileBlocks ? static_cast<int>(left) : kTileBlocks;
  copy_bytes<kThreads>(tile, blocks + first * F::kBytes, count * F::kBytes);
  __syncthreads();  // the tile is read by other threads than those that wrote it

  const int e = kVector * static_cast<int>(threadIdx.x), within = e % F::kElems;
  bytes_ptr block = tile + e / F::kElems * F::kBytes;
  out += first * F::kElems + e;
  const int steps = (count * F::kElems - e + kStepElems - 1) / kStepElems;
#pragma unroll
  for (int step = 0; step < kTileElems / kStepElems; ++step) {
    if (step >= steps) return;
    const Affine affine = F::affine(block + step * kStepBytes, within / F::kGroup);
    float w[kVector];
    for (int j = 0; j < kVector; j += 4)
      decode_quad<F>(block + step * kStepBytes, (within + j) / 4, affine, w + j);
    store_vector(out + step * kStepElems, w);
  }
}

// Unquantised rows: a thread converts kPlain neighbouring numbers, read and written in wide pieces.
constexpr int kPlain = 8;

template <PlainFormat F, class Out>
__global__ void __launch_bounds__(kThreads) convert_kernel(bytes_ptr elements, Out* out, int64_t count) {
  const int64_t e = kPlain * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  elements += e * F::kBytes;
  if (e + kPlain <= count) {
    using Piece = std::conditional_t<F::kBytes == 1, uint2, uint4>;
    Piece pieces[kPlain * F::kBytes / sizeof(Piece)];
    for (int i = 0; i < static_cast<int>(sizeof pieces / sizeof(Piece)); ++i)
      pieces[i] = __ldcs(reinterpret_cast<const Piece*>(elements) + i);
    for (int v = 0; v < kPlain; v += kPerVector<Out>) {
      float w[kPerVector<Out>];
      for (int j = 0; j < kPerVector<Out>; ++j)
        w[j] = F::value(reinterpret_cast<bytes_ptr>(pieces) + (v + j) * F::kBytes);
      store_vector(out + e + v, w);
    }
  } else {
    for (int j = 0; e + j < count; ++j) store1(out + e + j, F::value(elements + j * F::kBytes));
  }
}

}  // namespace

cudaError_t launch_dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return cudaSuccess;
  visit_real(args.out_type, [&]<class Out>(Out) {
    Out* out = static_cast<Out*>(args.out);
    const auto launch = [&]<class F>(F) {
      constexpr int kBlocksPerTile = PlainFormat<F> ? kPlain * kThreads : kTileElems / F::kElems;
      const auto grid = static_cast<unsigned>((args.num_blocks + kBlocksPerTile - 1) / kBlocksPerTile);
      if constexpr (PlainFormat<F>) {
        convert_kernel<F><<<grid, kThreads, 0, stream>>>(args.blocks, out, args.num_blocks);
      } else {
        dequantize_kernel<F><<<grid, kThreads, 0, stream>>>(args.blocks, out, args.num_blocks);
      }
    };
    if (!BlockFormats::visit(args.qtype, launch)) PlainFormats::visit(args.qtype, launch);
  });
  return cudaGetLastError();
}

}  // namespace quantgemm

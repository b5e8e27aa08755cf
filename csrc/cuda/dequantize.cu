// SPDX-License-Identifier: MIT
// out[b, e] = scale · q + offset for all blocks b of a tensor, e.g. Q4_0 -> bfloat16: a thread block
// decodes a tile of them (decode_tile.cuh). Limit: DRAM, bytes in + bytes out.
#include "decode_tile.cuh"
#include "launch.h"

namespace quantgemm {
namespace {

constexpr int kBlocksPerSm = 16;

// Types of few bits do little but write, which goes better in fewer places at once: shared memory that nobody
// uses leaves room for half as many thread blocks.
template <class F>
constexpr int kIdleBytes = 16 * F::kBytes < 3 * F::kElems ? 24 << 10 : 0;

template <BlockFormat F, class Out>
__global__ void __launch_bounds__(kDecodeThreads, kBlocksPerSm)
    dequantize_kernel(bytes_ptr blocks, Out* out, int64_t num_blocks) {
  constexpr int kTileBlocks = kTileElems / F::kElems;
  __shared__ alignas(16) uint8_t tile[kTileBytes<F>];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTileBlocks;
  const int64_t left = num_blocks - first;
  decode_tile<F>(tile, blocks + first * F::kBytes, 0, out + first * F::kElems,
                 left < kTileBlocks ? static_cast<int>(left) : kTileBlocks);
}

template <PlainFormat F, class Out>
__global__ void __launch_bounds__(kDecodeThreads)
    convert_kernel(bytes_ptr elements, Out* out, int64_t count) {
  const int64_t e = kPlain * (static_cast<int64_t>(blockIdx.x) * kDecodeThreads + threadIdx.x);
  convert<F>(elements + e * F::kBytes, out + e, e + kPlain <= count, count - e);
}

}  // namespace

cudaError_t launch_dequantize(const DequantizeArgs& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return cudaSuccess;
  visit_real(args.out_type, [&]<class Out>(Out) {
    Out* out = static_cast<Out*>(args.out);
    const auto launch = [&]<class F>(F) {
      constexpr int kBlocksPerTile = PlainFormat<F> ? kPlain * kDecodeThreads : kTileElems / F::kElems;
      const auto grid = static_cast<unsigned>((args.num_blocks + kBlocksPerTile - 1) / kBlocksPerTile);
      if constexpr (PlainFormat<F>) {
        convert_kernel<F><<<grid, kDecodeThreads, 0, stream>>>(args.blocks, out, args.num_blocks);
      } else {
        dequantize_kernel<F>
            <<<grid, kDecodeThreads, kIdleBytes<F>, stream>>>(args.blocks, out, args.num_blocks);
      }
    };
    if (!BlockFormats::visit(args.qtype, launch)) PlainFormats::visit(args.qtype, launch);
  });
  return cudaGetLastError();
}

}  // namespace quantgemm

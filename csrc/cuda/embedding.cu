// SPDX-License-Identifier: MIT
// out[i] = decoded row ids[i] of w: a gather of rows, each decoded as dequantize does (decode_tile.cuh).
// A thread block owns one tile of one row; an id outside the table fills it with NaN.
// Limit: DRAM, the bytes of the rows asked for + bytes out.
#include "decode_tile.cuh"
#include "launch.h"

namespace quantgemm {
namespace {

template <BlockFormat F, class Out>
__device__ __forceinline__ void embed_tile(const EmbeddingArgs& args, int64_t i, int64_t id,
                                           int64_t tile_idx) {
  constexpr int kTileBlocks = kTileElems / F::kElems;
  __shared__ alignas(16) uint8_t tile[kTileBytes<F>];
  const int64_t first = tile_idx * kTileBlocks;
  const auto count = static_cast<int>(min(args.row_blocks - first, int64_t{kTileBlocks}));
  Out* out = static_cast<Out*>(args.out) + (i * args.row_blocks + first) * F::kElems;
  if (id < 0 || id >= args.num_rows) {
    float nan[kPerVector<Out>];
    for (float& value : nan) value = bit_cast<float>(0x7fffffffu);
    for (int e = kPerVector<Out> * static_cast<int>(threadIdx.x); e < count * F::kElems;
         e += kPerVector<Out> * kDecodeThreads)
      store_vector(out + e, nan);
  } else {
    bytes_ptr blocks = args.w + (id * args.row_blocks + first) * F::kBytes;
    decode_tile<F>(tile, blocks, static_cast<int>(reinterpret_cast<uintptr_t>(blocks) % 16), out, count);
  }
}

template <PlainFormat F, class Out>
__device__ __forceinline__ void embed_tile(const EmbeddingArgs& args, int64_t i, int64_t id,
                                           int64_t tile_idx) {
  const int64_t e = kPlain * (tile_idx * kDecodeThreads + threadIdx.x), count = args.row_blocks - e;
  Out* out = static_cast<Out*>(args.out) + i * args.row_blocks + e;
  if (id < 0 || id >= args.num_rows) {
    for (int j = 0; j < kPlain && j < count; ++j) store1(out + j, bit_cast<float>(0x7fffffffu));
  } else if (count > 0) {  // rows of a multiple of kPlain numbers keep the alignment of the first
    convert<F>(args.w + (id * args.row_blocks + e) * F::kBytes, out, args.row_blocks % kPlain == 0, count);
  }
}

template <class F, class Out>
__global__ void __launch_bounds__(kDecodeThreads)
    embedding_kernel(EmbeddingArgs args, int64_t tiles_per_row) {
  const int64_t i = blockIdx.x / tiles_per_row;
  embed_tile<F, Out>(args, i, args.ids[i], blockIdx.x % tiles_per_row);
}

}  // namespace

cudaError_t launch_embedding(const EmbeddingArgs& args, cudaStream_t stream) {
  visit_real(args.out_type, [&]<class Out>(Out) {
    const auto launch = [&]<class F>(F) {
      constexpr int kTileBlocks = PlainFormat<F> ? kPlain * kDecodeThreads : kTileElems / F::kElems;
      const int64_t tiles_per_row = (args.row_blocks + kTileBlocks - 1) / kTileBlocks;
      const auto grid = static_cast<unsigned>(args.num_ids * tiles_per_row);
      embedding_kernel<F, Out><<<grid, kDecodeThreads, 0, stream>>>(args, tiles_per_row);
    };
    if (!BlockFormats::visit(args.qtype, launch)) PlainFormats::visit(args.qtype, launch);
  });
  return cudaGetLastError();
}

}  // namespace quantgemm

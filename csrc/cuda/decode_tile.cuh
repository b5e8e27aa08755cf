// SPDX-License-Identifier: MIT
// Blocks -> numbers by one thread block, for kernels that write decoded rows.
// Few GGUF blocks have a size that allows wide loads, but many together do: up to kTileElems weights'
// worth of them are copied to shared memory in 16-byte pieces; then a thread decodes as many
// neighbouring weights as make a 16-byte store, so that a warp writes whole lines.
#pragma once
#include "../formats/gguf_formats.h"
#include "memory.cuh"

namespace quantgemm {

constexpr int kDecodeThreads = 128;
constexpr int kTileElems = 8192;  // 32 blocks of 256: a multiple of 16 bytes for every format

// Shared memory for a tile that may begin off a 16-byte boundary.
template <BlockFormat F>
inline constexpr int kTileBytes = kTileElems / F::kElems * F::kBytes + 16;

// num_blocks blocks, `lead` bytes past a 16-byte boundary, to out, which starts on one. Thread t owns vector
// t of each step. A step is a whole number of blocks, so the place inside a block, and with it every shift
// and field offset, is the same in all steps.
template <BlockFormat F, class Out>
__device__ __forceinline__ void decode_tile(uint8_t* tile, bytes_ptr blocks, int lead, Out* out,
                                            int num_blocks) {
  constexpr int kVector = kPerVector<Out>, kStepElems = kVector * kDecodeThreads;
  constexpr int kStepBytes = kStepElems / F::kElems * F::kBytes;
  static_assert(kStepElems % F::kElems == 0 && F::kGroup % kVector == 0);
  // The copy begins at the boundary, which is inside the tensor.
  copy_bytes<kDecodeThreads>(tile, blocks - lead, lead + num_blocks * F::kBytes);
  __syncthreads();  // the tile is read by other threads than those that wrote it

  const int e = kVector * static_cast<int>(threadIdx.x), within = e % F::kElems;
  bytes_ptr block = tile + lead + e / F::kElems * F::kBytes;
  out += e;
  const int steps = (num_blocks * F::kElems - e + kStepElems - 1) / kStepElems;
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

// Unquantised rows: a thread converts kPlain neighbouring numbers. Where both rows allow it (whole)
// they are read and written in wide pieces, else the first `count` of them one by one.
constexpr int kPlain = 8;

template <PlainFormat F, class Out>
__device__ __forceinline__ void convert(bytes_ptr elements, Out* out, bool whole, int64_t count) {
  if (whole) {
    using Piece = std::conditional_t<F::kBytes == 1, uint2, uint4>;
    Piece pieces[kPlain * F::kBytes / sizeof(Piece)];
    for (int i = 0; i < static_cast<int>(sizeof pieces / sizeof(Piece)); ++i)
      pieces[i] = __ldcs(reinterpret_cast<const Piece*>(elements) + i);
    for (int v = 0; v < kPlain; v += kPerVector<Out>) {
      float w[kPerVector<Out>];
      for (int j = 0; j < kPerVector<Out>; ++j)
        w[j] = F::value(reinterpret_cast<bytes_ptr>(pieces) + (v + j) * F::kBytes);
      store_vector(out + v, w);
    }
  } else {
    for (int j = 0; j < kPlain && j < count; ++j) store1(out + j, F::value(elements + j * F::kBytes));
  }
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// Blocks [n, row_bytes] -> strips of the packed layout (formats/packed.h), and back. A thread block owns
// 16 rows by kChunk columns; the blocks of its rows lie in shared memory, so that both sides move whole
// lines: rows as runs of 16 bytes there, lanes' words and pieces of heads here.
// Limit: DRAM, the bytes of the matrix twice. unpack rebuilds a block by one thread and is slower.
#include "../formats/gguf_formats.h"
#include "../formats/packed.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {
namespace {

constexpr int kChunk = 2048, kPackThreads = 256;  // a multiple of every block and of a tile

template <class F>
struct Stage {  // a chunk of 16 rows in shared memory
  static constexpr int kRowBytes = kChunk / F::kElems * F::kBytes;
  static constexpr int kPitch = ((kRowBytes + 15) / 16 + 1 | 1) * 16;  // odd: rows in different banks
  static constexpr int kBytes = kStripRows * kPitch;
};

template <int Bits>
__device__ __forceinline__ void store_words(const uint32_t (&words)[Bits], uint8_t* tile, int lane) {
  if constexpr (Bits >= 4) {
#pragma unroll
    for (int w = 0; w < Bits; w += 4)
      *reinterpret_cast<uint4*>(tile + PackedField<Bits>::at(lane, w)) =
          make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
  } else {
#pragma unroll
    for (int w = 0; w < Bits; ++w)
      *reinterpret_cast<uint32_t*>(tile + PackedField<Bits>::at(lane, w)) = words[w];
  }
}
template <int Bits>
__device__ __forceinline__ void load_words(bytes_ptr tile, int lane, uint32_t (&words)[Bits]) {
#pragma unroll
  for (int w = 0; w < Bits; ++w)
    words[w] = *reinterpret_cast<const uint32_t*>(tile + PackedField<Bits>::at(lane, w));
}

// The part of a strip that a thread block owns: columns first … first + cols − 1 of `rows` rows.
struct Part {
  int64_t strip, first;
  int rows, cols;
};
__device__ __forceinline__ Part part_of(const PackArgs& args, int64_t chunks) {
  const int64_t strip = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk;
  return {strip, first,
          static_cast<int>(max(int64_t{0}, min(args.n - strip * kStripRows, int64_t{kStripRows}))),
          static_cast<int>(min(args.k - first, int64_t{kChunk}))};
}

template <PackableFormat F>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackArgs args, int64_t chunks) {
  using L = PackedLayout<F>;
  using S = Stage<F>;
  extern __shared__ uint4 shared[];
  uint8_t* const stage = reinterpret_cast<uint8_t*>(shared);
  const Part part = part_of(args, chunks);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kPackThreads / 32;
  const int64_t row_bytes = args.k / F::kElems * F::kBytes;
  bytes_ptr source = args.from + part.strip * kStripRows * row_bytes + part.first / F::kElems * F::kBytes;
  const int run = part.cols / F::kElems * F::kBytes;
  // A row begins anywhere; it keeps its place between multiples of 16 and is copied from the one before.
  const auto skew_of = [&](int row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(source + row * row_bytes) % 16);
  };
  for (int row = warp; row < part.rows; row += warps) {
    const int skew = skew_of(row), bytes = skew + run;
    bytes_ptr from = source + row * row_bytes - skew;
    uint8_t* to = stage + row * S::kPitch;
#pragma unroll 4
    for (int i = 16 * lane; i + 16 <= bytes; i += 512)
      *reinterpret_cast<uint4*>(to + i) = __ldcs(reinterpret_cast<const uint4*>(from + i));
    for (int i = bytes / 16 * 16 + lane; i < bytes; i += 32) to[i] = from[i];
  }
  __syncthreads();

  uint8_t* const strip = args.to + part.strip * L::strip_bytes(args.k);
  const int r = lane / 4, c = lane % 4;
  bytes_ptr rows[2] = {stage + r * S::kPitch + skew_of(r), stage + (r + 8) * S::kPitch + skew_of(r + 8)};
  const int64_t first_tile = part.first / kTileCols;
  for (int tile = warp; tile * kTileCols < part.cols; tile += warps) {
    uint32_t pairs[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int half = i % 2, within = i / 4 * 16 + i % 4 / 2 * 8;  // of the tile, but for c
      const int col = tile * kTileCols + within;
      // Blocks of 32 or more: 8 columns at a multiple of 8 are in one.
      const bool inside = r + 8 * half < part.rows && col < part.cols;
      const uint32_t quad =
          inside ? stored_codes<F>(rows[half] + col / F::kElems * F::kBytes, col % F::kElems / 4 + c / 2) : 0;
      pairs[i] = pair_of(quad, c % 2);
    }
    uint32_t low[L::kLowBits];
    pack_words<L::kLowBits, 0>(pairs, low);
    store_words(low, strip + (first_tile + tile) * L::kLowTile, lane);
    if constexpr (L::kHighBits > 0) {
      uint32_t high[L::kHighBits];
      pack_words<L::kHighBits, L::kLowBits>(pairs, high);
      store_words(high, strip + L::high_at(args.k) + (first_tile + tile) * L::kHighTile, lane);
    }
  }

  const int64_t first_span = part.first / L::kSpan;
  const int spans = (part.cols + L::kSpan - 1) / L::kSpan;
#pragma unroll
  for (int first = 0; first < L::kRecordBytes; first += L::piece_bytes(first)) {
    constexpr int kStep = 2;  // bytes a thread moves; a piece of one byte is the end of an odd record
    const int size = L::piece_bytes(first), step = size < kStep ? 1 : kStep;
    uint8_t* const plane = strip + L::piece_at(args.k, first) + first_span * kStripRows * size;
    for (int i = threadIdx.x * step; i < spans * kStripRows * size; i += kPackThreads * step) {
      const int span = i / (kStripRows * size), place = i / size % kStripRows,
                row = place / 2 + place % 2 * 8;
      uint32_t value = 0;
      for (int b = 0; b < step; ++b) {
        const int byte = first + i % size + b, col = span * L::kSpan + byte / L::kHeadBytes * F::kElems;
        if (row < part.rows && col < part.cols)
          value |= static_cast<uint32_t>(stage[row * S::kPitch + skew_of(row) + col / F::kElems * F::kBytes +
                                               F::head_at(byte % L::kHeadBytes)])
                   << (8 * b);
      }
      if (step == 2)
        *reinterpret_cast<uint16_t*>(plane + i) = static_cast<uint16_t>(value);
      else
        plane[i] = static_cast<uint8_t>(value);
    }
  }
}

template <PackableFormat F>
__global__ void __launch_bounds__(kPackThreads) unpack_kernel(const PackArgs args, int64_t chunks) {
  using L = PackedLayout<F>;
  using S = Stage<F>;
  extern __shared__ uint4 shared[];
  uint8_t* const stage = reinterpret_cast<uint8_t*>(shared);
  uint8_t* const codes = stage + S::kBytes;  // [16][kChunk], padded against bank conflicts
  constexpr int kCodePitch = kChunk + 16;
  const Part part = part_of(args, chunks);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kPackThreads / 32;
  const int64_t row_bytes = args.k / F::kElems * F::kBytes, first_tile = part.first / kTileCols;
  bytes_ptr strip = args.from + part.strip * L::strip_bytes(args.k);

  for (int tile = warp; tile * kTileCols < part.cols; tile += warps) {
    uint32_t pairs[16] = {}, low[L::kLowBits];
    load_words(strip + (first_tile + tile) * L::kLowTile, lane, low);
    unpack_words<L::kLowBits, 0>(low, pairs);
    if constexpr (L::kHighBits > 0) {
      uint32_t high[L::kHighBits];
      load_words(strip + L::high_at(args.k) + (first_tile + tile) * L::kHighTile, lane, high);
      unpack_words<L::kHighBits, L::kLowBits>(high, pairs);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = lane / 4 + 8 * (i % 2),
                col = tile * kTileCols + 16 * (i / 4) + 8 * (i % 4 / 2) + 2 * (lane % 4);
      *reinterpret_cast<uint16_t*>(codes + row * kCodePitch + col) =
          static_cast<uint16_t>(pairs[i] | pairs[i] >> 8);
    }
  }
  for (int i = threadIdx.x; i < S::kBytes / 16; i += kPackThreads) shared[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  uint8_t* const target = args.to + part.strip * kStripRows * row_bytes + part.first / F::kElems * F::kBytes;
  const auto skew_of = [&](int row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(target + row * row_bytes) % 16);
  };
  const int row_blocks = part.cols / F::kElems;
  for (int i = threadIdx.x; i < part.rows * row_blocks; i += kPackThreads) {
    const int row = i / row_blocks, block_idx = i % row_blocks;
    uint8_t* const block = stage + row * S::kPitch + skew_of(row) + block_idx * F::kBytes;
    bytes_ptr four = codes + row * kCodePitch + block_idx * F::kElems;
#pragma unroll 4  // whole blocks of 256 would need more registers than there are
    for (int q = 0; q < F::kElems / 4; ++q) F::place(block, q, reinterpret_cast<const uint32_t*>(four)[q]);
    load_head<F>(strip, args.k, row, part.first / F::kElems + block_idx, block);
  }
  __syncthreads();

  const int run = row_blocks * F::kBytes;
  for (int row = warp; row < part.rows; row += warps) {
    const int skew = skew_of(row);
    bytes_ptr from = stage + row * S::kPitch + skew;
    uint8_t* const to = target + row * row_bytes;
    const int lead = min((16 - skew) % 16, run), whole = (run - lead) / 16 * 16;
    if (lane < lead) to[lane] = from[lane];
    for (int i = 16 * lane; i < whole; i += 512)
      *reinterpret_cast<uint4*>(to + lead + i) = *reinterpret_cast<const uint4*>(from + lead + i);
    for (int i = lead + whole + lane; i < run; i += 32) to[i] = from[i];
  }
}

// A product reads its first weights before the launch ahead of it is over (gemm_packed.cuh). That launch may
// not be the one that writes them, so it is this one.
__global__ void settle_kernel() {}

template <class Kernel>
cudaError_t run(Kernel kernel, int shared_bytes, int64_t strips, const PackArgs& args, cudaStream_t stream) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  const int64_t chunks = (args.k + kChunk - 1) / kChunk;
  kernel<<<static_cast<unsigned>(strips * chunks), kPackThreads, shared_bytes, stream>>>(args, chunks);
  settle_kernel<<<1, 1, 0, stream>>>();
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>)
      status = run(pack_kernel<F>, Stage<F>::kBytes, num_strips(args.n), args, stream);
  });
  return status;
}

cudaError_t launch_unpack(const PackArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>)
      status = run(unpack_kernel<F>, Stage<F>::kBytes + kStripRows * (kChunk + 16),
                   (args.n + kStripRows - 1) / kStripRows, args, stream);
  });
  return status;
}

}  // namespace quantgemm

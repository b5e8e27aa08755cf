// SPDX-License-Identifier: MIT
// How the tensor-core rungs divide work and bring tiles to shared memory.
// Stream-k: the k-chunks of all tiles, tile after tile, are one line of units that is cut into
// equally long pieces, one per block. A tile that was cut is summed by whichever of its blocks
// finishes last, in the order of the blocks, so that results do not depend on timing.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.h"
#include "ptx.cuh"

namespace quantgemm {

// Tiles of rows × tokens of y; token tiles of the same rows follow each other. Fewer than 2^31 units,
// as y alone would be terabytes otherwise.
struct TileSchedule {
  uint32_t token_tiles, tiles, chunks;  // chunks of k in each tile
  uint32_t blocks, share, longer;       // units of a block; the first `longer` blocks have one more

  TileSchedule(int64_t row_tiles, int64_t token_tiles, int64_t chunks, int64_t blocks)
      : token_tiles(token_tiles), tiles(row_tiles * token_tiles), chunks(chunks), blocks(blocks) {
    share = tiles * this->chunks / this->blocks;
    longer = tiles * this->chunks % this->blocks;
  }
  __device__ uint32_t first_unit(uint32_t block) const { return block * share + min(block, longer); }
  __device__ uint32_t block_of(uint32_t unit) const {
    const uint32_t in_longer = longer * (share + 1);
    return unit < in_longer ? unit / (share + 1) : longer + (unit - in_longer) / share;
  }
  bool cuts_tiles() const { return tiles % blocks != 0; }
};

// One block per tile if that keeps the multiprocessors busy, else as many as they hold at once.
inline TileSchedule schedule_tiles(int64_t row_tiles, int64_t token_tiles, int64_t chunks, int64_t resident) {
  const int64_t tiles = row_tiles * token_tiles, waves = (tiles + resident - 1) / resident;
  const bool busy = 10 * tiles >= 9 * waves * resident;
  return {row_tiles, token_tiles, chunks, busy ? tiles : std::min(tiles * chunks, resident)};
}

// Scratch memory of a schedule that cuts tiles: a counter per tile, then two partial tiles per block
// (of the tile that it finishes and of the one that it begins).
struct PartialTiles {
  uint32_t* arrivals;  // [tiles], zero at launch
  float* sums;         // [blocks, 2, tile elems]

  static int64_t counter_bytes(const TileSchedule& s) { return (int64_t{s.tiles} * 4 + 127) / 128 * 128; }
  static int64_t bytes(const TileSchedule& s, int64_t tile_elems) {
    return s.cuts_tiles() ? counter_bytes(s) + s.blocks * 2 * tile_elems * 4 : 0;
  }
  static PartialTiles at(void* scratch, const TileSchedule& s) {
    auto* bytes = static_cast<uint8_t*>(scratch);
    return {reinterpret_cast<uint32_t*>(bytes), reinterpret_cast<float*>(bytes + counter_bytes(s))};
  }
};

inline int multiprocessors() {
  static int counts[64] = {};  // per device; racing threads write the same number
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (device < 64 && counts[device] > 0) return counts[device];
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  if (device < 64) counts[device] = count;
  return count;
}

// ---- rows of weights, as they are in the file ----
// A row's bytes begin at no particular alignment. Whole 16-byte pieces around them are copied, so
// they lie `address mod 16` bytes into the row's place in shared memory.
template <int Rows, int Pieces, int Pitch, int Threads>
struct RowStager {
  static constexpr int kLanes = 8;                // share a row: fewer lines in an instruction than rows
  static constexpr int kStep = Threads / kLanes;  // rows at once
  static_assert(Rows % kStep == 0);

  bytes_ptr first;  // the thread's first piece, not yet rounded down to 16
  bytes_ptr end;    // of the tensor
  int64_t row_bytes;
  int last_row;  // of the tile, when n ends in it

  __device__ static int row(int thread) { return thread / kLanes; }
  __device__ static int lane(int thread) { return thread % kLanes; }
  __device__ __forceinline__ RowStager(bytes_ptr tile, bytes_ptr end, int64_t row_bytes, int last_row,
                                       int thread)
      : first(tile + row(thread) * row_bytes + 16 * lane(thread)),
        end(end),
        row_bytes(row_bytes),
        last_row(last_row) {}

  __device__ __forceinline__ static bytes_ptr round_down(bytes_ptr p) {
    return reinterpret_cast<bytes_ptr>(reinterpret_cast<uintptr_t>(p) & ~uintptr_t{15});
  }
  // Bytes from `skip` on of every row.
  __device__ __forceinline__ void operator()(uint32_t target, int64_t skip, int thread) const {
    target += row(thread) * Pitch + 16 * lane(thread);
    bytes_ptr at = first + skip;
    if (last_row == Rows - 1 &&
        at + (Rows - 1 - row(thread)) * row_bytes + 16 * (Pieces - lane(thread)) <= end) {
#pragma unroll
      for (int i = 0; i < Rows / kStep; ++i, at += kStep * row_bytes) {
        const bytes_ptr piece = round_down(at);
#pragma unroll
        for (int j = 0; j < Pieces; j += kLanes)
          if (j + kLanes <= Pieces || lane(thread) < Pieces - j)
            cp_async16(target + i * kStep * Pitch + 16 * j, piece + 16 * j);
      }
    } else {  // near the tensor's end: its last piece may be short, rows behind it are left as they were
#pragma unroll 1
      for (int i = row(thread); i <= last_row; i += kStep, at += kStep * row_bytes, target += kStep * Pitch)
#pragma unroll 1
        for (int j = 0; j < Pieces - lane(thread); j += kLanes) {
          const bytes_ptr piece = round_down(at) + 16 * j;
          if (piece < end)
            cp_async16(target + 16 * j, piece, end - piece < 16 ? static_cast<int>(end - piece) : 16);
        }
    }
  }
};

// ---- rows of activations ----
// 64 values of a token are 8 pieces of 16 bytes. Piece p of token t lies at place p ^ swizzle(t), so
// that neither a warp reading 8 bytes per lane (4 tokens × 32 bytes at a time) nor one reading 16
// bytes (2 tokens × 64) meets a bank twice.
__device__ __forceinline__ int swizzle(int token) { return (token & 1) << 2 | (token & 2); }

// The lane's values of x for a step of 16: four of token r of eight tokens, whose rows begin at `row`.
__device__ __forceinline__ uint2 load_tokens(bytes_ptr row, int part, int step) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4, piece = 4 * part + 2 * step + c / 2;
  return *reinterpret_cast<const uint2*>(row + 16 * (piece ^ swizzle(r)) + 8 * (c % 2));
}

// 64 values of Tokens tokens, as [token][64]. Values behind k become zero; instead of tokens behind m
// the last one is copied, since their results are never stored. No branches, so that the compiler can
// put products between the copies.
template <int Tokens, int Threads>
struct TokenStager {
  static constexpr int kStep = Threads / 8;  // tokens at once
  static_assert(Tokens % kStep == 0 && kStep % 4 == 0);

  bytes_ptr x;     // the thread's first piece
  int64_t stride;  // bytes between the thread's tokens
  int last;        // the last of them

  __device__ __forceinline__ TokenStager(bytes_ptr tile, int64_t k, int num_tokens) : stride(2 * kStep * k) {
    const int token = min(static_cast<int>(threadIdx.x / 8), num_tokens - 1);
    x = tile + 2 * (token * k) + 16 * (threadIdx.x % 8);
    last = (num_tokens - 1 - token) / kStep;
  }
  // From k0 on, num_values values; none if that is not positive.
  __device__ __forceinline__ void operator()(uint32_t target, int k0, int num_values) const {
    const int token = threadIdx.x / 8, piece = threadIdx.x % 8;
    target += 128 * token + 16 * (piece ^ swizzle(token));
    const bool behind = 8 * piece >= num_values;
    const bytes_ptr source = x + (behind ? 0 : 2 * int64_t{k0});
#pragma unroll
    for (int i = 0; i < Tokens / kStep; ++i)
      cp_async16_if(num_values > 0, target + i * kStep * 128, source + min(i, last) * stride, behind);
  }
};

}  // namespace quantgemm

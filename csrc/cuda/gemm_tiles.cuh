// SPDX-License-Identifier: MIT
// How the tensor-core rungs divide work and bring tiles to shared memory.
// Stream-k: the k-chunks of all tiles, tile after tile, are one line of units that is cut into
// equally long pieces, one per block. A tile that was cut is summed by whichever of its blocks
// finishes last, in the order of the blocks, so that results do not depend on timing.
#pragma once
#include <cuda_runtime.h>

#include "launch.h"
#include "ptx.cuh"

namespace quantgemm {

// Tiles of rows × tokens of y; token tiles of the same rows follow each other.
struct TileSchedule {
  int64_t token_tiles, tiles, chunks;  // chunks of k in each tile
  int64_t blocks;

  __host__ __device__ int64_t units() const { return tiles * chunks; }
  __host__ __device__ int64_t first_unit(int64_t block) const { return block * units() / blocks; }
  __host__ __device__ int64_t block_of(int64_t unit) const { return ((unit + 1) * blocks - 1) / units(); }
  __host__ __device__ bool cuts_tiles() const { return tiles % blocks != 0; }
};

// One block per tile if that keeps the multiprocessors busy, else as many as they hold at once.
inline TileSchedule schedule_tiles(int64_t row_tiles, int64_t token_tiles, int64_t chunks, int64_t resident) {
  const int64_t tiles = row_tiles * token_tiles;
  const int64_t waves = (tiles + resident - 1) / resident;
  if (10 * tiles >= 9 * waves * resident) return {token_tiles, tiles, chunks, tiles};
  const int64_t units = tiles * chunks;
  return {token_tiles, tiles, chunks, units < resident ? units : resident};
}

// Scratch memory of a schedule that cuts tiles: a counter per tile, then two partial tiles per block
// (of the tile that it finishes and of the one that it begins).
struct PartialTiles {
  uint32_t* arrivals;  // [tiles], zero at launch
  float* sums;         // [blocks, 2, tile elems]

  static int64_t counter_bytes(const TileSchedule& s) { return (s.tiles * 4 + 127) / 128 * 128; }
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
// Bytes [start, start + …) of each row begin at no particular alignment. Whole 16-byte pieces around
// them are copied, so a row's bytes lie `start mod 16` bytes into its place in shared memory.
template <int Pieces, int Pitch, int Rows, int Threads>
__device__ __forceinline__ void stage_rows(uint8_t* target, bytes_ptr w, int64_t start, int64_t row_bytes,
                                           int last_row, int64_t end) {
#pragma unroll
  for (int i = threadIdx.x; i < Rows * Pieces; i += Threads) {
    const int row = i / Pieces, piece = i % Pieces;
    const int64_t at = ((start + min(row, last_row) * row_bytes) & ~int64_t{15}) + 16 * piece;
    const int64_t left = end - at;  // the tensor's last piece may be short
    const int valid = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
    cp_async16(target + row * Pitch + 16 * piece, valid > 0 ? w + at : w, valid);
  }
}

// ---- rows of activations ----
// 64 values of a token are 8 pieces of 16 bytes. Piece p of token t lies at place p ^ f(t), so that
// neither a warp reading 8 bytes per lane (4 tokens × 32 bytes at a time) nor one reading 16 bytes
// (2 tokens × 64) meets a bank twice.
__device__ __forceinline__ int swizzle(int token) { return (token & 1) << 2 | (token & 2); }

// Values [k0, k0 + 64 Slabs) of Tokens tokens, as [slab][token][64]; zeros outside of x.
template <int Tokens, int Slabs, int Threads>
__device__ __forceinline__ void stage_tokens(uint8_t* target, bytes_ptr x, int num_tokens, int64_t k0, int64_t k) {
#pragma unroll
  for (int i = threadIdx.x; i < Slabs * Tokens * 8; i += Threads) {
    const int piece = i % 8, token = i / 8 % Tokens, slab = i / 8 / Tokens;
    const int64_t at = k0 + 64 * slab + 8 * piece;
    const bool inside = token < num_tokens && at < k;
    cp_async16(target + (slab * Tokens + token) * 128 + 16 * (piece ^ swizzle(token)),
               inside ? x + 2 * (token * k + at) : x, inside ? 16 : 0);
  }
}

}  // namespace quantgemm

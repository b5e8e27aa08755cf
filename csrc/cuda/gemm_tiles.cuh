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

// Tiles of rows × tokens of y; token tiles of the same rows follow each other. A chunk is a unit, but the
// last token tile may count for fewer, where its empty part takes no time. Fewer than 2^31 units, as y alone
// would be terabytes otherwise.
struct TileSchedule {
  uint32_t token_tiles, tiles, chunks;  // chunks of k in each tile
  uint32_t blocks, share, longer;       // units of a block; the first `longer` blocks have one more
  bool cut;                             // else blocks take whole tiles, in turn
  uint32_t last_units;                  // of a row's last tile

  TileSchedule(int64_t row_tiles, int64_t token_tiles, int64_t chunks, int64_t last_units, int64_t blocks,
               bool cut)
      : token_tiles(token_tiles),
        tiles(row_tiles * token_tiles),
        chunks(chunks),
        blocks(blocks),
        cut(cut),
        last_units(last_units) {
    const auto units = static_cast<uint32_t>(row_tiles * ((token_tiles - 1) * chunks + last_units));
    share = units / this->blocks;
    longer = units % this->blocks;
  }
  struct Place {
    uint32_t tile, at, units;  // a unit is number `at` of the tile's
    __device__ uint32_t chunk(uint32_t unit, uint32_t chunks) const {
      return units == chunks ? unit : static_cast<uint32_t>(uint64_t{unit} * chunks / units);
    }
  };
  __device__ Place place_of(uint32_t unit) const {
    const uint32_t row_units = (token_tiles - 1) * chunks + last_units, rest = unit % row_units;
    const uint32_t column = min(rest / chunks, token_tiles - 1);
    return {unit / row_units * token_tiles + column, rest - column * chunks,
            column + 1 < token_tiles ? chunks : last_units};
  }
  template <bool Uneven>  // whether last_units may be other than chunks
  __device__ uint32_t first_unit_of(uint32_t tile) const {
    if constexpr (!Uneven) return tile * chunks;
    return tile / token_tiles * ((token_tiles - 1) * chunks + last_units) + tile % token_tiles * chunks;
  }
  __device__ uint32_t first_unit(uint32_t block) const { return block * share + min(block, longer); }
  __device__ uint32_t block_of(uint32_t unit) const {
    const uint32_t in_longer = longer * (share + 1);
    return unit < in_longer ? unit / (share + 1) : longer + (unit - in_longer) / share;
  }
};

// Whole tiles if that keeps the multiprocessors busy: one per block, or as many blocks as there is room for
// at once if blocks overlap one tile's end with the next one's beginning (`lasting`). Else tiles are cut, and
// the last one of a row counts for last_units, if given.
inline TileSchedule schedule_tiles(int64_t row_tiles, int64_t token_tiles, int64_t chunks, int64_t resident,
                                   bool lasting = false, int64_t last_units = 0) {
  const int64_t tiles = row_tiles * token_tiles, waves = (tiles + resident - 1) / resident;
  const bool busy = 10 * tiles >= 9 * waves * resident;
  const int64_t cut_blocks = std::min(tiles * chunks, resident);
  const int64_t blocks = !busy ? cut_blocks : lasting ? std::min(tiles, resident) : tiles;
  const bool cut = !busy && tiles % blocks != 0;
  return {row_tiles, token_tiles, chunks, cut && last_units > 0 ? last_units : chunks, blocks, cut};
}

// Scratch memory of a schedule that cuts tiles: a counter per tile, then two partial tiles per block
// (of the tile that it finishes and of the one that it begins).
struct PartialTiles {
  uint32_t* arrivals;  // [tiles], zero at launch
  float* sums;         // [blocks, 2, tile elems]

  static int64_t counter_bytes(const TileSchedule& s) { return (int64_t{s.tiles} * 4 + 127) / 128 * 128; }
  static int64_t bytes(const TileSchedule& s, int64_t tile_elems) {
    return s.cut ? counter_bytes(s) + s.blocks * 2 * tile_elems * 4 : 0;
  }
  static PartialTiles at(void* scratch, const TileSchedule& s) {
    auto* bytes = static_cast<uint8_t*>(scratch);
    return {reinterpret_cast<uint32_t*>(bytes), reinterpret_cast<float*>(bytes + counter_bytes(s))};
  }
};

struct MmaProblem {
  bytes_ptr x, w;
  void* y;
  PartialTiles partial;
  TileSchedule schedule;
  int64_t m, n, k, row_bytes;
  Real type;  // of y
};

// `more` are further arguments of the kernel.
template <class Kernel, class... More>
cudaError_t launch_tiles(Kernel kernel, int threads, int shared_bytes, const GemmArgs& args,
                         int64_t row_bytes, const TileSchedule& schedule, cudaStream_t stream,
                         const More&... more) {
  MmaProblem problem{
      static_cast<bytes_ptr>(args.x), args.w, args.y, {}, schedule, args.m, args.n, args.k, row_bytes, {}};
  problem.type = args.type;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  if (schedule.cut) {
    problem.partial = PartialTiles::at(args.scratch, schedule);
    status = cudaMemsetAsync(problem.partial.arrivals, 0, schedule.tiles * 4, stream);
    if (status != cudaSuccess) return status;
  }
  kernel<<<static_cast<unsigned>(schedule.blocks), threads, shared_bytes, stream>>>(problem, more...);
  return cudaGetLastError();
}

// What a block does next: chunks [chunk0, chunk0 + chunks) of a tile. All its threads walk the same line:
//     for (TileWalk<L> at(p); at.next(p);)
// L names the tile's shape: kRows, kTokens, kChunk and kChunkBytes of a row; and kUneven, if its schedules
// are.
template <class L>
struct TileWalk {
  static constexpr bool kUneven = requires { L::kUneven; };
  uint32_t unit, end;  // still to do
  uint32_t tile, chunk0, chunks;
  int64_t row0, token0, k0;
  int last_row, num_tokens, num_k;

  __device__ __forceinline__ explicit TileWalk(const MmaProblem& p)
      : unit(p.schedule.cut ? p.schedule.first_unit(blockIdx.x) : blockIdx.x * p.schedule.chunks),
        end(p.schedule.cut ? p.schedule.first_unit(blockIdx.x + 1) : p.schedule.tiles * p.schedule.chunks) {}
  __device__ __forceinline__ bool next(const MmaProblem& p) {
    if (unit >= end) return false;
    if constexpr (kUneven) {
      const TileSchedule::Place place = p.schedule.place_of(unit);
      const uint32_t count = min(place.units - place.at, end - unit);
      tile = place.tile, chunk0 = place.chunk(place.at, p.schedule.chunks);
      chunks = place.chunk(place.at + count, p.schedule.chunks) - chunk0;
      unit += p.schedule.cut ? count : p.schedule.blocks * p.schedule.chunks;
    } else {
      tile = unit / p.schedule.chunks, chunk0 = unit % p.schedule.chunks;
      chunks = min(p.schedule.chunks - chunk0, end - unit);
      unit += p.schedule.cut ? chunks : p.schedule.blocks * p.schedule.chunks;
    }
    row0 = int64_t{tile / p.schedule.token_tiles} * L::kRows;
    token0 = int64_t{tile % p.schedule.token_tiles} * L::kTokens;
    k0 = int64_t{chunk0} * L::kChunk;
    last_row = static_cast<int>(min(p.n - 1 - row0, int64_t{L::kRows - 1}));
    num_tokens = static_cast<int>(min(p.m - token0, int64_t{L::kTokens}));
    num_k = static_cast<int>(min(p.k - k0, int64_t{chunks} * L::kChunk));
    return true;
  }
  __device__ bool is_part(const MmaProblem& p) const { return chunks < p.schedule.chunks; }
  __device__ __forceinline__ bytes_ptr weights(const MmaProblem& p) const {
    return p.w + row0 * p.row_bytes + chunk0 * int64_t{L::kChunkBytes};
  }
};

// The sums of a part of a tile go to scratch memory; the block that comes last adds all parts up and gets
// true. `thread` counts the Threads threads that hold sums and meet in sync().
template <int Threads, class L, int A, int B, class Sync>
__device__ __forceinline__ bool combine_parts(float (&sums)[A][B][4], const MmaProblem& p,
                                              const TileWalk<L>& at, int thread, Sync sync) {
  const auto slot_of = [&](uint32_t block, bool begins) {
    return reinterpret_cast<float4*>(p.partial.sums + (2 * int64_t{block} + begins) * (A * B * 4 * Threads)) +
           thread;
  };
  constexpr bool kUneven = TileWalk<L>::kUneven;
  const uint32_t first = p.schedule.block_of(p.schedule.template first_unit_of<kUneven>(at.tile));
  const uint32_t last = p.schedule.block_of(p.schedule.template first_unit_of<kUneven>(at.tile + 1) - 1);
  float4* out = slot_of(blockIdx.x, at.chunk0 == 0);
#pragma unroll
  for (int i = 0; i < A; ++i)
#pragma unroll
    for (int j = 0; j < B; ++j)
      out[(i * B + j) * Threads] = make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
  __shared__ bool is_last;
  __threadfence();  // the part is visible before the arrival is
  sync();
  if (thread == 0) is_last = atomicAdd(p.partial.arrivals + at.tile, 1u) == last - first;
  sync();
  const bool mine = is_last;
  if (!mine) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < A; ++i)
#pragma unroll
    for (int j = 0; j < B; ++j) sums[i][j][0] = sums[i][j][1] = sums[i][j][2] = sums[i][j][3] = 0;
  for (uint32_t block = first; block <= last; ++block) {
    const float4* in = slot_of(block, block == first);
#pragma unroll
    for (int i = 0; i < A; ++i)
#pragma unroll
      for (int j = 0; j < B; ++j) {
        const float4 v = __ldcg(in + (i * B + j) * Threads);
        sums[i][j][0] += v.x, sums[i][j][1] += v.y, sums[i][j][2] += v.z, sums[i][j][3] += v.w;
      }
  }
  return true;
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
  static constexpr int kStep = Threads / 8, kCopies = Tokens / kStep;  // tokens at once; how often
  static_assert(Tokens % kStep == 0 && kStep % 4 == 0);

  bytes_ptr x;                // the thread's first piece
  uint32_t offsets[kCopies];  // bytes to that of each of its tokens, at most the last; gemm_obstacle limits k
  uint32_t place;             // in shared memory

  __device__ __forceinline__ TokenStager(bytes_ptr tile, int64_t k, int num_tokens, int thread)
      : x(tile + 16 * (thread % 8)), place(128 * (thread / 8) + 16 * (thread % 8 ^ swizzle(thread / 8))) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      offsets[i] = 2 * static_cast<uint32_t>(k) * min(thread / 8 + i * kStep, num_tokens - 1);
  }
  // From k0 on, num_values values; none if that is not positive.
  __device__ __forceinline__ void operator()(uint32_t target, int k0, int num_values, int thread) const {
    const bool behind = 8 * (thread % 8) >= num_values;
    bytes_ptr source = x + (behind ? 0 : 2 * int64_t{k0});
    keep_in_register(source);
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      cp_async16_if(num_values > 0, target + place + i * kStep * 128, source + offsets[i], behind);
  }
};

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// Prune, fit and pack in one pass over x: a thread block owns 64 tokens of one head.
//
//   two lanes per token   the keep-th largest magnitude, bit by bit over bit planes; what is below is zero
//   all threads           bitmaps and extremes of the tiles, two values at a time; scales and zeros
//   one thread per tile   codes, from one set element to the next, into shared memory
//   one warp              where the block's words begin: the totals of the blocks before it, as far back
//                         as the nearest one that knows its own beginning
#include "launch.h"
#include "ptx.cuh"
#include "sparse_kv_compress.cuh"
#include "sparse_kv_prune.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 2 * kTile;

// What a block has published: nothing, its number of words, or also those of all blocks before it.
enum State : uint32_t { kNothing, kTotal, kSum };
struct Scratch {
  unsigned long long state[1];  // [heads · blocks]: State in the upper half, words in the lower
};

__device__ __forceinline__ void publish(unsigned long long* at, State state, int words) {
  atomicExch(at, static_cast<unsigned long long>(state) << 32 | static_cast<uint32_t>(words));
}

// Words of all blocks before this one, which has published its own. By one warp. Blocks start in the order of
// their numbers (as the scans of NVIDIA's CUB rely on too): those that a block waits for have started.
__device__ int words_before(Scratch* scratch, int64_t index, int total, int lane) {
  int sum = 0;
  for (int64_t first = index - 1; first >= 0; first -= 32) {
    const int64_t other = first - lane;
    unsigned long long seen = static_cast<unsigned long long>(kSum) << 32;
    do {
      if (other >= 0) seen = *static_cast<volatile unsigned long long*>(scratch->state + other);
    } while (__any_sync(~0u, seen >> 32 == kNothing));
    const uint32_t sums = __ballot_sync(~0u, seen >> 32 == kSum);
    const int last = sums ? __ffs(sums) - 1 : 31;
    sum += __reduce_add_sync(~0u, lane <= last ? static_cast<int>(seen) : 0);
    if (sums) break;
  }
  if (lane == 0 && index > 0) publish(scratch->state + index, kSum, sum + total);
  return sum;
}

template <class Real16, int Channels>
struct CompressBlock {
  static constexpr int kStride = Channels + 4;            // 8 bytes of 16 tokens lie in all banks
  static constexpr int kParts = 2 * kThreads / Channels;  // of a pair of key tiles, one per thread
  static constexpr int kEach = Channels < kThreads ? 1 : Channels / kThreads;  // tiles of a thread
  static constexpr int kWords = Channels * kTile * 4 / 32;                     // of codes, at most
  alignas(16) uint16_t x[(kTile + 3) * kStride];  // [64, Channels], pruned; pack may read three more
  union {
    struct {
      uint64_t bitmaps[Channels];
      PairScan<Real16> parts[kParts][Channels / 2];
    };
    uint32_t words[kWords];
  };
  int sums[kThreads / 32];
  int begin;

  // Where a warp's 16 tokens are until they are pruned, within those of x: vector i of a token lies at
  // i ^ 2 · (token % 4), so that lanes with the same vector of four tokens use other banks.
  static constexpr int kVectors = Channels / 8, kEachOwn = kVectors / 2;  // of a token, of a thread
  __device__ __forceinline__ uint4* raw(int warp) const {
    return reinterpret_cast<uint4*>(const_cast<uint16_t*>(x) + warp * 16 * kStride);
  }
  // Copies them, as neighbours of other lanes'; what is behind the first `rows` becomes zero.
  __device__ __forceinline__ void copy_tokens(const uint4* from, int rows, int warp, int lane) {
    constexpr int kRows = 32 / kVectors;  // at once
    const int row = lane / kVectors, place = lane ^ row * 2;
    const auto to = [&](int j) { return shared_address(raw(warp) + (place ^ j * kRows % 4 * 2) + 32 * j); };
    if (rows >= 16) {
      const uint4* own = from + lane;
      asm("" : "+l"(own));  // as if it were any pointer: else each address is made by itself
#pragma unroll
      for (int j = 0; j < kEachOwn; ++j) cp_async16(to(j), own + 32 * j);
    } else {
#pragma unroll 1
      for (int j = 0; j < kEachOwn; ++j) {
        const bool is_there = row + j * kRows < rows;
        cp_async16(to(j), from + (is_there ? lane + 32 * j : 0), is_there ? 16 : 0);
      }
    }
    cp_async_commit();
  }
  // This lane's half of its token.
  __device__ __forceinline__ void take_token(uint32_t (&pairs)[4 * kEachOwn], int warp, int lane) const {
    const uint4* token = raw(warp) + lane / 2 * kVectors + lane % 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = i; j < kEachOwn; j += 4) {
        const uint4 v = (token + (2 * i ^ lane / 2 % 4 * 2))[2 * (j - i)];
        pairs[4 * j] = v.x, pairs[4 * j + 1] = v.y, pairs[4 * j + 2] = v.z, pairs[4 * j + 3] = v.w;
      }
  }

  // What a thread knows of its tiles, thread + n · kThreads.
  struct Tile {
    uint64_t bitmap;
    TileFit<Real16> fit;
    int before;  // words of the tiles before, in this block
  };

  // Threads in step: tile by tile, values side by side in pairs.
  __device__ __forceinline__ void scan_values(const KvCompressArgs& args, int64_t first_tile, int thread,
                                              bool has_nans, Tile (&tiles)[kEach]) {
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int tile = thread + n * kThreads;
      if (tile >= Channels) break;
      const auto* from = reinterpret_cast<const uint2*>(x + tile % kTile * kStride + tile / kTile * kTile);
      PairScan<Real16> scan;
      uint32_t bits[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
          const uint2 v = from[8 * h + i / 2];
          bits[h] |= scan.add(v.x) & 0x80008000u >> i;
          bits[h] |= scan.add(v.y) & 0x80008000u >> (i + 1);
        }
        bits[h] = interleave_halves(bits[h]);
      }
      finish(args, first_tile, tile, uint64_t{bits[0]} << 32 | bits[1],
             fminf(half_of(scan.lo, 0), half_of(scan.lo, 1)), fmaxf(half_of(scan.hi, 0), half_of(scan.hi, 1)),
             has_nans && has_nan<Real16>(reinterpret_cast<const uint16_t*>(from), 1), tiles[n]);
    }
  }

  // Threads in step: the same tokens of two channels side by side, and then tile by tile.
  __device__ __forceinline__ void scan_keys(const KvCompressArgs& args, int64_t first_tile, int thread,
                                            bool has_nans, Tile (&tiles)[kEach]) {
    constexpr int kTokens = kTile / kParts;
    const int pair = thread % (Channels / 2), part = thread / (Channels / 2);
    PairScan<Real16> scan;
#pragma unroll
    for (int first = 0; first < kTokens; first += 16) {
      uint32_t both = 0;
      const uint16_t* from = x + (part * kTokens + first) * kStride + 2 * pair;
#pragma unroll
      for (int i = 0; i < 16; ++i)
        both |= scan.add(*reinterpret_cast<const uint32_t*>(from + i * kStride)) & 0x80008000u >> i;
      // The first token is the highest bit, in the last of the bitmap's pieces.
      const int at = kTile / 16 - 1 - (part * kTokens + first) / 16;
      reinterpret_cast<uint16_t*>(bitmaps + 2 * pair)[at] = static_cast<uint16_t>(both);
      reinterpret_cast<uint16_t*>(bitmaps + 2 * pair + 1)[at] = static_cast<uint16_t>(both >> 16);
    }
    parts[part][pair] = scan;
    __syncthreads();  // bitmaps and parts
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int tile = thread + n * kThreads;
      if (tile >= Channels) break;
      float lo = bit_cast<float>(0x7fffffffu), hi = lo;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const PairScan<Real16>& own = parts[i][tile / 2];
        lo = fminf(lo, half_of(own.lo, tile % 2)), hi = fmaxf(hi, half_of(own.hi, tile % 2));
      }
      finish(args, first_tile, tile, bitmaps[tile], lo, hi, has_nans && has_nan<Real16>(x + tile, kStride),
             tiles[n]);
    }
  }

  static __device__ __forceinline__ float half_of(uint32_t pair, int i) {
    return value_of(Real16{static_cast<uint16_t>(pair >> (16 * i))});
  }

  __device__ __forceinline__ void finish(const KvCompressArgs& args, int64_t first_tile, int tile,
                                         uint64_t bitmap, float lo, float hi, bool is_nan, Tile& own) {
    if (bitmap == 0) lo = hi = 0.0f;
    if (is_nan) lo = hi = bit_cast<float>(0x7fc00000u);
    own.bitmap = bitmap;
    args.bitmaps[first_tile + tile] = bitmap;
    if (args.bits == kRawBits) return;
    own.fit = fit_tile<Real16>(lo, hi, args.bits);
    static_cast<Real16*>(args.scales)[first_tile + tile] = own.fit.scale;
    static_cast<Real16*>(args.zeros)[first_tile + tile] = own.fit.zero;
  }

  // Where the words of tiles begin in the block; all of them.
  __device__ __forceinline__ int place(Tile (&tiles)[kEach], int bits, int thread) {
    int total = 0;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int count = static_cast<int>(tile_words(__popcll(tiles[n].bitmap), bits));
      int until = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, until, step);
        if (thread % 32 >= step) until += other;
      }
      if (n > 0) __syncthreads();  // sums have been read
      if (thread % 32 == 31) sums[thread / 32] = until;
      __syncthreads();  // sums
      int at = total + until - count;
#pragma unroll
      for (int w = 0; w < kThreads / 32; ++w) {
        if (w < thread / 32) at += sums[w];
        total += sums[w];
      }
      tiles[n].before = at;
    }
    return total;
  }
};

template <class Real16, int Channels>
__global__ void __launch_bounds__(kThreads) compress_kernel(KvCompressArgs args) {
  using Block = CompressBlock<Real16, Channels>;
  __shared__ alignas(16) uint8_t room[sizeof(Block)];
  Block& block = *reinterpret_cast<Block*>(room);
  auto* scratch = static_cast<Scratch*>(args.scratch);
  const int thread = static_cast<int>(threadIdx.x % kThreads), lane = thread % 32;
  const int64_t index = blockIdx.x, blocks = static_cast<uint32_t>(args.tokens + kTile - 1) / kTile;
  const int64_t head = blockIdx.x / static_cast<uint32_t>(blocks);  // as a grid is
  const int64_t first = (blockIdx.x - static_cast<uint32_t>(head * blocks)) * kTile;
  bool has_nans = args.keep >= Channels;  // perhaps
  {
    constexpr int kWords = Channels / 4;
    const int warp = thread / 32, token = thread / 2, half = thread % 2;
    const int64_t left = args.keep > 0 ? args.tokens - first : 0;
    const int rows = static_cast<int>(left < kTile ? left : kTile) - warp * 16;
    const int64_t row_of_warp = head * args.tokens + (rows > 0 ? first + warp * 16 : 0);
    block.copy_tokens(static_cast<const uint4*>(args.x) + row_of_warp * Block::kVectors, rows, warp, lane);
    cp_async_wait<0>();
    __syncwarp();  // tokens
    uint32_t pairs[kWords];
    block.take_token(pairs, warp, lane);
    __syncwarp();  // they have been read
    Pruning<kWords> pruning;
    if (args.keep > 0 && args.keep < Channels) {
      pruning.find(pairs, static_cast<int>(args.keep));
      pruning.keep_largest(pairs);
      has_nans = pruning.has_largest;
    }
    uint16_t* row = block.x + token * Block::kStride;
#pragma unroll
    for (int i = 0; i < kWords; i += 2)
      *reinterpret_cast<uint2*>(row + (i / 4 * 2 + half) * 8 + i % 4 * 2) =
          make_uint2(pairs[i], pairs[i + 1]);
    pruning.drop_excess(row, half);
  }
  has_nans = __syncthreads_or(has_nans);  // x: tiles are read across tokens

  const int64_t first_tile = index * Channels;
  typename Block::Tile tiles[Block::kEach] = {};
  if (args.is_value)
    block.scan_values(args, first_tile, thread, has_nans, tiles);
  else
    block.scan_keys(args, first_tile, thread, has_nans, tiles);
  const int total = block.place(tiles, args.bits, thread);  // parts and bitmaps have been read
  if (thread == 0) publish(scratch->state + index, index == 0 ? kSum : kTotal, total);

  const auto each_tile = [&](auto&& f) {
#pragma unroll
    for (int n = 0; n < Block::kEach; ++n) {
      const int tile = thread + n * kThreads;
      if (tile >= Channels) break;
      f(tile, tiles[n],
        block.x + (args.is_value ? tile % kTile * Block::kStride + tile / kTile * kTile : tile));
    }
  };
  const auto pack_tile = [&]<int Each>(const uint16_t* from, uint64_t bitmap, int bits, uint32_t* to,
                                       auto&& code_of_value) {
    if (!is_close(bitmap))
      pack<Real16, Each>(from, args.is_value ? 1 : Block::kStride, bitmap, bits, to, code_of_value);
    else if (args.is_value)
      pack_close<Real16, Each, 1>(from, bitmap, bits, to, code_of_value);
    else
      pack_close<Real16, Each, Block::kStride>(from, bitmap, bits, to, code_of_value);
  };
  if (args.bits != kRawBits)
    each_tile([&](int, const typename Block::Tile& tile, const uint16_t* from) {
      const Coder<Real16> coder(tile.fit, args.bits);
      uint32_t* to = block.words + tile.before;
      if (coder.is_plain)
        pack_tile.template operator()<4>(from, tile.bitmap, args.bits, to,
                                         [&](Real16 v) { return coder.plain_code(v); });
      else
        pack<Real16, 4>(from, args.is_value ? 1 : Block::kStride, tile.bitmap, args.bits, to,
                        [&](Real16 v) { return coder.code(v); });
    });
  if (thread < 32) {
    const int base = words_before(scratch, index, total, lane);
    if (lane == 0) block.begin = base;
    if (lane == 0 && index == gridDim.x - 1) *args.num_words = static_cast<int64_t>(base) + total;
  }
  __syncthreads();  // words and begin
  const int64_t begin = block.begin;
  each_tile([&](int n, const typename Block::Tile& tile, const uint16_t* from) {
    args.offsets[first_tile + n] = static_cast<int>(begin) + tile.before;
    if (args.bits == kRawBits)
      pack_tile.template operator()<2>(from, tile.bitmap, kRawBits, args.packed + begin + tile.before,
                                       [](Real16 stored) { return uint32_t{stored.bits}; });
  });
  if (args.bits != kRawBits)
    for (int i = thread; i < total; i += kThreads) args.packed[begin + i] = block.words[i];
  // The room that nothing is packed into: what this block has not used of its own is zeroed from the end.
  // That is little, unless x is mostly zeros; one warp does it.
  if (thread < kThreads - 32) return;
  const auto room_until = [&](int64_t tokens, int64_t tiles) {
    return (tokens * args.keep * args.bits >> 5) + (args.keep == 0 ? 0 : tiles);
  };
  const int64_t until = first + kTile < args.tokens ? first + kTile : args.tokens,
                tile = first / kTile * Channels;
  const int64_t heads = head * room_until(args.tokens, blocks * Channels);
  const int64_t from = index == gridDim.x - 1
                           ? begin + total
                           : args.room - (heads + room_until(until, tile + Channels) - begin - total);
  const int64_t to = args.room - (heads + room_until(first, tile) - begin);
  for (int64_t i = from + lane; i < to; i += 32) args.packed[i] = 0;
}

int64_t blocks_of(const KvCompressArgs& args) { return args.heads * ((args.tokens + kTile - 1) / kTile); }

}  // namespace

int64_t sparse_kv_compress_scratch_bytes(const KvCompressArgs& args) {
  return static_cast<int64_t>(sizeof(Scratch)) + 8 * blocks_of(args);
}

cudaError_t launch_sparse_kv_compress(const KvCompressArgs& args, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(blocks_of(args));
  if (grid == 0) return cudaMemsetAsync(args.num_words, 0, sizeof *args.num_words, stream);
  const auto scratch_bytes = static_cast<size_t>(sparse_kv_compress_scratch_bytes(args));
  const cudaError_t status = cudaMemsetAsync(args.scratch, 0, scratch_bytes, stream);
  if (status != cudaSuccess) return status;
  const auto launch = [&](auto real, auto channels) {
    compress_kernel<decltype(real), channels.value><<<grid, kThreads, 0, stream>>>(args);
  };
  const auto launch_any = [&](auto real) {
    if (args.channels == 64) launch(real, std::integral_constant<int, 64>{});
    if (args.channels == 128) launch(real, std::integral_constant<int, 128>{});
    if (args.channels == 256) launch(real, std::integral_constant<int, 256>{});
  };
  args.type == Real::kFloat16 ? launch_any(Half{}) : launch_any(BFloat16{});
  return cudaGetLastError();
}

}  // namespace quantgemm

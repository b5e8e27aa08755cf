// SPDX-License-Identifier: MIT
// Prune, fit and pack in one pass over x: a thread block owns 64 tokens of one head.
//
//   two lanes per token   the keep-th largest magnitude, bit by bit over bit planes; what is below is zero
//   all threads           bitmaps and extremes of the tiles, two values at a time; scales and zeros
//   one thread per tile   codes, from one set element to the next, into shared memory
//   one warp              where the block's words begin: the totals of the blocks before it, as far back
//                         as the nearest one that knows its own beginning
#include <algorithm>
#include <cstddef>

#include "dependent_launch.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "sparse_kv_compress.cuh"
#include "sparse_kv_prune.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 2 * kTile;
// Of a multiprocessor, as registers allow without spills.
template <int Channels>
constexpr int kBlocksOf = Channels == 256 ? 5 : 10;

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
  static constexpr int kStride = Channels + 8;            // 16 bytes of 8 tokens lie in all banks
  static constexpr int kParts = 2 * kThreads / Channels;  // of a pair of key tiles, one per thread
  static constexpr int kEach = Channels < kThreads ? 1 : Channels / kThreads;  // tiles of a thread
  alignas(16) uint16_t x[kTile * kStride];  // [64, Channels]; pack may read three rows more
  uint32_t limits[kTile];                   // of tokens: the smallest magnitude that stays, in both halves
  int sums[kThreads / 32];
  int begin;
  union {
    struct {
      uint64_t bitmaps[Channels];
      PairScan<Real16> parts[kParts][Channels / 2];
    };
    uint32_t words[1];  // as many as the launch has room for: those of all tiles
  };

  // A token's vectors of eight channels: four to its first lane, four to its second one, and so on.
  static constexpr int kVectors = Channels / 8, kEachOwn = kVectors / 2;  // of a token, of a thread

  // Copies a warp's 16 tokens, as neighbours of other lanes'; what is behind the first `rows` becomes zero.
  __device__ __forceinline__ void copy_tokens(const uint4* from, int rows, int warp, int lane) {
    constexpr int kRows = 32 / kVectors;  // at once
    const int row = lane / kVectors;
    const uint32_t to = shared_address(x + (warp * 16 + row) * kStride + lane % kVectors * 8);
    if (rows >= 16) {
      const uint4* own = from + lane;
      asm("" : "+l"(own));  // as if it were any pointer: else each address is made by itself
#pragma unroll
      for (int j = 0; j < kEachOwn; ++j) cp_async16(to + 2 * kStride * kRows * j, own + 32 * j);
    } else {
#pragma unroll 1
      for (int j = 0; j < kEachOwn; ++j) {
        const bool is_there = row + j * kRows < rows;
        cp_async16(to + 2 * kStride * kRows * j, from + (is_there ? lane + 32 * j : 0), is_there ? 16 : 0);
      }
    }
    cp_async_commit();
  }
  // This lane's half of its token.
  __device__ __forceinline__ void take_token(uint32_t (&pairs)[4 * kEachOwn], int token, int half) const {
    const auto* own = reinterpret_cast<const uint4*>(x + token * kStride) + 4 * half;
#pragma unroll
    for (int j = 0; j < kEachOwn; ++j) {
      const uint4 v = own[j % 4 + j / 4 * 8];
      pairs[4 * j] = v.x, pairs[4 * j + 1] = v.y, pairs[4 * j + 2] = v.z, pairs[4 * j + 3] = v.w;
    }
  }
  // The channel of the lower half of one of those words.
  static __device__ __forceinline__ int channel_of(int word, int half) {
    return word / 16 * 64 + half * 32 + word % 16 * 2;
  }

  // What a thread knows of its tiles, thread + n · kThreads.
  struct Tile {
    uint64_t bitmap;
    TileFit<Real16> fit;
    int before;  // words of the tiles before, in this block
  };
  struct Scan {
    uint64_t bitmap;
    float lo, hi;  // NaN if nothing is set, or NaN is
  };

  // Values, threads in step: those of a tile side by side in pairs.
  __device__ __forceinline__ Scan scan_value(int tile) const {
    const auto* from = reinterpret_cast<const uint4*>(x + tile % kTile * kStride + tile / kTile * kTile);
    const uint32_t limit = limits[tile % kTile];
    PairScan<Real16> scan;
    uint32_t bits[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const uint4 v = from[4 * h + i / 4];
        const uint32_t first = (i < 8 ? 0x80008000u : 0x40004000u) >> i % 8 * 2;
        bits[h] |= ~scan.add(v.x, limit) & first, bits[h] |= ~scan.add(v.y, limit) & first >> 2;
        bits[h] |= ~scan.add(v.z, limit) & first >> 4, bits[h] |= ~scan.add(v.w, limit) & first >> 6;
      }
      bits[h] = in_order(bits[h]);
    }
    return {uint64_t{bits[0]} << 32 | bits[1], fminf(half_of(scan.lo, 0), half_of(scan.lo, 1)),
            fmaxf(half_of(scan.hi, 0), half_of(scan.hi, 1))};
  }

  // Keys, threads in step: the same tokens of two channels side by side, and then, behind a barrier, tile by tile.
  __device__ __forceinline__ void scan_keys(int thread) {
    constexpr int kTokens = kTile / kParts;
    const int pair = thread % (Channels / 2), part = thread / (Channels / 2);
    PairScan<Real16> scan;
#pragma unroll
    for (int first = 0; first < kTokens; first += 16) {
      uint32_t both = 0;
      const uint16_t* from = x + (part * kTokens + first) * kStride + 2 * pair;
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const uint4 limit = *reinterpret_cast<const uint4*>(limits + part * kTokens + first + i);
        const auto add = [&](int j, uint32_t limit_of_token) {
          const uint32_t values = *reinterpret_cast<const uint32_t*>(from + (i + j) * kStride);
          both |= ~scan.add(values, limit_of_token) & 0x80008000u >> (i + j);
        };
        add(0, limit.x), add(1, limit.y), add(2, limit.z), add(3, limit.w);
      }
      // The first token is the highest bit, in the last of the bitmap's pieces.
      const int at = kTile / 16 - 1 - (part * kTokens + first) / 16;
      reinterpret_cast<uint16_t*>(bitmaps + 2 * pair)[at] = static_cast<uint16_t>(both);
      reinterpret_cast<uint16_t*>(bitmaps + 2 * pair + 1)[at] = static_cast<uint16_t>(both >> 16);
    }
    parts[part][pair] = scan;
  }
  __device__ __forceinline__ Scan scan_key(int tile) const {
    float lo = bit_cast<float>(0x7fffffffu), hi = lo;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const PairScan<Real16>& own = parts[i][tile / 2];
      lo = fminf(lo, half_of(own.lo, tile % 2)), hi = fmaxf(hi, half_of(own.hi, tile % 2));
    }
    return {bitmaps[tile], lo, hi};
  }
  static __device__ __forceinline__ float half_of(uint32_t pair, int i) {
    return value_of(Real16{static_cast<uint16_t>(pair >> (16 * i))});
  }

  // Either, whatever the values are, one by one.
  static __device__ __noinline__ Scan scan_any(const uint16_t* from, int step, const uint32_t* limit,
                                               int limit_step) {
    Scan scan = {0, bit_cast<float>(0x7fffffffu), bit_cast<float>(0x7fffffffu)};
    bool is_nan = false;
#pragma unroll 1
    for (int i = 0; i < kTile; ++i, from += step, limit += limit_step) {
      const float value = value_of(Real16{*from});
      const bool is_set = magnitude_key(*from) >= (*limit & 0xffffu);
      scan.bitmap = scan.bitmap << 1 | is_set;
      if (!is_set) continue;
      scan.lo = fminf(scan.lo, value), scan.hi = fmaxf(scan.hi, value), is_nan |= value != value;
    }
    if (is_nan) scan.lo = scan.hi = bit_cast<float>(0x7fffffffu);
    return scan;
  }

  // By all threads.
  __device__ __forceinline__ void scan(const KvCompressArgs& args, int64_t first_tile, int thread, bool is_special,
                                       Tile (&tiles)[kEach]) {
    if (!is_special && !args.is_value) {
      scan_keys(thread);
      __syncthreads();  // bitmaps and parts
    }
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int tile = thread + n * kThreads, token = tile % kTile;
      if (tile >= Channels) break;
      Scan own;
      if (is_special)
        own = args.is_value ? scan_any(x + token * kStride + tile / kTile * kTile, 1, limits + token, 0)
                            : scan_any(x + tile, kStride, limits, 1);
      else
        own = args.is_value ? scan_value(tile) : scan_key(tile);
      if (own.bitmap == 0) own.lo = own.hi = 0.0f;
      tiles[n].bitmap = own.bitmap;
      args.bitmaps[first_tile + tile] = own.bitmap;
      if (args.bits == kRawBits) continue;
      const TileFit<Real16> fit = tiles[n].fit = fit_tile<Real16>(own.lo, own.hi, args.bits);
      static_cast<Real16*>(args.scales)[first_tile + tile] = fit.scale;
      static_cast<Real16*>(args.zeros)[first_tile + tile] = fit.zero;
    }
  }

  // Where the words of tiles begin in the block; all of them.
  __device__ __forceinline__ int place(Tile (&tiles)[kEach], int bits, int thread) {
    int total = 0;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int count = (__popcll(tiles[n].bitmap) * bits + 31) >> 5;
      int until = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2)  // the shuffle says whether there is such a lane. PTX ISA 9.7.9.6
        asm("{ .reg .pred is_there; .reg .b32 other; shfl.sync.up.b32 other|is_there, %0, %1, 0, -1;"
            " @is_there add.s32 %0, %0, other; }"
            : "+r"(until)
            : "r"(step));
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

// Before the kernel that looks at them, which may be set up meanwhile.
__global__ void clear_states_kernel(Scratch* scratch, unsigned blocks) {
  let_next_kernel_start();
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i < blocks) scratch->state[i] = 0;
}

// What a launch knows of the numbers of blocks and words.
struct Plan {
  uint32_t blocks, inverse;  // of a head, and 2^32 through it, rounded down (or what is nearest to that)
  int64_t head_room;         // words of a head in `packed` at most,
  int block_room;            // of a block of 64 tokens
  explicit Plan(const KvCompressArgs& args)
      : blocks(static_cast<uint32_t>((args.tokens + kTile - 1) / kTile)),
        inverse(static_cast<uint32_t>(std::min<uint64_t>(~0u, (uint64_t{1} << 32) / blocks))),
        head_room(args.keep == 0 ? 0 : (args.tokens * args.keep * args.bits >> 5) + blocks * args.channels),
        block_room(args.keep == 0 ? 0 : static_cast<int>(kTile * args.keep * args.bits / 32 + args.channels)) {}
};

template <class Real16, int Channels>
__global__ void __launch_bounds__(kThreads, kBlocksOf<Channels>) compress_kernel(KvCompressArgs args, Plan plan) {
  using Block = CompressBlock<Real16, Channels>;
  extern __shared__ uint4 room[];
  Block& block = *reinterpret_cast<Block*>(room);
  auto* scratch = static_cast<Scratch*>(args.scratch);
  const int thread = static_cast<int>(threadIdx.x % kThreads), lane = thread % 32;
  const int64_t index = blockIdx.x;
  uint32_t head = __umulhi(blockIdx.x, plan.inverse), block_of_head = blockIdx.x - head * plan.blocks;
  if (block_of_head >= plan.blocks) ++head, block_of_head -= plan.blocks;  // the product is at most one less
  const int64_t first = static_cast<int64_t>(block_of_head) * kTile;
  bool is_special;
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
    block.take_token(pairs, token, half);
    Pruning<kWords> pruning;
    if (args.keep > 0 && args.keep < Channels) {
      pruning.find(pairs, static_cast<int>(args.keep));
      __syncwarp();  // they have been read
      pruning.drop_excess(block.x + token * Block::kStride,
                          [&](int word) { return Block::channel_of(word, half); });
    } else {
      pruning.look_for_largest(pairs);
    }
    is_special = pruning.has_largest;
    if (half == 0) block.limits[token] = max(pruning.cutoff, 1u) * 0x10001u;  // zeros never stay
  }
  is_special = __syncthreads_or(is_special);  // x and limits: tiles are read across tokens

  const int64_t first_tile = index * Channels;
  typename Block::Tile tiles[Block::kEach];
  block.scan(args, first_tile, thread, is_special, tiles);
  const int total = block.place(tiles, args.bits, thread);  // parts and bitmaps have been read
  if (thread < 32) wait_for_previous_kernel();              // states are clear
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
  each_tile([&](int, const typename Block::Tile& tile, const uint16_t* from) {
    uint32_t* to = block.words + tile.before;
    if (args.bits == kRawBits)
      return pack_tile.template operator()<2>(from, tile.bitmap, kRawBits, to,
                                              [](Real16 stored) { return uint32_t{stored.bits}; });
    const Coder<Real16> coder(tile.fit, args.bits);
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
  each_tile([&](int n, const typename Block::Tile& tile, const uint16_t*) {
    args.offsets[first_tile + n] = static_cast<int>(begin) + tile.before;
  });
  for (int i = thread; i < total; i += kThreads) args.packed[begin + i] = block.words[i];
  // The room that nothing is packed into: what this block has not used of its own is zeroed from the end.
  // That is little, unless x is mostly zeros; one warp does it.
  if (thread < kThreads - 32) return;
  const int64_t start = head * plan.head_room + static_cast<int64_t>(block_of_head) * plan.block_room;
  const int64_t end = block_of_head == plan.blocks - 1 ? (head + 1) * plan.head_room : start + plan.block_room;
  const int64_t from = index == gridDim.x - 1 ? begin + total : args.room - (end - begin - total);
  const int64_t to = args.room - (start - begin);
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
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  clear_states_kernel<<<(grid + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
      static_cast<Scratch*>(args.scratch), grid);
  status = cudaGetLastError();
  const auto launch = [&](auto real, auto channels) {
    using Block = CompressBlock<decltype(real), channels.value>;
    // Words of a block's tiles: as many bits as are kept, each tile's last word perhaps all but empty.
    const auto most = [&](int64_t kept) { return static_cast<int>(kTile * kept * args.bits / 32); };
    const int words = std::min(most(channels.value), most(args.keep) + channels.value);
    const int bytes = std::max(static_cast<int>(sizeof(Block)),
                               static_cast<int>(offsetof(Block, words)) + words * 4);
    const auto kernel = compress_kernel<decltype(real), channels.value>;
    if (bytes > 48 << 10 && status == cudaSuccess)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return;
    const DependentLaunch follow(grid, kThreads, device, stream, bytes);
    status = cudaLaunchKernelEx(&follow.config, kernel, args, Plan(args));
  };
  const auto launch_any = [&](auto real) {
    if (args.channels == 64) launch(real, std::integral_constant<int, 64>{});
    if (args.channels == 128) launch(real, std::integral_constant<int, 128>{});
    if (args.channels == 256) launch(real, std::integral_constant<int, 256>{});
  };
  args.type == Real::kFloat16 ? launch_any(Half{}) : launch_any(BFloat16{});
  return status;
}

}  // namespace quantgemm

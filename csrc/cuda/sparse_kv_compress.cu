// SPDX-License-Identifier: MIT
// Prune, fit and pack in one pass over x: a thread block owns 64 tokens of one head.
//
//   two lanes per token   the keep-th largest magnitude, bit by bit over bit planes: what is below is zero
//   all threads           bitmaps and extremes of the tiles, two values at a time; scales and zeros
//   one thread per tile   codes, from one set element to the next, into shared memory
//   one warp              where the block's words begin: the totals of the blocks before it, as far back
//                         as the nearest one that knows its own beginning
#include <algorithm>
#include <cstddef>

#include "dependent_launch.cuh"
#include "launch.h"
#include "sparse_kv_compress_block.cuh"
#include "sparse_kv_prune.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = kCompressThreads;
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

// Before the kernel that looks at them, which may be set up meanwhile.
__global__ void clear_states_kernel(Scratch* scratch, unsigned blocks) {
  let_next_kernel_start();
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i < blocks) scratch->state[i] = 0;
}

// What a launch knows of the numbers of blocks and words.
struct Plan {
  uint32_t blocks, inverse;  // of a head, and 2^32 through it, rounded down (or what is nearest to that)
  int64_t head_room;         // of a head in `packed`: words
  int block_room;            // of a block of 64 tokens
  explicit Plan(const KvCompressArgs& args)
      : blocks(static_cast<uint32_t>((args.tokens + kTile - 1) / kTile)),
        inverse(static_cast<uint32_t>(std::min<uint64_t>(~0u, (uint64_t{1} << 32) / blocks))),
        head_room(args.keep == 0 ? 0 : (args.tokens * args.keep * args.bits >> 5) + blocks * args.channels),
        block_room(args.keep == 0 ? 0
                                  : static_cast<int>(kTile * args.keep * args.bits / 32 + args.channels)) {}
};

template <class Real16, int Channels>
__global__ void __launch_bounds__(kThreads, kBlocksOf<Channels>)
    compress_kernel(KvCompressArgs args, Plan plan) {
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
  typename Block::Tile tiles[Block::kEach] = {};
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
  const int64_t end =
      block_of_head == plan.blocks - 1 ? (head + 1) * plan.head_room : start + plan.block_room;
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
    const int bytes =
        std::max(static_cast<int>(sizeof(Block)), static_cast<int>(offsetof(Block, words)) + words * 4);
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

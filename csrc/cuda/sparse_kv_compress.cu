// SPDX-License-Identifier: MIT
// Prune, fit and pack in one pass over x: a thread block owns 64 tokens of one head.
//
//   two lanes per token   the keep-th largest magnitude, bit by bit over bit planes; what is below is zero
//   all threads           bitmaps and extremes of the tiles, two values at a time; scales and zeros
//   one thread per tile   codes, from one set element to the next, into shared memory
//   one warp              where the block's words begin: the totals of the blocks before it, as far back
//                         as the nearest one that knows its own beginning
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kv.h"
#include "launch.h"
#include "memory.cuh"
#include "sparse_kv_prune.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 2 * kTile;

// What a block has published: nothing, its number of words, or also those of all blocks before it.
enum State : uint32_t { kNothing, kTotal, kSum };
struct Scratch {
  unsigned long long ticket;    // blocks take their turn in the order in which they start
  unsigned long long state[1];  // [heads · blocks]: State in the upper half, words in the lower
};

__device__ __forceinline__ void publish(unsigned long long* at, State state, int words) {
  atomicExch(at, static_cast<unsigned long long>(state) << 32 | static_cast<uint32_t>(words));
}

// Words of all blocks before this one, which has published its own. By one warp; a block waits only for
// blocks that have started.
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

template <class Real16>
using Pair = std::conditional_t<std::is_same_v<Real16, Half>, __half2, __nv_bfloat162>;

// Two tiles' values, or two values of a tile, side by side: what is set, and the extremes of that.
template <class Real16>
struct PairScan {
  // Not a number: as an operand of minimum and maximum it yields to the other one.
  uint32_t lo = ~0u, hi = ~0u, finite = 0;

  // The halves of the mask say which values are set.
  __device__ __forceinline__ uint32_t add(uint32_t values) {
    using P = Pair<Real16>;
    const uint32_t mask = __hneu2_mask(bit_cast<P>(values), bit_cast<P>(0u)), others = values | ~mask;
    lo = bit_cast<uint32_t>(__hmin2(bit_cast<P>(lo), bit_cast<P>(others)));
    hi = bit_cast<uint32_t>(__hmax2(bit_cast<P>(hi), bit_cast<P>(others)));
    finite = bit_cast<uint32_t>(__hfma2(bit_cast<P>(values), bit_cast<P>(0u), bit_cast<P>(finite)));
    return mask;  // finite: 0, or NaN
  }
};

// round(x / scale) + zero, held in 0 … 2^bits - 1, without a division.
template <class Real16>
struct Coder {
  static constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23 + an integer is a float in steps of 1
  static constexpr float kCoarse = 768.0f;      // and this is in steps of 2^-14
  float scale, inverse, zero;
  int top, shift;
  bool is_plain;

  __device__ Coder(TileFit<Real16> fit, int bits)
      : scale(value_of(fit.scale)),
        inverse(1.0f / scale),
        zero(value_of(fit.zero)),
        top((1 << bits) - 1),
        shift(static_cast<int>(zero) - bit_cast<int>(kMagic)),
        is_plain(fabsf(scale) > 1e-30f && fabsf(scale) < 1e30f && fabsf(zero) <= 128.0f) {}

  // The quotient of two halves (or bfloat16) is half an integer or at least 2^-13 away from that, which the
  // product is too after its rounding to 2^-14; so both have the same nearest integer (tried all).
  __device__ __forceinline__ uint32_t plain_code(Real16 stored) const {
    const float ratio = fmaf(value_of(stored), inverse, kCoarse) + (kMagic - kCoarse);
    return static_cast<uint32_t>(__viaddmin_s32_relu(bit_cast<int>(ratio), shift, top));
  }
  __device__ __forceinline__ uint32_t code(Real16 stored) const {
    return code_of(value_of(stored), scale, zero, top == 3 ? 2 : 4);
  }
};

// The halves' bits side by side: bit b of the lower half becomes bit 2b + 1, of the upper one bit 2b.
__device__ __forceinline__ uint32_t interleave_halves(uint32_t x) {
  x = __byte_perm(x, 0u, 0x1302);
  const auto exchange = [&](int step, uint32_t moved) {
    const uint32_t t = (x ^ x >> step) & moved;
    x = x ^ t ^ t << step;
  };
  exchange(4, 0x00f000f0u), exchange(2, 0x0c0c0c0cu), exchange(1, 0x22222222u);
  return x;
}

template <class Real16, int Channels>
struct CompressBlock {
  static constexpr int kStride = Channels + 2;            // an odd number of banks between tokens
  static constexpr int kParts = 2 * kThreads / Channels;  // of a pair of key tiles, one per thread
  static constexpr int kEach = Channels < kThreads ? 1 : Channels / kThreads;  // tiles of a thread
  static constexpr int kWords = Channels * kTile * 4 / 32;                     // of codes, at most
  alignas(16) uint16_t x[(kTile + 1) * kStride];  // [64, Channels], pruned; pack may read one more
  union {
    struct {
      uint64_t bitmaps[Channels];
      PairScan<Real16> parts[kParts][Channels / 2];
    };
    uint32_t words[kWords];
  };
  int sums[kThreads / 32];
  int64_t turn;
  int begin;

  // What a thread knows of its tiles, thread + n · kThreads.
  struct Tile {
    uint64_t bitmap;
    TileFit<Real16> fit;
    int before;  // words of the tiles before, in this block
  };

  // Threads in step: tile by tile, values side by side in pairs.
  __device__ __forceinline__ void scan_values(const KvCompressArgs& args, int64_t first_tile, int thread,
                                              Tile (&tiles)[kEach]) {
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int tile = thread + n * kThreads;
      if (tile >= Channels) break;
      const auto* from = reinterpret_cast<const uint32_t*>(x + tile % kTile * kStride + tile / kTile * kTile);
      PairScan<Real16> scan;
      uint32_t bits[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 16; ++i) bits[h] |= scan.add(from[16 * h + i]) & 0x80008000u >> i;
        bits[h] = interleave_halves(bits[h]);
      }
      finish(args, first_tile, tile, uint64_t{bits[0]} << 32 | bits[1],
             fminf(half_of(scan.lo, 0), half_of(scan.lo, 1)), fmaxf(half_of(scan.hi, 0), half_of(scan.hi, 1)),
             half_of(scan.finite, 0) + half_of(scan.finite, 1), tiles[n]);
    }
  }

  // Threads in step: the same tokens of two channels side by side, and then tile by tile.
  __device__ __forceinline__ void scan_keys(const KvCompressArgs& args, int64_t first_tile, int thread,
                                            Tile (&tiles)[kEach]) {
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
      float lo = bit_cast<float>(0x7fffffffu), hi = lo, finite = 0.0f;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const PairScan<Real16>& own = parts[i][tile / 2];
        lo = fminf(lo, half_of(own.lo, tile % 2)), hi = fmaxf(hi, half_of(own.hi, tile % 2));
        finite += half_of(own.finite, tile % 2);
      }
      finish(args, first_tile, tile, bitmaps[tile], lo, hi, finite, tiles[n]);
    }
  }

  static __device__ __forceinline__ float half_of(uint32_t pair, int i) {
    return value_of(Real16{static_cast<uint16_t>(pair >> (16 * i))});
  }

  __device__ __forceinline__ void finish(const KvCompressArgs& args, int64_t first_tile, int tile,
                                         uint64_t bitmap, float lo, float hi, float finite, Tile& own) {
    if (bitmap == 0) lo = hi = 0.0f;
    if (finite != 0.0f) lo = hi = bit_cast<float>(0x7fc00000u);
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

  // From one set element to the next, a few at a time: what is behind the last one is cut off.
  template <int Each, class CodeOf>
  __device__ __forceinline__ void pack(const uint16_t* from, int step, uint64_t bitmap, int bits,
                                       uint32_t* to, CodeOf&& code_of_value) const {
    uint32_t left = static_cast<uint32_t>(bitmap >> 32);
    const uint32_t rest = static_cast<uint32_t>(bitmap);
    const uint16_t* const second = from + 63 * step;  // of the element of bit 0
    from += 31 * step;
    for (int left_bits = __popcll(bitmap) * bits; left_bits > 0; left_bits -= 32) {
      uint32_t word = 0;
      int bit = 0;
      do {
#pragma unroll
        for (int n = 0; n < Each; ++n) {
          if (left == 0) left = rest, from = second;
          int i;
          uint32_t highest;  // PTX ISA 9.7.1.20 (bfind), 9.7.8.6 (shl); of none -1, and no bit
          asm("bfind.u32 %0, %1;" : "=r"(i) : "r"(left));
          asm("shl.b32 %0, 1, %1;" : "=r"(highest) : "r"(i));
          left &= ~highest;
          word = __funnelshift_r(word, code_of_value(Real16{from[-i * step]}), bits);
        }
        bit += Each * bits;
      } while (bit < 32 && bit < left_bits);
      word >>= 32 - bit;
      *to++ = left_bits < 32 ? word & ~(~0u << left_bits) : word;
    }
  }
};

template <class Real16, int Channels>
__global__ void __launch_bounds__(kThreads) compress_kernel(KvCompressArgs args) {
  using Block = CompressBlock<Real16, Channels>;
  __shared__ alignas(16) uint8_t room[sizeof(Block)];
  Block& block = *reinterpret_cast<Block*>(room);
  auto* scratch = static_cast<Scratch*>(args.scratch);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread == 0) block.turn = static_cast<int64_t>(atomicAdd(&scratch->ticket, 1ull));
  __syncthreads();  // turn
  const int64_t index = block.turn, blocks = (args.tokens + kTile - 1) / kTile;
  const int64_t head = static_cast<uint32_t>(index) / static_cast<uint32_t>(blocks);  // as a grid is
  const int64_t first = (index - head * blocks) * kTile;
  {
    constexpr int kWords = Channels / 4;
    const int token = thread / 2, half = thread % 2;
    uint32_t pairs[kWords] = {};
    if (first + token < args.tokens && args.keep > 0) {
      const auto* row =
          static_cast<const uint16_t*>(args.x) + (head * args.tokens + first + token) * Channels;
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = __ldcs(reinterpret_cast<const uint4*>(row) + i / 2 + half);
        pairs[i] = v.x, pairs[i + 1] = v.y, pairs[i + 2] = v.z, pairs[i + 3] = v.w;
      }
    }
    Pruning<kWords> pruning;
    if (args.keep > 0 && args.keep < Channels) {
      pruning.find(pairs, static_cast<int>(args.keep));
      pruning.keep_largest(pairs);
    }
    uint16_t* row = block.x + token * Block::kStride;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      *reinterpret_cast<uint32_t*>(row + (i / 4 * 2 + half) * 8 + i % 4 * 2) = pairs[i];
    pruning.drop_excess(row, half);
  }
  __syncthreads();  // x: tiles are read across tokens

  const int64_t first_tile = index * Channels;
  typename Block::Tile tiles[Block::kEach] = {};
  if (args.is_value)
    block.scan_values(args, first_tile, thread, tiles);
  else
    block.scan_keys(args, first_tile, thread, tiles);
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
  const int step = args.is_value ? 1 : Block::kStride;
  if (args.bits != kRawBits)
    each_tile([&](int, const typename Block::Tile& tile, const uint16_t* from) {
      const Coder<Real16> coder(tile.fit, args.bits);
      uint32_t* to = block.words + tile.before;
      if (coder.is_plain)
        block.template pack<4>(from, step, tile.bitmap, args.bits, to,
                               [&](Real16 v) { return coder.plain_code(v); });
      else
        block.template pack<4>(from, step, tile.bitmap, args.bits, to,
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
      block.template pack<2>(from, step, tile.bitmap, kRawBits, args.packed + begin + tile.before,
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

// SPDX-License-Identifier: MIT
// Prune, fit and pack in one pass over x: a thread block owns 64 tokens of one head.
//
//   two lanes per token   the keep-th largest magnitude, bit by bit over bit planes; what is below is zero
//   all threads           bitmaps and extremes of the tiles, two values at a time; scales and zeros
//   one warp              where the block's words begin: the totals of the blocks before it, as far back
//                         as the nearest one that knows its own beginning
//   one thread per tile   codes, from one set element to the next
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

// Words of all blocks before this one. By one warp; a block waits only for blocks that have started.
__device__ int words_before(Scratch* scratch, int64_t index, int total, int lane) {
  if (lane == 0) publish(scratch->state + index, index == 0 ? kSum : kTotal, total);
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

// round(x / scale) + zero, held in 0 … 2^bits - 1, without a division. The lowest bits of what code gives
// are the code's: 1.5 · 2^23 + an integer is a float in steps of 1.
template <class Real16>
struct Coder {
  static constexpr float kMagic = 12582912.0f;
  float scale, inverse, zero, top;
  bool divides;  // a bfloat16 may be too small or too large for an inverse

  __device__ Coder(TileFit<Real16> fit, int bits)
      : scale(value_of(fit.scale)),
        inverse(1.0f / scale),
        zero(value_of(fit.zero)),
        top(kMagic + static_cast<float>((1 << bits) - 1)),
        divides(!std::is_same_v<Real16, Half> && !(fabsf(scale) > 1e-30f && fabsf(scale) < 1e30f)) {}

  __device__ __forceinline__ uint32_t code(Real16 stored) const {
    const float x = value_of(stored);
    // The product and once its error: to the nearest integer the same as the quotient, for any two halves
    // and for any two bfloat16 (tried all).
    float ratio = x * inverse;
    ratio = fmaf(fmaf(-ratio, scale, x), inverse, ratio);
    if (!std::is_same_v<Real16, Half> && divides) ratio = x / scale;
    const float shifted = (ratio + kMagic) + zero;  // exact: |ratio| and |zero| are below 2^16
    return __float_as_uint(fminf(fmaxf(shifted, kMagic), top));
  }
};

template <class Real16, int Channels>
struct CompressBlock {
  static constexpr int kStride = Channels + 2;            // an odd number of banks between tokens
  static constexpr int kParts = 2 * kThreads / Channels;  // of a pair of key tiles, one per thread
  alignas(16) uint16_t x[kTile * kStride];                // [64, Channels], pruned
  uint64_t bitmaps[Channels];
  TileFit<Real16> fits[Channels];
  int before[Channels];  // words of the tiles before, in this block
  PairScan<Real16> parts[kParts][Channels / 2];
  int64_t turn;
  int begin;

  // Threads in step: tile by tile, values side by side in pairs.
  __device__ __forceinline__ void scan_values(const KvCompressArgs& args, int64_t first_tile, int thread) {
    for (int tile = thread; tile < Channels; tile += kThreads) {
      const auto* from = reinterpret_cast<const uint32_t*>(x + tile % kTile * kStride + tile / kTile * kTile);
      PairScan<Real16> scan;
      uint32_t bits[2] = {};
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll 8
        for (int i = 0; i < 16; ++i) {
          const uint32_t mask = scan.add(from[16 * h + i]);
          bits[h] = __funnelshift_l(mask << 16, bits[h], 1);
          bits[h] = __funnelshift_l(mask, bits[h], 1);
        }
      finish(args, first_tile, tile, uint64_t{bits[0]} << 32 | bits[1],
             fminf(half_of(scan.lo, 0), half_of(scan.lo, 1)), fmaxf(half_of(scan.hi, 0), half_of(scan.hi, 1)),
             half_of(scan.finite, 0) + half_of(scan.finite, 1));
    }
  }

  // Threads in step: the same tokens of two channels side by side, and then tile by tile.
  __device__ __forceinline__ void scan_keys(const KvCompressArgs& args, int64_t first_tile, int thread) {
    constexpr int kTokens = kTile / kParts, kBits = kTokens < 32 ? kTokens : 32;
    const int pair = thread % (Channels / 2), part = thread / (Channels / 2);
    PairScan<Real16> scan;
#pragma unroll
    for (int first = 0; first < kTokens; first += kBits) {
      uint32_t even = 0, odd = 0;
      const uint16_t* from = x + (part * kTokens + first) * kStride + 2 * pair;
#pragma unroll 8
      for (int i = 0; i < kBits; ++i, from += kStride) {
        const uint32_t mask = scan.add(*reinterpret_cast<const uint32_t*>(from));
        even = __funnelshift_l(mask << 16, even, 1), odd = __funnelshift_l(mask, odd, 1);
      }
      // The first token is the highest bit, in the last of the bitmap's pieces.
      using Piece = std::conditional_t<kBits == 16, uint16_t, uint32_t>;
      const int at = kTile / kBits - 1 - (part * kTokens + first) / kBits;
      reinterpret_cast<Piece*>(bitmaps + 2 * pair)[at] = static_cast<Piece>(even);
      reinterpret_cast<Piece*>(bitmaps + 2 * pair + 1)[at] = static_cast<Piece>(odd);
    }
    parts[part][pair] = scan;
    __syncthreads();  // bitmaps and parts
    for (int tile = thread; tile < Channels; tile += kThreads) {
      float lo = bit_cast<float>(0x7fffffffu), hi = lo, finite = 0.0f;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const PairScan<Real16>& own = parts[i][tile / 2];
        lo = fminf(lo, half_of(own.lo, tile % 2)), hi = fmaxf(hi, half_of(own.hi, tile % 2));
        finite += half_of(own.finite, tile % 2);
      }
      finish(args, first_tile, tile, bitmaps[tile], lo, hi, finite);
    }
  }

  static __device__ __forceinline__ float half_of(uint32_t pair, int i) {
    return value_of(Real16{static_cast<uint16_t>(pair >> (16 * i))});
  }

  __device__ __forceinline__ void finish(const KvCompressArgs& args, int64_t first_tile, int tile,
                                         uint64_t bitmap, float lo, float hi, float finite) {
    if (bitmap == 0) lo = hi = 0.0f;
    if (finite != 0.0f) lo = hi = bit_cast<float>(0x7fc00000u);
    bitmaps[tile] = bitmap;
    args.bitmaps[first_tile + tile] = bitmap;
    before[tile] = static_cast<int>(tile_words(__popcll(bitmap), args.bits));
    if (args.bits == kRawBits) return;
    const TileFit<Real16> fit = fit_tile<Real16>(lo, hi, args.bits);
    fits[tile] = fit;
    static_cast<Real16*>(args.scales)[first_tile + tile] = fit.scale;
    static_cast<Real16*>(args.zeros)[first_tile + tile] = fit.zero;
  }

  // From one set element to the next, so that all threads fill their words in step.
  template <class CodeOf>
  __device__ __forceinline__ void pack(const uint16_t* from, int step, uint64_t bitmap, int bits,
                                       uint32_t* words, CodeOf&& code_of_value) const {
    uint32_t left = static_cast<uint32_t>(bitmap >> 32), rest = static_cast<uint32_t>(bitmap);
    for (int count = __popcll(bitmap); count > 0;) {
      uint32_t word = 0;
      int bit = 0;
      do {
        if (left == 0) left = rest, from += 32 * step;
        const int i = __clz(static_cast<int>(left));
        left ^= 0x80000000u >> i;
        word = __funnelshift_r(word, code_of_value(Real16{from[i * step]}), bits);
        bit += bits;
      } while (--count > 0 && bit < 32);
      *words++ = word >> (32 - bit);
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
  const int64_t head = index / blocks, first = index % blocks * kTile;
  {
    constexpr int kWords = Channels / 4;
    const int token = thread / 2, half = thread % 2;
    uint32_t pairs[kWords] = {};
    if (first + token < args.tokens) {
      const auto* row =
          static_cast<const uint16_t*>(args.x) + (head * args.tokens + first + token) * Channels;
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = __ldcs(reinterpret_cast<const uint4*>(row) + i / 2 + half);
        pairs[i] = v.x, pairs[i + 1] = v.y, pairs[i + 2] = v.z, pairs[i + 3] = v.w;
      }
    }
    Pruning<kWords> pruning;
    if (args.keep > 0 && args.keep < Channels) pruning.find(pairs, static_cast<int>(args.keep));
    uint16_t* row = block.x + token * Block::kStride;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      *reinterpret_cast<uint32_t*>(row + (i / 4 * 2 + half) * 8 + i % 4 * 2) =
          args.keep == 0 ? 0u : pruning.kept(pairs[i]);
    pruning.drop_excess(row, half);
  }
  __syncthreads();  // x: tiles are read across tokens

  const int64_t first_tile = index * Channels;
  if (args.is_value)
    block.scan_values(args, first_tile, thread);
  else
    block.scan_keys(args, first_tile, thread);
  __syncthreads();  // before, as counts
  if (thread < 32) {
    constexpr int kEach = Channels / 32;
    int counts[kEach], sum = 0;
    for (int j = 0; j < kEach; ++j) sum += counts[j] = block.before[lane * kEach + j];
    int until = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, until, step);
      if (lane >= step) until += other;
    }
    int at = until - sum;
    for (int j = 0; j < kEach; ++j) block.before[lane * kEach + j] = at, at += counts[j];
    const int total = __shfl_sync(~0u, until, 31);
    const int base = words_before(scratch, index, total, lane);
    if (lane == 0) block.begin = base;
    if (lane == 0 && index == gridDim.x - 1) *args.num_words = static_cast<int64_t>(base) + total;
  }
  __syncthreads();  // before and begin

  for (int tile = thread; tile < Channels; tile += kThreads) {
    const int offset = block.begin + block.before[tile];
    args.offsets[first_tile + tile] = offset;
    const uint16_t* from =
        block.x + (args.is_value ? tile % kTile * Block::kStride + tile / kTile * kTile : tile);
    const int step = args.is_value ? 1 : Block::kStride;
    if (args.bits == kRawBits) {
      block.pack(from, step, block.bitmaps[tile], kRawBits, args.packed + offset,
                 [](Real16 stored) { return uint32_t{stored.bits}; });
    } else {
      const Coder<Real16> coder(block.fits[tile], args.bits);
      block.pack(from, step, block.bitmaps[tile], args.bits, args.packed + offset,
                 [&](Real16 stored) { return coder.code(stored); });
    }
  }
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
  cudaError_t status = cudaMemsetAsync(args.scratch, 0, scratch_bytes, stream);
  // The room that nothing is packed into.
  if (status == cudaSuccess && args.room > 0)
    status = cudaMemsetAsync(args.packed, 0, static_cast<size_t>(4 * args.room), stream);
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

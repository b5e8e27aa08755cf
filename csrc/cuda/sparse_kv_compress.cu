// SPDX-License-Identifier: MIT
// Prune, fit and pack in one pass over x: a thread block owns 64 tokens of one head.
//
//   two lanes per token   the keep-th largest magnitude by bisection of its 15 bits; what is below is zero
//   one thread per tile   bitmap, extremes, scale and zero; a scan over the block's tiles
//   one warp              where the block's words begin: the totals of the blocks before it, as far back
//                         as the nearest one that knows its own beginning
//   one thread per tile   codes
#include "../kv.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 2 * kTile;
constexpr uint32_t kNoSigns = 0x7fff7fffu, kSigns = 0x80008000u;

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

// A magnitude that exactly `keep` of those in pairs[Words] of two neighbouring lanes reach, or else the
// keep-th largest; then num_equal of those equal to it are kept. keep is at least 1.
template <int Words>
__device__ __forceinline__ uint32_t cutoff_of(const uint32_t (&pairs)[Words], int keep, int& num_equal) {
  const auto count_from = [&](uint32_t key) {  // of both lanes
    const uint32_t both = key * 0x10001u;
    uint32_t count = 0;  // two counters; a 15-bit difference borrows bit 15 and nothing else
#pragma unroll
    for (int i = 0; i < Words; ++i) count += (((pairs[i] & kNoSigns) | kSigns) - both) >> 15 & 0x10001u;
    count += __shfl_xor_sync(~0u, count, 1);
    return static_cast<int>((count & 0xffffu) + (count >> 16));
  };
  uint32_t cutoff = 0;
  bool is_exact = false;
  for (int bit = 14; bit >= 0 && !__all_sync(~0u, is_exact); --bit) {
    const uint32_t key = cutoff | 1u << bit;
    const int count = count_from(key);
    if (!is_exact && count >= keep) cutoff = key, is_exact = count == keep;
  }
  // All of those equal to an exact one stay.
  num_equal = __all_sync(~0u, is_exact) ? -1 : keep - (cutoff == 0x7fffu ? 0 : count_from(cutoff + 1));
  return cutoff;
}

// This lane's half of a token, vectors 2i + half of eight channels, with what is pruned set to zero.
template <int Words>
__device__ __forceinline__ void prune(uint32_t (&pairs)[Words], int keep, int half) {
  int num_equal = 0;
  const uint32_t cutoff = cutoff_of(pairs, keep > 0 ? keep : 1, num_equal);
  if (keep == 0) {
#pragma unroll
    for (int i = 0; i < Words; ++i) pairs[i] = 0;
    return;
  }
  if (num_equal < 0) {  // the whole warp
#pragma unroll
    for (int i = 0; i < Words; ++i) {
      const uint32_t stays = ((pairs[i] & kNoSigns) | kSigns) - cutoff * 0x10001u;
      uint32_t mask;  // the top bit of each half all over it. PTX ISA 9.7.9.7 (prmt)
      asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask) : "r"(stays));
      pairs[i] &= mask;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < Words; i += 4) {
    uint32_t equal = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      equal |= static_cast<uint32_t>((pairs[i + j / 2] >> (16 * (j % 2)) & 0x7fffu) == cutoff) << j;
    // Ties: the first ones stay, and the lane with half = 0 comes first.
    const int mine = __popc(equal), others = __shfl_xor_sync(~0u, mine, 1);
    int left = num_equal - (half == 0 ? 0 : others);
    num_equal -= mine + others;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t key = pairs[i + j / 2] >> (16 * (j % 2)) & 0x7fffu;
      const bool is_equal = key == cutoff;
      if (key < cutoff || (is_equal && left <= 0)) pairs[i + j / 2] &= j % 2 ? 0xffffu : ~0xffffu;
      left -= is_equal;
    }
  }
}

template <class Real16, int Channels>
__global__ void __launch_bounds__(kThreads) compress_kernel(KvCompressArgs args) {
  constexpr int kStride = Channels + 2;                // an odd number of banks between tokens
  __shared__ alignas(16) uint16_t x[kTile * kStride];  // [64, Channels], pruned
  __shared__ int before[Channels];                     // words of the tiles before, in this block
  __shared__ int64_t turn;
  __shared__ int begin;
  auto* scratch = static_cast<Scratch*>(args.scratch);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread == 0) turn = static_cast<int64_t>(atomicAdd(&scratch->ticket, 1ull));
  __syncthreads();  // turn
  const int64_t index = turn, blocks = (args.tokens + kTile - 1) / kTile;
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
    if (args.keep < Channels) prune(pairs, static_cast<int>(args.keep), half);
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      *reinterpret_cast<uint32_t*>(x + token * kStride + (i / 4 * 2 + half) * 8 + i % 4 * 2) = pairs[i];
  }
  __syncthreads();  // x: tiles are read across tokens

  const auto element = [&](int tile, int i) {
    return args.is_value ? x[tile % kTile * kStride + tile / kTile * kTile + i] : x[i * kStride + tile];
  };
  const int64_t first_tile = index * Channels;
  for (int tile = thread; tile < Channels; tile += kThreads) {
    uint64_t bitmap = 0;
    float lo = bit_cast<float>(0x7f800000u), hi = -lo;
    bool has_nan = false;
    for (int i = 0; i < kTile; ++i) {
      const Real16 stored{element(tile, i)};
      const bool is_set = magnitude_key(stored.bits) != 0;
      bitmap = bitmap << 1 | static_cast<uint64_t>(is_set);
      const float v = value_of(stored);
      has_nan |= v != v;
      lo = is_set ? fminf(lo, v) : lo, hi = is_set ? fmaxf(hi, v) : hi;
    }
    if (bitmap == 0) lo = hi = 0.0f;
    if (has_nan) lo = hi = bit_cast<float>(0x7fc00000u);
    args.bitmaps[first_tile + tile] = bitmap;
    before[tile] = static_cast<int>(tile_words(__popcll(bitmap), args.bits));
    if (args.bits != kRawBits) {
      const TileFit<Real16> fit = fit_tile<Real16>(lo, hi, args.bits);
      static_cast<Real16*>(args.scales)[first_tile + tile] = fit.scale;
      static_cast<Real16*>(args.zeros)[first_tile + tile] = fit.zero;
    }
  }
  __syncthreads();  // before, as counts
  if (thread < 32) {
    constexpr int kEach = Channels / 32;
    int counts[kEach], sum = 0;
    for (int j = 0; j < kEach; ++j) sum += counts[j] = before[lane * kEach + j];
    int until = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, until, step);
      if (lane >= step) until += other;
    }
    int at = until - sum;
    for (int j = 0; j < kEach; ++j) before[lane * kEach + j] = at, at += counts[j];
    const int total = __shfl_sync(~0u, until, 31);
    const int base = words_before(scratch, index, total, lane);
    if (lane == 0) begin = base;
    if (lane == 0 && index == gridDim.x - 1) *args.num_words = static_cast<int64_t>(base) + total;
  }
  __syncthreads();  // before and begin

  for (int tile = thread; tile < Channels; tile += kThreads) {
    const int64_t at = first_tile + tile;
    const int offset = begin + before[tile];
    args.offsets[at] = offset;
    float scale = 0.0f, zero = 0.0f;
    if (args.bits != kRawBits) {
      scale = value_of(static_cast<const Real16*>(args.scales)[at]);
      zero = value_of(static_cast<const Real16*>(args.zeros)[at]);
    }
    uint32_t* words = args.packed + offset;
    uint32_t word = 0;
    int bit = 0;
    for (int i = 0; i < kTile; ++i) {
      const Real16 stored{element(tile, i)};
      if (magnitude_key(stored.bits) == 0) continue;
      const uint32_t code =
          args.bits == kRawBits ? stored.bits : code_of(value_of(stored), scale, zero, args.bits);
      word |= code << bit;
      bit += args.bits;
      if (bit == 32) *words++ = word, word = 0, bit = 0;
    }
    if (bit > 0) *words = word;
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

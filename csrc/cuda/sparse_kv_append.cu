// SPDX-License-Identifier: MIT
// New tokens into the native key-value cache (kv_page.h): a block packs one page of one head, keys and
// then values, staged in shared memory; the last block of a head puts the new tokens into the ring.
#include "../kv_page.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 128;

// x[token · stride + channel] to a page; rows are tokens for keys and channels for values. fits: room.
template <class Real16, int Channels, int Bits, bool IsValue>
__device__ void pack_page(const uint16_t* x, PageFit* fits, uint8_t* page) {
  constexpr int kRows = IsValue ? Channels : kPageTokens, kColumns = IsValue ? kPageTokens : Channels;
  constexpr int kStride = Channels + 2, kPerHalf = 16 / Bits;
  const auto at = [&](int row, int k) {
    return to_float(Real16{IsValue ? x[k * kStride + row] : x[row * kStride + k]});
  };
  auto* stored = reinterpret_cast<uint16_t*>(page + page_codes_bytes(Channels, Bits));
  for (int k = static_cast<int>(threadIdx.x); k < kColumns; k += kThreads) {
    const PageFit fit = fit_page_group([&](int row) { return at(row, k); }, kRows, Bits);
    fits[k] = fit;
    stored[fit_place(k)] = fit.scale, stored[kColumns + fit_place(k)] = fit.shift;
  }
  __syncthreads();  // fits
  for (int w = static_cast<int>(threadIdx.x); w < 2 * Channels * Bits; w += kThreads) {
    const CodeOrigin origin = code_origin(w, kColumns, Bits);
    uint32_t word = 0;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const PageCoder coder(fits[origin.k + odd], Bits);
#pragma unroll
      for (int i = 0; i < kPerHalf; ++i)
        word |= static_cast<uint32_t>(coder.code(at(origin.row + 8 * i, origin.k + odd)))
                << (16 * odd + Bits * i);
    }
    reinterpret_cast<uint32_t*>(page)[w] = word;
  }
}
template <class Real16, int Channels, bool IsValue>
__device__ void pack_page_of(const uint16_t* x, PageFit* fits, int bits, uint8_t* page) {
  if (bits == 2)
    pack_page<Real16, Channels, 2, IsValue>(x, fits, page);
  else
    pack_page<Real16, Channels, 4, IsValue>(x, fits, page);
}

// Grid: (pages that may become full + 1, sequences · heads). Both steps in one launch only where no new
// token takes the slot of one that is being packed: one token at a time.
template <class Real16, int Channels>
__global__ void __launch_bounds__(kThreads) append_kernel(KvAppendArgs args, bool pack, bool store) {
  constexpr int kStride = Channels + 2, kWords = Channels / 2;
  __shared__ alignas(4) uint16_t x[kPageTokens * kStride];
  __shared__ PageFit fits[Channels < kPageTokens ? kPageTokens : Channels];
  const KvCacheArgs& c = args.cache;
  const int64_t row = blockIdx.y, sequence = row / c.heads, before = c.lens[sequence];
  int64_t count = args.counts != nullptr ? args.counts[sequence] : args.count;
  count = count < 0 ? 0 : (count < args.count ? count : args.count);
  const SequenceParts old = parts_of(c, before), now = parts_of(c, before + count);
  const int thread = static_cast<int>(threadIdx.x);
  const auto *keys = static_cast<const uint16_t*>(args.keys),
             *values = static_cast<const uint16_t*>(args.values);
  auto *recent_keys = static_cast<uint16_t*>(c.recent_keys),
       *recent_values = static_cast<uint16_t*>(c.recent_values);
  if (blockIdx.x == gridDim.x - 1) {
    if (!store) return;
    // Those that stay: sinks, and what no page has.
    const int64_t behind = c.sinks + now.ring_first, first_kept = behind > before ? behind - before : 0;
    const int64_t sinks =
        before < c.sinks ? (c.sinks - before < first_kept ? c.sinks - before : first_kept) : 0;
    const int64_t kept = sinks + (count > first_kept ? count - first_kept : 0);
    for (int64_t i = thread; i < kept * kWords; i += kThreads) {
      const int64_t k = i / kWords, index = k < sinks ? k : first_kept + k - sinks;
      if (index >= count) break;
      const int64_t to = (row * c.recent + recent_slot(c, before + index)) * kWords + i % kWords;
      const int64_t from = (row * args.count + index) * kWords + i % kWords;
      reinterpret_cast<uint32_t*>(recent_keys)[to] = reinterpret_cast<const uint32_t*>(keys)[from];
      reinterpret_cast<uint32_t*>(recent_values)[to] = reinterpret_cast<const uint32_t*>(values)[from];
    }
    return;
  }
  const int64_t index = old.pages + blockIdx.x;
  if (!pack || index >= now.pages) return;
  const int64_t page = c.page_table[sequence * c.max_pages + index];
  if (page < 0 || page >= c.num_pages) return;
  const auto stage = [&](const uint16_t* recent, const uint16_t* added) {
    __syncthreads();  // x has been read
    for (int i = thread; i < kPageTokens * kWords; i += kThreads) {
      const int t = i / kWords, d = i % kWords * 2;
      const int64_t position = c.sinks + index * kPageTokens + t, k = position - before;
      const uint16_t* from = k < 0 ? recent + (row * c.recent + recent_slot(c, position)) * Channels
                                   : added + (row * args.count + k) * Channels;
      *reinterpret_cast<uint32_t*>(x + t * kStride + d) = *reinterpret_cast<const uint32_t*>(from + d);
    }
    __syncthreads();  // x
  };
  const int64_t at = page * c.heads + row % c.heads;
  stage(recent_keys, keys);
  pack_page_of<Real16, Channels, false>(x, fits, c.key_bits,
                                        c.key_pages + at * key_page_bytes(Channels, c.key_bits));
  stage(recent_values, values);
  pack_page_of<Real16, Channels, true>(x, fits, c.value_bits,
                                       c.value_pages + at * value_page_bytes(Channels, c.value_bits));
}

}  // namespace

cudaError_t launch_sparse_kv_append(const KvAppendArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  const auto launch = [&](bool pack, bool store) {
    const int64_t pages = pack ? args.count / kPageTokens + 1 : 0;
    const dim3 grid(static_cast<unsigned>(pages + 1), static_cast<unsigned>(c.batch * c.heads));
    const auto launch_of = [&](auto channels) {
      const auto kernel = c.type == Real::kFloat16 ? append_kernel<Half, channels.value>
                                                   : append_kernel<BFloat16, channels.value>;
      kernel<<<grid, kThreads, 0, stream>>>(args, pack, store);
    };
    if (c.channels == 64) launch_of(std::integral_constant<int, 64>{});
    if (c.channels == 128) launch_of(std::integral_constant<int, 128>{});
    if (c.channels == 256) launch_of(std::integral_constant<int, 256>{});
    return cudaGetLastError();
  };
  if (args.count == 1) return launch(true, true);
  const cudaError_t status = launch(true, false);
  return status == cudaSuccess ? launch(false, true) : status;
}

}  // namespace quantgemm

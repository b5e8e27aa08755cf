// SPDX-License-Identifier: MIT
// New tokens into the native key-value cache (kv_page.h): a block packs one page of one head, keys and
// then values, staged in shared memory; the last block of a head puts the new tokens into the ring.
#include "../kv_page.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 128;

// x[token · stride + channel] to a page; rows are tokens for keys and channels for values.
template <class Real16, bool IsValue>
__device__ void pack_page(const uint16_t* x, int stride, int channels, int bits, uint8_t* page) {
  const int rows = IsValue ? channels : kPageTokens, num_k = IsValue ? kPageTokens : channels;
  const auto at = [&](int row, int k) {
    return to_float(Real16{IsValue ? x[k * stride + row] : x[row * stride + k]});
  };
  auto* fits = reinterpret_cast<uint16_t*>(page + page_codes_bytes(channels, bits));
  for (int k = static_cast<int>(threadIdx.x); k < num_k; k += kThreads) {
    const PageFit fit = fit_page_group([&](int row) { return at(row, k); }, rows, bits);
    fits[fit_place(k, num_k)] = fit.scale, fits[num_k + fit_place(k, num_k)] = fit.shift;
  }
  __syncthreads();  // fits
  const int per_half = 16 / bits;
  for (int w = static_cast<int>(threadIdx.x); w < 2 * channels * bits; w += kThreads) {
    const CodeOrigin origin = code_origin(w, num_k, bits);
    uint32_t word = 0;
    for (int odd = 0; odd < 2; ++odd) {
      const int place = fit_place(origin.k + odd, num_k);
      const PageFit fit{fits[place], fits[num_k + place]};
      for (int i = 0; i < per_half; ++i)
        word |= page_code(at(origin.row + 8 * i, origin.k + odd), fit, bits) << (16 * odd + bits * i);
    }
    reinterpret_cast<uint32_t*>(page)[w] = word;
  }
}

// Grid: (pages that may become full + 1, sequences · heads). Both steps in one launch only where no new
// token takes the slot of one that is being packed: one token at a time.
template <class Real16>
__global__ void __launch_bounds__(kThreads) append_kernel(KvAppendArgs args, bool pack, bool store) {
  extern __shared__ uint16_t x[];  // [64, channels + 2]
  const KvCacheArgs& c = args.cache;
  const int64_t row = blockIdx.y, sequence = row / c.heads, before = c.lens[sequence];
  int64_t count = args.counts != nullptr ? args.counts[sequence] : args.count;
  count = count < 0 ? 0 : (count < args.count ? count : args.count);
  const SequenceParts old = parts_of(c, before), now = parts_of(c, before + count);
  const int channels = static_cast<int>(c.channels), thread = static_cast<int>(threadIdx.x);
  const auto *keys = static_cast<const uint16_t*>(args.keys),
             *values = static_cast<const uint16_t*>(args.values);
  auto *recent_keys = static_cast<uint16_t*>(c.recent_keys),
       *recent_values = static_cast<uint16_t*>(c.recent_values);
  if (blockIdx.x == gridDim.x - 1) {
    if (!store) return;
    for (int64_t i = thread; i < count * channels / 2; i += kThreads) {
      const int64_t index = i / (channels / 2), position = before + index;
      if (position >= c.sinks && position - c.sinks < now.ring_first) continue;
      const int64_t to = (row * c.recent + recent_slot(c, position)) * (channels / 2) + i % (channels / 2);
      const int64_t from = row * args.count * (channels / 2) + i;
      reinterpret_cast<uint32_t*>(recent_keys)[to] = reinterpret_cast<const uint32_t*>(keys)[from];
      reinterpret_cast<uint32_t*>(recent_values)[to] = reinterpret_cast<const uint32_t*>(values)[from];
    }
    return;
  }
  const int64_t index = old.pages + blockIdx.x;
  if (!pack || index >= now.pages) return;
  const int64_t page = c.page_table[sequence * c.max_pages + index];
  if (page < 0 || page >= c.num_pages) return;
  const int stride = channels + 2;
  const auto stage = [&](const uint16_t* recent, const uint16_t* added) {
    __syncthreads();  // x has been read
    for (int i = thread; i < kPageTokens * channels / 2; i += kThreads) {
      const int t = i / (channels / 2), d = i % (channels / 2) * 2;
      const int64_t position = c.sinks + index * kPageTokens + t, k = position - before;
      const uint16_t* from = k < 0 ? recent + (row * c.recent + recent_slot(c, position)) * channels
                                   : added + (row * args.count + k) * channels;
      *reinterpret_cast<uint32_t*>(x + t * stride + d) = *reinterpret_cast<const uint32_t*>(from + d);
    }
    __syncthreads();  // x
  };
  stage(recent_keys, keys);
  pack_page<Real16, false>(
      x, stride, channels, c.key_bits,
      c.key_pages + (page * c.heads + row % c.heads) * key_page_bytes(channels, c.key_bits));
  stage(recent_values, values);
  pack_page<Real16, true>(
      x, stride, channels, c.value_bits,
      c.value_pages + (page * c.heads + row % c.heads) * value_page_bytes(channels, c.value_bits));
}

}  // namespace

cudaError_t launch_sparse_kv_append(const KvAppendArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  const auto room = static_cast<size_t>(kPageTokens * (c.channels + 2) * 2);
  const auto launch = [&](bool pack, bool store) {
    const int64_t pages = pack ? args.count / kPageTokens + 1 : 0;
    const dim3 grid(static_cast<unsigned>(pages + 1), static_cast<unsigned>(c.batch * c.heads));
    if (c.type == Real::kFloat16)
      append_kernel<Half><<<grid, kThreads, room, stream>>>(args, pack, store);
    else
      append_kernel<BFloat16><<<grid, kThreads, room, stream>>>(args, pack, store);
    return cudaGetLastError();
  };
  if (args.count == 1) return launch(true, true);
  const cudaError_t status = launch(true, false);
  return status == cudaSuccess ? launch(false, true) : status;
}

}  // namespace quantgemm

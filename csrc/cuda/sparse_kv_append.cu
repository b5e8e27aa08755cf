// SPDX-License-Identifier: MIT
// New tokens into the native key-value cache (kv_page.h): a block packs the keys or the values of one page
// of one head, staged in shared memory; the last block of a head puts the new tokens into the ring.
#include "../kv_page.h"
#include "launch.h"
#include "memory.cuh"
#include "sparse_kv_pack.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = kPackThreads;

template <int Channels>
struct DenseRoom {
  static constexpr int kStride = Channels + 2;  // an odd number of banks between tokens
  alignas(4) uint16_t x[kPageTokens * kStride];
  PageFit fits[Channels < kPageTokens ? kPageTokens : Channels];
};

// x[token · stride + channel] to a page; rows are tokens for keys and channels for values.
template <class Real16, int Channels, int Bits, bool IsValue>
__device__ void pack_dense(DenseRoom<Channels>& room, uint8_t* page) {
  constexpr int kRows = IsValue ? Channels : kPageTokens, kColumns = IsValue ? kPageTokens : Channels;
  constexpr int kStride = room.kStride, kPerHalf = 16 / Bits;
  const uint16_t* x = room.x;
  PageFit* fits = room.fits;
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
// Less the means, in float.
template <class Real16>
__device__ __forceinline__ uint32_t centred(uint32_t pair, uint32_t mean, Real16) {
  const auto half = [](uint32_t p, int i) { return to_float(Real16{static_cast<uint16_t>(half_at(p, i))}); };
  return pack_pair(half(pair, 0) - half(mean, 0), half(pair, 1) - half(mean, 1), Real16{});
}
template <class Real16>
__device__ __forceinline__ uint4 centred(uint4 v, uint4 mean, Real16 type) {
  return make_uint4(centred(v.x, mean.x, type), centred(v.y, mean.y, type), centred(v.z, mean.z, type),
                    centred(v.w, mean.w, type));
}

// What a block has to do with one head's keys or values.
template <class Real16, int Channels, bool IsValue>
struct Appending {
  const KvAppendArgs& args;
  int64_t row, before;
  static constexpr int kVectors = Channels / 8;

  __device__ __forceinline__ uint4* recent(int64_t position) const {
    const KvCacheArgs& c = args.cache;
    return static_cast<uint4*>(IsValue ? c.recent_values : c.recent_keys) +
           (row * c.recent + recent_slot(c, position)) * kVectors;
  }
  // Vector i of a token that has just come, as it will be kept.
  __device__ __forceinline__ uint4 added(int64_t index, int i) const {
    const KvCacheArgs& c = args.cache;
    const auto* from = static_cast<const uint4*>(IsValue ? args.values : args.keys);
    const uint4 v = __ldg(from + (row * args.count + index) * kVectors + i);
    if (c.means == nullptr) return v;
    const int64_t mean = (IsValue ? c.batch * c.heads : 0) + row;
    return centred(v, __ldg(static_cast<const uint4*>(c.means) + mean * kVectors + i), Real16{});
  }

  // The 64 tokens from a position on, where they are before anything has moved.
  __device__ void pack(void* room, int64_t first, PageFormat format, uint8_t* page) const {
    const int thread = static_cast<int>(threadIdx.x), token = thread / 2, half = thread % 2;
    uint32_t pairs[Channels / 4];
#pragma unroll
    for (int i = 0; i < kVectors / 2; ++i) {
      const int64_t position = first + token, index = position - before;
      const uint4 v = index < 0 ? recent(position)[2 * i + half] : added(index, 2 * i + half);
      pairs[4 * i] = v.x, pairs[4 * i + 1] = v.y, pairs[4 * i + 2] = v.z, pairs[4 * i + 3] = v.w;
    }
    if (format.kind != PageKind::kDense) {
      using Packer = SparsePacker<Real16, Channels, IsValue>;
      Packer{*static_cast<typename Packer::Room*>(room), format, page, thread}.run(pairs);
      return;
    }
    auto& dense = *static_cast<DenseRoom<Channels>*>(room);
#pragma unroll
    for (int i = 0; i < Channels / 4; ++i)
      *reinterpret_cast<uint32_t*>(dense.x + token * dense.kStride + (i / 4 * 2 + half) * 8 + i % 4 * 2) =
          pairs[i];
    __syncthreads();  // x
    format.bits == 2 ? pack_dense<Real16, Channels, 2, IsValue>(dense, page)
                     : pack_dense<Real16, Channels, 4, IsValue>(dense, page);
  }
};

// Grid: (pages that may become full + 1, sequences · heads, keys or values). Both steps in one launch only
// where no new token takes the slot of one that is being packed: one token at a time.
template <class Real16, int Channels, bool IsValue>
__device__ __forceinline__ void append(const KvAppendArgs& args, void* room, bool pack, bool store) {
  const KvCacheArgs& c = args.cache;
  const int64_t row = blockIdx.y, sequence = row / c.heads,
                before = c.lens[sequence] < 0 ? 0 : c.lens[sequence];
  int64_t count = args.counts != nullptr ? args.counts[sequence] : args.count;
  count = count < 0 ? 0 : (count < args.count ? count : args.count);
  const SequenceParts old = parts_of(c, before), now = parts_of(c, before + count);
  const Appending<Real16, Channels, IsValue> appending{args, row, before};
  if (blockIdx.x == gridDim.x - 1) {
    if (!store) return;
    // Those that stay: sinks, and what no page has.
    constexpr int kVectors = appending.kVectors;
    const int64_t behind = c.sinks + now.ring_first, first_kept = behind > before ? behind - before : 0;
    const int64_t sinks =
        before < c.sinks ? (c.sinks - before < first_kept ? c.sinks - before : first_kept) : 0;
    const int64_t kept = sinks + (count > first_kept ? count - first_kept : 0);
    for (int64_t i = threadIdx.x; i < kept * kVectors; i += kThreads) {
      const int64_t k = i / kVectors, index = k < sinks ? k : first_kept + k - sinks;
      if (index >= count) break;
      const int vector = static_cast<int>(i % kVectors);
      appending.recent(before + index)[vector] = appending.added(index, vector);
    }
    return;
  }
  const int64_t index = old.pages + blockIdx.x;
  if (!pack || index >= now.pages) return;
  const int64_t page = c.page_table[sequence * c.max_pages + index];
  if (page < 0 || page >= c.num_pages) return;
  const PageFormat format = IsValue ? c.value_format : c.key_format;
  const int64_t bytes = IsValue ? value_page_bytes(Channels, format) : key_page_bytes(Channels, format);
  appending.pack(room, c.sinks + index * kPageTokens, format,
                 (IsValue ? c.value_pages : c.key_pages) + (page * c.heads + row % c.heads) * bytes);
}

template <class Real16, int Channels>
union PackRoom {
  DenseRoom<Channels> dense;
  typename SparsePacker<Real16, Channels, false>::Room keys;
  typename SparsePacker<Real16, Channels, true>::Room values;
};

template <class Real16, int Channels>
__global__ void __launch_bounds__(kThreads) append_kernel(KvAppendArgs args, bool pack, bool store) {
  __shared__ alignas(16) uint8_t room[sizeof(PackRoom<Real16, Channels>)];
  if (blockIdx.z == 0)
    append<Real16, Channels, false>(args, room, pack, store);
  else
    append<Real16, Channels, true>(args, room, pack, store);
}

}  // namespace

cudaError_t launch_sparse_kv_append(const KvAppendArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  const auto launch = [&](bool pack, bool store) {
    const int64_t pages = pack ? args.count / kPageTokens + 1 : 0;
    const dim3 grid(static_cast<unsigned>(pages + 1), static_cast<unsigned>(c.batch * c.heads), 2);
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

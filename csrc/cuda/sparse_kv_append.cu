// SPDX-License-Identifier: MIT
// New tokens into the native key-value cache (kv_page.h): a block packs the keys or the values of one page
// of one head, staged in shared memory; the last block of a head puts the new tokens into the ring.
#include "../kv_page.h"
#include "dependent_launch.cuh"
#include "launch.h"
#include "memory.cuh"
#include "sparse_kv_pack.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = kPackThreads;

template <class Real16, int Channels, bool IsValue, PageKind Kind>
struct PagePacker {
  using type = SparsePacker<Real16, Channels, IsValue, Kind>;
};
template <class Real16, int Channels, bool IsValue>
struct PagePacker<Real16, Channels, IsValue, PageKind::kDense> {
  using type = DensePacker<Real16, Channels, IsValue>;
};

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

  __device__ __forceinline__ uint4 vector(int64_t position, int i) const {
    return position < before ? recent(position)[i] : added(position - before, i);
  }

  // Packs the 64 tokens from a position on, where they are before anything has moved.
  template <PageKind Kind>
  __device__ __forceinline__ void pack(void* room, int64_t first, PageFormat format, uint8_t* page) const {
    using Packer = PagePacker<Real16, Channels, IsValue, Kind>::type;
    const int thread = static_cast<int>(threadIdx.x);
    Packer packer{*static_cast<typename Packer::Room*>(room), format, page, thread};
    constexpr int kEach = kPageTokens * kVectors / kThreads;
    if (first >= before && args.cache.means == nullptr) {  // a prompt's
      const auto* from = static_cast<const uint4*>(IsValue ? args.values : args.keys) +
                         (row * args.count + first - before) * kVectors + thread;
      uint4 v[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) v[j] = __ldcs(from + j * kThreads);
#pragma unroll
      for (int j = 0; j < kEach; ++j) packer.put(thread + j * kThreads, v[j]);
    } else {
#pragma unroll 1
      for (int i = thread; i < kPageTokens * kVectors; i += kThreads)
        packer.put(i, vector(first + i / kVectors, i % kVectors));
    }
    __syncthreads();  // x
    packer.run();
  }
};

// Grid: (pages that may become full and blocks that store, sequences · heads, keys or values, or the latter
// alone). Both steps in one launch only where no new token takes the slot of one that is being packed: one
// token at a time.
template <class Real16, int Channels, bool IsValue, PageKind Kind>
__device__ __forceinline__ void append(const KvAppendArgs& args, void* room, int pages) {
  const KvCacheArgs& c = args.cache;
  const unsigned head = blockIdx.y % static_cast<unsigned>(c.heads);
  const int64_t row = blockIdx.y, sequence = blockIdx.y / static_cast<unsigned>(c.heads),
                before = c.lens[sequence] < 0 ? 0 : c.lens[sequence];
  int64_t count = args.counts != nullptr ? args.counts[sequence] : args.count;
  count = count < 0 ? 0 : (count < args.count ? count : args.count);
  const SequenceParts old = parts_of(c, before), now = parts_of(c, before + count);
  const Appending<Real16, Channels, IsValue> appending{args, row, before};
  if (static_cast<int>(blockIdx.x) >= pages) {
    // Those that stay: sinks, and what no page has.
    constexpr int kVectors = appending.kVectors;
    const int64_t behind = c.sinks + now.ring_first, first_kept = behind > before ? behind - before : 0;
    const int64_t sinks =
        before < c.sinks ? (c.sinks - before < first_kept ? c.sinks - before : first_kept) : 0;
    const int64_t kept = sinks + (count > first_kept ? count - first_kept : 0);
    const int64_t blocks = gridDim.x - pages;
    for (int64_t i = (blockIdx.x - pages) * kThreads + threadIdx.x; i < kept * kVectors;
         i += blocks * kThreads) {
      const int64_t k = i / kVectors, index = k < sinks ? k : first_kept + k - sinks;
      if (index >= count) break;
      const int vector = static_cast<int>(i % kVectors);
      appending.recent(before + index)[vector] = appending.added(index, vector);
    }
    return;
  }
  const int64_t index = old.pages + blockIdx.x;
  if (index >= now.pages) return;
  const int64_t page = c.page_table[sequence * c.max_pages + index];
  if (page < 0 || page >= c.num_pages) return;
  const PageFormat format = IsValue ? c.value_format : c.key_format;
  const int64_t bytes = IsValue ? value_page_bytes(Channels, format) : key_page_bytes(Channels, format);
  uint8_t* to = (IsValue ? c.value_pages : c.key_pages) + (page * c.heads + head) * bytes;
  const int64_t first = c.sinks + index * kPageTokens;
  appending.template pack<Kind>(room, first, format, to);
}

template <class Real16, int Channels, PageKind Kind>
union PackRoom {
  typename PagePacker<Real16, Channels, false, Kind>::type::Room keys;
  typename PagePacker<Real16, Channels, true, Kind>::type::Room values;
};

// Of a multiprocessor: as many as registers are there for without many spills.
template <int Channels, PageKind Kind>
constexpr int kBlocks = Kind == PageKind::kDense ? 7 : (Channels == 256 ? 3 : 8);
template <>
constexpr int kBlocks<128, PageKind::kBitmap> = 6;

template <class Real16, int Channels, PageKind Kind>
__global__ void __launch_bounds__(kThreads, kBlocks<Channels, Kind>)
    append_kernel(KvAppendArgs args, int pages, unsigned first_side) {
  __shared__ alignas(16) uint8_t room[sizeof(PackRoom<Real16, Channels, Kind>)];
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (first_side + blockIdx.z == 0)
    append<Real16, Channels, false, Kind>(args, room, pages);
  else
    append<Real16, Channels, true, Kind>(args, room, pages);
}

}  // namespace

cudaError_t launch_sparse_kv_append(const KvAppendArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  Device device;
  cudaError_t status = device.read();
  const auto launch_sides = [&](int64_t pages, int64_t stores, unsigned first_side, unsigned sides,
                                PageKind kind) {
    const dim3 grid(static_cast<unsigned>(pages + stores), static_cast<unsigned>(c.batch * c.heads), sides);
    const DependentLaunch launch(grid, kThreads, device, stream);
    const auto launch_kind = [&](auto channels, auto kind) {
      const auto kernel = c.type == Real::kFloat16 ? append_kernel<Half, channels.value, kind.value>
                                                   : append_kernel<BFloat16, channels.value, kind.value>;
      if (status == cudaSuccess)
        status = cudaLaunchKernelEx(&launch.config, kernel, args, static_cast<int>(pages), first_side);
    };
    const auto launch_of = [&](auto channels) {
      const auto of = [&]<PageKind Kind>() {
        launch_kind(channels, std::integral_constant<PageKind, Kind>{});
      };
      switch (kind) {
        case PageKind::kDense: of.template operator()<PageKind::kDense>(); break;
        case PageKind::kBitmap: of.template operator()<PageKind::kBitmap>(); break;
        case PageKind::kFourOfEight: of.template operator()<PageKind::kFourOfEight>(); break;
      }
    };
    if (c.channels == 64) launch_of(std::integral_constant<int, 64>{});
    if (c.channels == 128) launch_of(std::integral_constant<int, 128>{});
    if (c.channels == 256) launch_of(std::integral_constant<int, 256>{});
  };
  const PageKind key_kind = c.key_format.kind, value_kind = c.value_format.kind;
  const bool alike = key_kind == value_kind;
  const auto launch = [&](int64_t pages, int64_t stores) {
    launch_sides(pages, stores, 0, alike ? 2 : 1, key_kind);
    if (!alike) launch_sides(pages, stores, 1, 1, value_kind);
  };
  const int64_t pages = args.count / kPageTokens + 1;
  if (args.count == 1) {
    launch(pages, 1);
    return status;
  }
  launch(pages, 0);
  // A block stores a few vectors for each thread, of what at most stays.
  const int64_t kept = args.count < c.recent ? args.count : c.recent;
  launch(0, kept / 32 + 1);
  return status;
}

}  // namespace quantgemm

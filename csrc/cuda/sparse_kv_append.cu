// SPDX-License-Identifier: MIT
// New tokens into the native key-value cache (kv_page.h): a block packs the keys or the values of one page of
// one head, of two dense ones, staged in shared memory; others put new tokens into the ring, in the same
// launch. Of few tokens these may still want their rotary embedding, and a block more does the queries'.
#include <algorithm>

#include "../kv_page.h"
#include "dependent_launch.cuh"
#include "launch.h"
#include "memory.cuh"
#include "rotary.cuh"
#include "sparse_kv_pack.cuh"

namespace quantgemm {
namespace {

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
  unsigned row;
  int before;
  static constexpr int kVectors = Channels / 8;

  __device__ __forceinline__ uint4* recent(int64_t position) const {
    const KvCacheArgs& c = args.cache;
    return static_cast<uint4*>(IsValue ? c.recent_values : c.recent_keys) +
           (int64_t{row} * c.recent + recent_slot(c, position)) * kVectors;
  }
  // Vector i of a token that has just come, as it will be kept.
  __device__ __forceinline__ uint4 added(int64_t index, int i) const {
    const KvCacheArgs& c = args.cache;
    const auto* from = static_cast<const uint4*>(IsValue ? args.values : args.keys);
    const uint4 v = __ldg(from + (int64_t{row} * args.count + index) * kVectors + i);
    if (c.means == nullptr) return v;
    const int64_t mean = (IsValue ? c.batch * c.heads : 0) + row;
    return centred(v, __ldg(static_cast<const uint4*>(c.means) + mean * kVectors + i), Real16{});
  }

  __device__ __forceinline__ uint4 vector(int position, int i) const {
    return position < before ? recent(position)[i] : added(position - before, i);
  }

  // Number `index` of the sequence's pages, of this head; null: it has no place.
  __device__ __forceinline__ uint8_t* page(unsigned sequence, int index, PageFormat format) const {
    const KvCacheArgs& c = args.cache;
    const auto page =
        static_cast<unsigned>(c.page_table[sequence * static_cast<unsigned>(c.max_pages) + index]);
    const int64_t bytes = IsValue ? value_page_bytes(Channels, format) : key_page_bytes(Channels, format);
    const unsigned place = page * static_cast<unsigned>(c.heads) + blockIdx.y;
    return page >= static_cast<unsigned>(c.num_pages)
               ? nullptr
               : (IsValue ? c.value_pages : c.key_pages) + uint64_t{place} * static_cast<uint32_t>(bytes);
  }

  // Packs the tokens of page number `index` and, if there are more, those of the next, where they are before
  // anything has moved.
  template <PageKind Kind>
  __device__ __forceinline__ void pack(void* room, unsigned sequence, int index, int pages) const {
    using Packer = PagePacker<Real16, Channels, IsValue, Kind>::type;
    constexpr int kThreads = Packer::kThreads, kPages = Packer::kPages;
    const int first = static_cast<int>(args.cache.sinks) + index * kPageTokens;
    int thread;  // as if it were new for each page: what follows from it need not be kept. PTX ISA 10.1
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    thread &= kThreads - 1;
    auto& packer_room = *static_cast<typename Packer::Room*>(room);
    // A warp has 16 tokens: vectors that are neighbours.
    constexpr int kEach = kPages * kPageTokens * kVectors / kThreads, kStep = 32 / kVectors * Packer::kStride;
    const int own = thread / 32 * (32 * kEach) + thread % 32;
    uint16_t* to = packer_room.x + own / kVectors * Packer::kStride + own % kVectors * 8;
    const int own_index = index + (kPages > 1 ? thread / Packer::kOfPage : 0);
    const bool is_there = kPages == 1 || own_index < pages;
    if (!is_there) {
      // No page: whatever is in the room is coded, and not stored.
    } else if (first >= before && args.cache.means == nullptr) {  // a prompt's
      const auto* from = static_cast<const uint4*>(IsValue ? args.values : args.keys) +
                         uint64_t{row * static_cast<unsigned>(args.count) + (first - before)} * kVectors +
                         own;
#pragma unroll
      for (int j = 0; j < kEach; ++j) cp_async16(shared_address(to + j * kStep), from + 32 * j);
      cp_async_commit();
    } else {
#pragma unroll 1
      for (int j = 0; j < kEach; ++j) {
        const int i = own + 32 * j;
        *reinterpret_cast<uint4*>(to + j * kStep) = vector(first + i / kVectors, i % kVectors);
      }
    }
    const PageFormat wanted = IsValue ? args.cache.value_format : args.cache.key_format;
    const PageFormat format{Kind, wanted.bits, wanted.keep};
    // While they are on their way.
    uint8_t* const place = is_there ? page(sequence, own_index, format) : nullptr;
    cp_async_wait<0>();
    if (kPages > 1 || place != nullptr) Packer{packer_room, format, place, thread}.run();
  }
};

// What a block of the grid (pages that may become full and blocks that store, heads, sequences of keys or
// values) has to do: with dense pages, with two of them. A new token may take the slot of one that is being
// packed, if it is not the only one: then the first block that stores packs the pages with tokens of the
// ring, and stores all. A thread has 64 values only, so each instruction here counts: no number of tokens
// needs 64 bits.
struct AppendPlan {
  int before, count, old_pages, pages;
  int store;  // which of the blocks that store, or negative

  __device__ __forceinline__ AppendPlan(const KvAppendArgs& args, unsigned sequence, int page_blocks) {
    const KvCacheArgs& c = args.cache;
    const int most = static_cast<int>(args.count);
    before = clamped(c.lens[sequence], kMostTokens);
    count = args.counts != nullptr ? clamped(args.counts[sequence], most) : most;
    old_pages = pages_of(c, before), pages = pages_of(c, before + count);
    store = static_cast<int>(blockIdx.x) - page_blocks;
  }
  static constexpr int kMostTokens = 1 << 30;
  static __device__ __forceinline__ int clamped(int64_t tokens, int most) {
    const int high = static_cast<int>(tokens >> 32);
    const auto low = static_cast<int>(min(static_cast<uint32_t>(tokens), static_cast<uint32_t>(most)));
    return high == 0 ? low : (high < 0 ? 0 : most);
  }
  // As parts_of has it.
  static __device__ __forceinline__ int pages_of(const KvCacheArgs& c, int tokens) {
    const int behind = tokens - static_cast<int>(c.sinks) - static_cast<int>(c.window);
    const int pages = min(max(behind, 0) / kPageTokens, static_cast<int>(c.max_pages));
    return static_cast<int>(whole_pages(pages, c.key_format));
  }
  static __device__ __forceinline__ int first_of(const KvCacheArgs& c, int index) {
    return static_cast<int>(c.sinks) + index * kPageTokens;
  }
  __device__ __forceinline__ bool by_who_stores(const KvCacheArgs& c, int index) const {
    return first_of(c, index) < before &&
           before + count > first_of(c, old_pages) + static_cast<int>(ring_slots(c));
  }
  // The first of the block's n-th `together` pages, or -1.
  __device__ __forceinline__ int page(const KvCacheArgs& c, int n, int together) const {
    if (store > 0 || (store < 0 && n > 0)) return -1;
    const int index = old_pages + (store < 0 ? static_cast<int>(blockIdx.x) : n) * together;
    return index < pages && by_who_stores(c, index) == (store == 0) ? index : -1;
  }
};

// Of a block.
template <PageKind Kind>
constexpr int kThreadsOf = PagePacker<Half, 64, false, Kind>::type::kThreads;
template <PageKind Kind>
constexpr int kPagesOf = PagePacker<Half, 64, false, Kind>::type::kPages;

template <class Real16, int Channels, bool IsValue, PageKind Kind>
__device__ __forceinline__ void append(const KvAppendRotatedArgs& all, void* room, int page_blocks,
                                       unsigned sequence) {
  const KvAppendArgs& args = all.append;
  const KvCacheArgs& c = args.cache;
  const unsigned row = sequence * static_cast<unsigned>(c.heads) + blockIdx.y;
  constexpr int kThreads = kThreadsOf<Kind>;
#pragma unroll 1
  for (int n = 0;; ++n) {
    // Anew for each page: registers are scarce.
    const AppendPlan plan(args, sequence, page_blocks);
    const int index = plan.page(c, n, kPagesOf<Kind>);
    if (index < 0) break;
    const Appending<Real16, Channels, IsValue> appending{args, row, plan.before};
    appending.template pack<Kind>(room, sequence, index, plan.pages);
    if (static_cast<int>(blockIdx.x) < page_blocks) return;
    __syncthreads();  // room is free, and all tokens have been read
  }
  const AppendPlan plan(args, sequence, page_blocks);
  if (plan.store < 0) return;
  const bool is_alone = plan.old_pages < plan.pages && plan.by_who_stores(c, plan.old_pages);
  if (is_alone && plan.store > 0) return;
  // Those that stay: sinks, and what no page has.
  const Appending<Real16, Channels, IsValue> appending{args, row, plan.before};
  constexpr int kVectors = appending.kVectors;
  const int before = plan.before, behind = AppendPlan::first_of(c, plan.pages),
            own_sinks = static_cast<int>(c.sinks), first_kept = max(behind - before, 0),
            sinks = max(min(own_sinks - before, first_kept), 0);
  const int kept = sinks + max(plan.count - first_kept, 0);
  const bool is_rotated = all.rotary.cos != nullptr;  // few tokens: one block stores
  const int blocks = is_alone || is_rotated ? 1 : static_cast<int>(gridDim.x) - page_blocks;
  for (int i = plan.store * kThreads + static_cast<int>(threadIdx.x); i < kept * kVectors;
       i += blocks * kThreads) {
    const int k = i / kVectors, index = k < sinks ? k : first_kept + k - sinks, vector = i % kVectors;
    if (index >= plan.count) break;
    uint4* const to = appending.recent(before + index) + vector;
    const int head = static_cast<int>(blockIdx.y);
    if (!is_rotated)
      *to = appending.added(index, vector);
    else if constexpr (IsValue)
      *to = reinterpret_cast<const uint4*>(token_of<Real16>(all.values, sequence, head, index))[vector];
    else
      *to = turned_vector<Real16, Channels>(all.rotary, all.rotary.sides[1], sequence, head, index, vector);
  }
}

// Queries of the block's key-value head, by this block and the one of the other side.
template <class Real16, int Channels>
__device__ __forceinline__ void rotate_queries(const RotaryArgs& args, int64_t sequence, unsigned side) {
  constexpr int kVectors = Channels / 8;
  const int heads = static_cast<int>(args.sides[0].heads), tokens = static_cast<int>(args.tokens);
  const int groups = heads / static_cast<int>(gridDim.y), threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(side) * threads + static_cast<int>(threadIdx.x);
       i < groups * tokens * kVectors; i += 2 * threads) {
    const int vector = i % kVectors, token = i / kVectors % tokens,
              head = static_cast<int>(blockIdx.y) * groups + i / kVectors / tokens;
    static_cast<uint4*>(args.sides[0].out)[((sequence * heads + head) * tokens + token) * kVectors + vector] =
        turned_vector<Real16, Channels>(args, args.sides[0], sequence, head, token, vector);
  }
}

template <class Real16, int Channels, PageKind Kind>
union PackRoom {
  typename PagePacker<Real16, Channels, false, Kind>::type::Room keys;
  typename PagePacker<Real16, Channels, true, Kind>::type::Room values;
};

// Of a multiprocessor: as many as registers, and shared memory, are there for without many spills.
template <int Channels, PageKind Kind>
constexpr int kBlocks = Channels == 256 ? 3 : (Kind == PageKind::kDense ? 4 : 8);

template <class Real16, int Channels, PageKind Kind>
__global__ void __launch_bounds__(kThreadsOf<Kind>, kBlocks<Channels, Kind>)
    append_kernel(KvAppendRotatedArgs args, int pages, unsigned first_side, unsigned both_sides) {
  extern __shared__ uint4 room[];  // PackRoom
  // Values in a launch of their own: that of the keys has waited for all before it. This one ends no sooner.
  const bool is_second = first_side == 1;
  if (!is_second) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  const unsigned sequence = blockIdx.z >> both_sides, side = first_side + (blockIdx.z & both_sides);
  if (args.rotary.cos != nullptr && blockIdx.x + 1 == gridDim.x)
    rotate_queries<Real16, Channels>(args.rotary, sequence, side);
  else if (side == 0)
    append<Real16, Channels, false, Kind>(args, room, pages, sequence);
  else
    append<Real16, Channels, true, Kind>(args, room, pages, sequence);
  // A kernel ends with its last block: for the next one, which waits for this one alone, one is enough.
  if (is_second && (blockIdx.x | blockIdx.y | blockIdx.z) == 0) wait_for_previous_kernel();
}

}  // namespace

cudaError_t launch_sparse_kv_append_rotated(const KvAppendRotatedArgs& all, cudaStream_t stream) {
  const KvAppendArgs& args = all.append;
  const KvCacheArgs& c = args.cache;
  Device device;
  cudaError_t status = device.read();
  // Of one kind, so many of a sequence's pages and blocks that store.
  const auto launch_sides = [&](unsigned first_side, unsigned sides, PageKind kind) {
    const auto launch_kind = [&](auto channels, auto of) {
      constexpr PageKind kKind = of.value;
      // A block that stores has a few vectors for each thread, of what at most stays.
      const int64_t kept = args.count < c.recent ? args.count : c.recent;
      const int64_t stores = args.count == 1 ? 1 : kept / 32 + 1;
      // How many leave at once is the keys' matter, of values of another kind too.
      const int more = std::max(kPagesOf<kKind>, pages_together(c.key_format));
      const int64_t pages = (args.count / kPageTokens + more) / kPagesOf<kKind>;
      const dim3 grid(static_cast<unsigned>(pages + stores + (all.rotary.cos != nullptr)),
                      static_cast<unsigned>(c.heads), static_cast<unsigned>(c.batch) * sides);
      constexpr int kShared = static_cast<int>(sizeof(PackRoom<Half, channels.value, kKind>));
      const auto kernel = c.type == Real::kFloat16 ? append_kernel<Half, channels.value, kKind>
                                                   : append_kernel<BFloat16, channels.value, kKind>;
      if (kShared > 48 << 10 && status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
      const DependentLaunch launch(grid, kThreadsOf<kKind>, device, stream, kShared);
      if (status == cudaSuccess)
        status =
            cudaLaunchKernelEx(&launch.config, kernel, all, static_cast<int>(pages), first_side, sides - 1);
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
  launch_sides(0, alike ? 2 : 1, key_kind);
  if (!alike) launch_sides(1, 1, value_kind);
  return status;
}

cudaError_t launch_sparse_kv_append(const KvAppendArgs& args, cudaStream_t stream) {
  return launch_sparse_kv_append_rotated({args, {}, {}}, stream);
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// The kernel of attention over the native key-value cache: pages and recent tokens are dealt to warps
// (sparse_kv_attention_warp.cuh), whose sums meet in shared memory. One part of the context per block; few
// parts may be a cluster, whose blocks add them up.
#pragma once
#include "dependent_launch.cuh"
#include "launch.h"
#include "sparse_kv_attention_warp.cuh"
#include "tensor_copy.cuh"

namespace quantgemm {

inline constexpr int kMostWarps = 8;  // of a block; it has all or half of them (attention_cut)
// Warps whose registers fit a multiprocessor.
inline constexpr int resident_warps(int64_t channels) { return channels == 256 ? 8 : 16; }
// Of the queries in shared memory.
inline constexpr int64_t query_bytes(int64_t channels) { return 16 * channels; }
// Shared memory of a block: tables, queries, then a page of keys and one of values for each warp. Later the
// room is that of the sums. Counts of a bitmap that no page has may lead as far as if all bits were set.
int64_t attention_shared(const KvCacheArgs& cache, int warps);
inline constexpr int kStaticShared = 512 + kReservedShared;  // of a block, besides

// What is stored of a query head: its sums may have been less by the means of the cache.
template <class Real16>
struct AttentionResult {
  const KvAttentionArgs& args;
  int64_t head;  // of all sequences

  __device__ __forceinline__ float mean(bool value, int channel) const {
    const KvCacheArgs& c = args.cache;
    const int64_t row = (value ? c.batch * c.heads : 0) + head / args.groups;
    return to_float(static_cast<const Real16*>(c.means)[row * c.channels + channel]);
  }
  __device__ __forceinline__ void store(int channel, float sum, float mass) const {
    const float own = args.cache.means == nullptr ? 0.0f : mean(true, channel);
    store1(static_cast<Real16*>(args.out) + head * args.cache.channels + channel,
           mass == 0.0f ? 0.0f : sum / mass + own);
  }
  // By a warp. What the keys are less by is the same for all tokens, so the weights do not know of it.
  __device__ __forceinline__ void store_logarithm(float top, float mass) const {
    const int lane = static_cast<int>(threadIdx.x % 32), channels = static_cast<int>(args.cache.channels);
    float logit = 0.0f;
    if (args.cache.means != nullptr) {
      for (int i = lane; i < channels; i += 32)
        logit += to_float(static_cast<const Real16*>(args.query)[head * channels + i]) * mean(false, i);
      for (int step = 1; step < 32; step *= 2) logit += __shfl_xor_sync(~0u, logit, step);
    }
    if (lane == 0)
      args.lse[head] = top == -INFINITY && mass == mass
                           ? -INFINITY
                           : (top + log2f(mass)) / 1.4426950408889634f + logit * args.scale;
  }
};

// A channel's sums in few parts of the context, each with its own maximum (in powers of 2) and mass.
inline constexpr int kFewParts = 8;
struct FewParts {
  float sums[kFewParts], tops[kFewParts], masses[kFewParts];

  // Part: from its number to its sum, maximum and mass.
  template <class Part>
  __device__ __forceinline__ FewParts(int split, Part&& part) {
#pragma unroll
    for (int s = 0; s < kFewParts; ++s) {
      sums[s] = masses[s] = 0.0f, tops[s] = -INFINITY;
      if (s < split) part(s, sums[s], tops[s], masses[s]);
    }
  }
  __device__ __forceinline__ void merge(float& sum, float& top, float& mass) const {
    top = tops[0], mass = sum = 0.0f;
#pragma unroll
    for (int s = 1; s < kFewParts; ++s) top = fmaxf(top, tops[s]);
#pragma unroll
    for (int s = 0; s < kFewParts; ++s) {
      const float factor = tops[s] == -INFINITY ? 0.0f : fast_exp2(tops[s] - top);
      mass += factor * masses[s], sum += factor * sums[s];
    }
  }
};

// The blocks of a cluster share out the channels of all columns. Each has left [sums, maxima, masses]
// [8 columns][channels] in its shared memory, of maxima and masses those of channel 0.
template <class Real16, int Channels>
__device__ __forceinline__ void merge_in_cluster(const KvAttentionArgs& args, int64_t head, int columns,
                                                 const float* left) {
#if __CUDA_ARCH__ >= 900
  const auto load = [](const float* own, int block) {
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];"
                 : "=f"(v)
                 : "r"(address_in(shared_address(own), block))
                 : "memory");
    return v;
  };
  sync_cluster();  // all have left theirs
  const int threads = static_cast<int>(blockDim.x), split = static_cast<int>(gridDim.x);
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < columns * Channels;
       i += split * threads) {
    const int column = i / Channels, channel = i % Channels;
    const FewParts parts(split, [&](int s, float& sum, float& top, float& mass) {
      const float* own = left + column * Channels;
      sum = load(own + channel, s), top = load(own + 8 * Channels, s), mass = load(own + 16 * Channels, s);
    });
    float sum, top, mass;
    parts.merge(sum, top, mass);
    const AttentionResult<Real16> result{args, head + column};
    result.store(channel, sum, mass);
    if (channel < 32) result.store_logarithm(top, mass);  // a whole warp
  }
  // Nobody ends while others read. What was read has been used, so nothing needs to be waited for, the
  // stores least of all.
  asm volatile("barrier.cluster.arrive.relaxed;\n barrier.cluster.wait;" ::: "memory");
#endif
}

// Grid: (splits, sequences · key-value heads, query heads / 8), a cluster for all splits or none.
template <class Real16, int Channels, class Keys, class Values>
__global__ void __launch_bounds__(32 * kMostWarps, resident_warps(Channels) / kMostWarps)
    attention_kernel(KvAttentionArgs args, bool in_clusters) {
  using Warp = AttentionWarp<Real16, Channels, Keys, Values>;
  constexpr int kTables = Keys::kTableBytes + (std::is_same_v<Keys, Values> ? 0 : Values::kTableBytes);
  extern __shared__ uint4 room[];
  const KvCacheArgs& c = args.cache;
  const int thread = static_cast<int>(threadIdx.x), warp_index = thread / 32;
  const int threads = static_cast<int>(blockDim.x), block_warps = threads / 32;
  const int64_t row = blockIdx.y, sequence = row / c.heads, first_head = 8 * int64_t{blockIdx.z};
  auto* tables = reinterpret_cast<uint32_t*>(room);
  uint4* queries = room + kTables / 16;
  uint8_t* stage = reinterpret_cast<uint8_t*>(queries) + 16 * Channels +
                   warp_index * (Warp::staged_key_bytes(c) + Warp::value_bytes(c));
  Warp warp(args, stage, queries, tables, row, first_head);
  Keys::make_table(tables);
  if constexpr (!std::is_same_v<Keys, Values>) Values::make_table(tables + Keys::kTableBytes / 4);
  wait_for_previous_kernel();
  const SequenceParts parts = parts_of(c, c.lens[sequence]);

  // Pages in equal parts to the warps of all splits, recent tokens by 16 to one block after the other. (All
  // recent tokens to the first warps, with fewer pages, is slower: 16 after 16 of them come from far away.)
  const int64_t warps = args.split * block_warps, own = int64_t{blockIdx.x} * block_warps + warp_index;
  const int begin = static_cast<int>(parts.pages * own / warps),
            end = static_cast<int>(parts.pages * (own + 1) / warps);
  const int32_t* table = c.page_table + sequence * c.max_pages;
  int entries = -1;  // lanes have 32 neighbouring entries of the table
  const auto page_at = [&](int i) {
    if (i == begin || i % 32 == 0) {
      const int own = i - i % 32 + warp.lane;
      entries = own < parts.pages ? __ldg(table + own) : -1;
      if (entries >= c.num_pages) entries = -1;
    }
    PagePlace place{__shfl_sync(~0u, entries, i % 32), -1, i % 2 != 0};
    if (i >= end) place.page = -1;
    if constexpr (!Warp::kSparseKeys) {
      place.other = __shfl_sync(~0u, entries, i % 32 ^ 1);
      if (place.other < 0) place.page = -1;
      if (place.is_odd && i > begin) place.other = -1;  // with the one before came the fits
    }
    return place;
  };
  PagePlace place = page_at(begin);
  warp.fetch_keys(place), warp.fetch_values(place.page);
  bool is_there = place.page >= 0;
  if (warp_index == 0) warp.load_query();
  __syncthreads();  // queries and tables
  const int first_slot = static_cast<int>(parts.ring_first % ring_slots(c));
  const int recent = static_cast<int>(parts.sinks + parts.ring_end - parts.ring_first);
  // By turns and, where there are no pages, from the first on: then 16 tokens are the same warp's however
  // many come after them, and a sum is the same bit for bit. Before pages the last 16 are complete
  // (add_recent).
  const int beyond = parts.pages > 0 ? -recent & 15 : 0;
#pragma unroll 1
  for (int i = 16 * static_cast<int>(warp_index * args.split + blockIdx.x) - beyond; i < recent;
       i += 16 * static_cast<int>(warps))
    warp.add_recent(parts, first_slot, i, recent);
  warp.begin_pages();
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const PagePlace next = page_at(i + 1);
    if (is_there)
      warp.add_page(next);
    else
      warp.fetch_keys(next), warp.fetch_values(next.page);
    is_there = next.page >= 0;
  }
  let_next_kernel_start();
  cp_async_wait<0>();
  __syncthreads();  // from here on the room is that of the sums

  // The warps' sums meet in shared memory.
  auto& out = *reinterpret_cast<float (*)[kMostWarps][8][Channels]>(room);
  __shared__ float maxima[kMostWarps][8], masses[kMostWarps][8];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int step = 4; step < 32; step *= 2) warp.mass[j] += __shfl_xor_sync(~0u, warp.mass[j], step);
    const int column = warp.lane % 4 * 2 + j;
    if (warp.lane < 4) {
      maxima[warp_index][column] = warp.mass[j] == 0.0f ? -INFINITY : warp.maximum[j];
      masses[warp_index][column] = warp.mass[j];
    }
    const float shift = warp.shifts[0][j] + warp.shifts[1][j + 2];
#pragma unroll
    for (int m = 0; m < Warp::kSteps; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        out[warp_index][column][warp.channel(2 * m + h, warp.lane / 4)] =
            fmaf(warp.out[m][2 * h + j], Values::value_unit(2 * m + h), shift);
  }
  __syncthreads();
  // Their maximum, mass and the sum of a channel; warps come in fours.
  const auto merged = [&](int column, int channel) {
    float3 all = {-INFINITY, 0.0f, 0.0f};
#pragma unroll 1
    for (int first_warp = 0; first_warp < block_warps; first_warp += 4)
#pragma unroll
      for (int w = 0; w < 4; ++w) all.x = fmaxf(all.x, maxima[first_warp + w][column]);
#pragma unroll 1
    for (int first_warp = 0; first_warp < block_warps; first_warp += 4)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int w = first_warp + i;
        const float top = maxima[w][column], factor = top == -INFINITY ? 0.0f : fast_exp2(top - all.x);
        all.y += factor * masses[w][column];
        all.z += factor == 0.0f ? 0.0f : factor * out[w][column][channel];
      }
    return all;
  };
  const int64_t heads = c.batch * c.heads * args.groups, left = args.groups - first_head;
  const int columns = static_cast<int>(left < 8 ? left : 8);
  const int64_t head = row * args.groups + first_head;
  float* partial = args.partial + (blockIdx.x * heads + head) * (Channels + 2);
#pragma unroll 1
  for (int i = thread; i < columns * Channels; i += threads) {
    const int column = i / Channels, channel = i % Channels;
    const float3 all = merged(column, channel);
    if (args.split == 1) {
      const AttentionResult<Real16> result{args, head + column};
      result.store(channel, all.z, all.y);
      if (channel < 32) result.store_logarithm(all.x, all.y);  // a whole warp
    } else if (in_clusters) {                                  // where only this thread has read
      out[0][column][channel] = all.z;
      if (channel == 0) out[1][column][0] = all.x, out[2][column][0] = all.y;
    } else {
      float* own_part = partial + column * (Channels + 2);
      own_part[channel] = all.z;
      if (channel == 0) own_part[Channels] = all.x, own_part[Channels + 1] = all.y;
    }
  }
  if (in_clusters) merge_in_cluster<Real16, Channels>(args, head, columns, out[0][0]);
}

// Keys and values in pages of one kind.
template <int Channels, template <int> class Codes>
cudaError_t launch_attention_of(const KvAttentionArgs& args, int warps, bool in_clusters,
                                cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(args.split), static_cast<unsigned>(c.batch * c.heads),
                  static_cast<unsigned>((args.groups + 7) / 8));
  const auto launch = [&]<class Keys, class Values>(std::type_identity<Keys>, std::type_identity<Values>) {
    const int bytes = static_cast<int>(attention_shared(c, warps));
    // No more shared memory than the blocks need: spilled registers want the rest as a cache.
    const int all = resident_warps(Channels) / warps * (bytes + kStaticShared);
    const int percent = all * 100 / device.shared_per_multiprocessor + 1;
    const int carveout = percent < 100 ? percent : 100;
    const auto kernel = c.type == Real::kFloat16 ? attention_kernel<Half, Channels, Keys, Values>
                                                 : attention_kernel<BFloat16, Channels, Keys, Values>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
    if (status != cudaSuccess) return status;
    const DependentLaunch launch(grid, 32 * warps, device, stream, bytes,
                                 in_clusters ? static_cast<int>(args.split) : 1);
    return cudaLaunchKernelEx(&launch.config, kernel, args, in_clusters);
  };
  using Two = std::type_identity<Codes<2>>;
  using Four = std::type_identity<Codes<4>>;
  if (c.key_format.bits == 2) return c.value_format.bits == 2 ? launch(Two{}, Two{}) : launch(Two{}, Four{});
  return c.value_format.bits == 2 ? launch(Four{}, Two{}) : launch(Four{}, Four{});
}

}  // namespace quantgemm

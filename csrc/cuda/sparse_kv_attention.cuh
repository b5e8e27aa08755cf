// SPDX-License-Identifier: MIT
// The kernel of attention over the native key-value cache: pages and recent tokens are dealt to warps
// (sparse_kv_attention_warp.cuh), whose sums meet in shared memory. One part of the context per block.
#pragma once
#include "dependent_launch.cuh"
#include "launch.h"
#include "sparse_kv_attention_warp.cuh"

namespace quantgemm {

inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = 32 * kAttentionWarps;

// Blocks whose registers fit a multiprocessor.
inline constexpr int attention_blocks(int64_t channels) { return channels == 256 ? 2 : 4; }
// Of the queries in shared memory.
inline constexpr int64_t query_bytes(int64_t channels) { return 16 * channels; }
// Shared memory of a block: tables, queries, then a page of keys and one of values for each warp. Later the
// room is that of the sums. Counts of a bitmap that no page has may lead as far as if all bits were set.
int64_t attention_shared(const KvCacheArgs& cache);

// Grid: (splits, sequences · key-value heads, query heads / 8).
template <class Real16, int Channels, class Keys, class Values>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks(Channels))
    attention_kernel(KvAttentionArgs args) {
  using Warp = AttentionWarp<Real16, Channels, Keys, Values>;
  constexpr int kTables = Keys::kTableBytes + (std::is_same_v<Keys, Values> ? 0 : Values::kTableBytes);
  extern __shared__ uint4 room[];
  const KvCacheArgs& c = args.cache;
  const int thread = static_cast<int>(threadIdx.x), warp_index = thread / 32;
  const int64_t row = blockIdx.y, sequence = row / c.heads, first_head = 8 * int64_t{blockIdx.z};
  auto* tables = reinterpret_cast<uint32_t*>(room);
  uint4* queries = room + kTables / 16;
  uint8_t* stage = reinterpret_cast<uint8_t*>(queries) + 16 * Channels +
                   warp_index * (Warp::key_bytes(c) + Warp::value_bytes(c));
  Warp warp(args, stage, queries, tables, row, first_head);
  Keys::make_table(tables);
  if constexpr (!std::is_same_v<Keys, Values>) Values::make_table(tables + Keys::kTableBytes / 4);
  wait_for_previous_kernel();
  const SequenceParts parts = parts_of(c, c.lens[sequence]);

  // Pages in equal parts to the warps of all splits, recent tokens by 16 to one block after the other. (All
  // recent tokens to the first warps, with fewer pages, is slower: 16 after 16 of them come from far away.)
  const int64_t warps = args.split * kAttentionWarps,
                own = int64_t{blockIdx.x} * kAttentionWarps + warp_index;
  const int begin = static_cast<int>(parts.pages * own / warps),
            end = static_cast<int>(parts.pages * (own + 1) / warps);
  const int32_t* table = c.page_table + sequence * c.max_pages;
  int entries = -1;  // lane i has an entry of the table
  const auto page_at = [&](int i) {
    if ((i - begin) % 32u == 0) entries = i + warp.lane < end ? __ldg(table + i + warp.lane) : -1;
    const int page = __shfl_sync(~0u, entries, (i - begin) % 32u);
    return i < end && page < c.num_pages ? page : -1;
  };
  int page = page_at(begin);
  warp.fetch_keys(page), warp.fetch_values(page);
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
    const int next = page_at(i + 1);
    if (page >= 0)
      warp.add_page(next);
    else
      warp.fetch_keys(next), warp.fetch_values(next);
    page = next;
  }
  let_next_kernel_start();
  cp_async_wait<0>();
  __syncthreads();  // from here on the room is that of the sums

  // The warps' sums meet in shared memory.
  auto& out = *reinterpret_cast<float (*)[kAttentionWarps][8][Channels]>(room);
  __shared__ float maxima[kAttentionWarps][8], masses[kAttentionWarps][8];
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
  const int64_t heads = c.batch * c.heads * args.groups, left = args.groups - first_head;
  for (int column = 0; column < (left < 8 ? left : 8); ++column) {
    float top = maxima[0][column], factors[kAttentionWarps], mass = 0.0f;
    for (int w = 1; w < kAttentionWarps; ++w) top = fmaxf(top, maxima[w][column]);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      factors[w] = maxima[w][column] == -INFINITY ? 0.0f : fast_exp2(maxima[w][column] - top);
      mass += factors[w] * masses[w][column];
    }
    float* partial =
        args.partial + (blockIdx.x * heads + row * args.groups + first_head + column) * (Channels + 2);
    for (int d = thread; d < Channels; d += kAttentionThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w)
        sum += factors[w] == 0.0f ? 0.0f : factors[w] * out[w][column][d];
      partial[d] = sum;
    }
    if (thread == 0) partial[Channels] = top, partial[Channels + 1] = mass;
  }
}

// Keys and values in pages of one kind.
template <int Channels, template <int> class Codes>
cudaError_t launch_attention_of(const KvAttentionArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(args.split), static_cast<unsigned>(c.batch * c.heads),
                  static_cast<unsigned>((args.groups + 7) / 8));
  const auto launch = [&]<class Keys, class Values>(std::type_identity<Keys>, std::type_identity<Values>) {
    const int bytes = static_cast<int>(attention_shared(c));
    // No more shared memory than the blocks need: spilled registers want the rest as a cache.
    const int all = attention_blocks(Channels) * (bytes + 256 + kReservedShared);
    const int percent = all * 100 / device.shared_per_multiprocessor + 1;
    const int carveout = percent < 100 ? percent : 100;
    const auto kernel = c.type == Real::kFloat16 ? attention_kernel<Half, Channels, Keys, Values>
                                                 : attention_kernel<BFloat16, Channels, Keys, Values>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status == cudaSuccess)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
    if (status != cudaSuccess) return status;
    const DependentLaunch launch(grid, kAttentionThreads, device, stream, bytes);
    return cudaLaunchKernelEx(&launch.config, kernel, args);
  };
  using Two = std::type_identity<Codes<2>>;
  using Four = std::type_identity<Codes<4>>;
  if (c.key_format.bits == 2) return c.value_format.bits == 2 ? launch(Two{}, Two{}) : launch(Two{}, Four{});
  return c.value_format.bits == 2 ? launch(Four{}, Two{}) : launch(Four{}, Four{});
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// Every row of logits read once: its maximum, Σ exp2((x - max)·slope), and where truncation is asked
// for, the largest key of each group of 256. A warp owns a strip of 1024 values. Limit: DRAM.
// Then, for truncated rows, the cutoff: the group maxima bound the k-th largest value from below, so
// only groups that reach the bound are read again, and what reaches it is ranked without sorting.
#include "launch.h"
#include "row_laws.cuh"

namespace quantgemm {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// PTX max.NaN: NaN wins.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
}

// grid (sequences, strips / 8, layers)
template <class T>
__global__ void __launch_bounds__(kThreads) row_stats_kernel(VerifyArgs args) {
  const RowScratch scratch = scratch_of(args);
  const int lane = threadIdx.x % 32, strip = blockIdx.y * kWarps + threadIdx.x / 32;
  if (strip >= scratch.num_strips) return;
  const SlotRow info = row_of_slot(args, blockIdx.x, blockIdx.z);
  if (!info.exists) return;
  const RowView<T> row = view_of<T>(args, info);
  const float slope = info.parameters.slope;
  constexpr int kGroups = kStrip / kGroup;
  float v[kGroups][8];
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    load_group(v[g], row, strip * kStrip + g * kGroup, lane, minus_infinity());
  uint32_t max_key = 0;
  bool bad = false;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float group_max = v[g][0];
#pragma unroll
    for (int e = 1; e < 8; ++e) group_max = max_or_nan(group_max, v[g][e]);
    if (__any_sync(~0u, is_bad_value(group_max, true))) {
      bad = true, group_max = minus_infinity();
#pragma unroll
      for (float& x : v[g]) x = clean_logit(x), group_max = fmaxf(group_max, x);
    }
    const uint32_t key = __reduce_max_sync(~0u, key_of(group_max));
    max_key = key > max_key ? key : max_key;
    if (info.parameters.truncates() && lane == 0)
      scratch.group_keys[info.slot * scratch.num_groups + strip * kGroups + g] = key;
  }
  const float max = value_of_key(max_key);
  float sum = 0.0f;
  if (max != minus_infinity()) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (const float x : v[g]) sum += relative_weight(x, max, slope);
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  }
  if (lane == 0) scratch.strips[info.slot * scratch.num_strips + strip] = {max, bad ? -sum : sum};
}

constexpr int kCapacity = 1024;

struct Shared {
  uint64_t partial[2][kWarps];
  uint64_t mass[kCapacity];
  uint32_t key[kCapacity];
  uint32_t count, best;
};

// A row being truncated, by one block. All members are the same in every thread.
template <class T>
struct Selection {
  RowView<T> row;
  const uint32_t* group_keys;
  int num_groups;
  float max, slope;
  Shared& shared;
  int turn = 0;
  uint32_t list_low = ~0u, list_high = 0;  // the list holds just the keys of [low, high)

  __device__ uint64_t mass_of(uint32_t key) const {
    return to_fixed(relative_weight(value_of_key(key), max, slope));
  }

  // Sum over the block. Two buffers in turn: one barrier is enough.
  __device__ uint64_t block_sum(uint64_t x) {
    turn ^= 1;
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared.partial[turn][threadIdx.x / 32] = x;
    __syncthreads();
    uint64_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.partial[turn][w];
    return sum;
  }

  __device__ uint32_t block_count(uint32_t x) {
    turn ^= 1;
    x = __reduce_add_sync(~0u, x);
    if (threadIdx.x % 32 == 0) shared.partial[turn][threadIdx.x / 32] = x;
    __syncthreads();
    uint32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += static_cast<uint32_t>(shared.partial[turn][w]);
    return sum;
  }

  // f(key) for every value of the row with low <= key < high.
  template <class Fn>
  __device__ void for_each(uint32_t low, uint32_t high, Fn f) {
    constexpr int kAhead = 3;  // groups in flight
    const int lane = threadIdx.x % 32;
    for (int g0 = threadIdx.x / 32; g0 < num_groups; g0 += kWarps * 32) {
      // Each lane looks at one group's maximum; the warp then visits those that reach `low`.
      const int own = g0 + lane * kWarps;
      uint32_t wanted = __ballot_sync(~0u, own < num_groups && group_keys[own] >= low);
      while (wanted) {
        float v[kAhead][8];
        int count = 0;
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (!wanted) continue;
          load_group(v[j], row, (g0 + (__ffs(wanted) - 1) * kWarps) * kGroup, lane, minus_infinity());
          wanted &= wanted - 1, ++count;
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (j >= count) continue;
#pragma unroll
          for (const float x : v[j]) {
            const uint32_t key = key_of(clean_logit(x));
            if (key >= low && key < high) f(key);
          }
        }
      }
    }
  }

  // Collects the keys of [low, high); returns how many there are, stored or not.
  __device__ int64_t gather(uint32_t low, uint32_t high) {
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    for_each(low, high, [&](uint32_t key) {
      const uint32_t at = atomicAdd(&shared.count, 1u);
      if (at < kCapacity) shared.key[at] = key, shared.mass[at] = mass_of(key);
    });
    __syncthreads();
    list_low = low, list_high = high;
    return shared.count;
  }

  __device__ bool list_has(uint32_t low, uint32_t high) const {
    return list_low <= low && list_high == high && shared.count <= kCapacity;
  }

  // Σ over keys of [low, high): their mass, or their number.
  template <bool Mass>
  __device__ uint64_t tally(uint32_t low, uint32_t high) {
    uint64_t sum = 0;
    if (list_has(low, high)) {
      for (uint32_t i = threadIdx.x; i < shared.count; i += kThreads)
        if (shared.key[i] >= low) sum += Mass ? shared.mass[i] : 1;
    } else {
      for_each(low, high, [&](uint32_t key) { sum += Mass ? mass_of(key) : 1; });
    }
    return block_sum(sum);
  }

  // The largest key x whose tally of [x, top) reaches the goal, given that low's does.
  template <bool Mass>
  __device__ uint32_t find(uint32_t low, uint32_t top, uint64_t goal) {
    uint32_t high = top;
    uint64_t base = 0;  // the tally of [high, top)
    int64_t count = list_has(low, high) ? shared.count : gather(low, high);
    while (count > kCapacity && high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      const uint64_t upper = tally<Mass>(middle, high);
      if (base + upper >= goal) {
        low = middle;
      } else {
        high = middle, base += upper;
      }
      count = gather(low, high);
    }
    if (count > kCapacity) return low;
    if (threadIdx.x == 0) shared.best = ~0u;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < shared.count; i += kThreads) {
      const uint32_t key = shared.key[i];
      uint64_t above = base;
      for (uint32_t j = 0; j < shared.count; ++j)
        if (shared.key[j] > key) above += Mass ? shared.mass[j] : 1;
      if (above < goal && key >= low) atomicMin(&shared.best, key);
    }
    __syncthreads();
    const uint32_t best = shared.best;
    __syncthreads();
    return best == ~0u ? low : best;
  }

  // A key that at least k groups reach, so that the k-th largest value does.
  __device__ uint32_t bound_of_top_k(uint32_t top, int64_t k) {
    if (num_groups < k) return 0;
    constexpr int kOwn = static_cast<int>(kMaxVocab / kGroup + kThreads) / kThreads;
    uint32_t own[kOwn], least = ~0u;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int g = threadIdx.x + j * kThreads;
      own[j] = g < num_groups ? group_keys[g] : 0;
      least = g < num_groups && own[j] < least ? own[j] : least;
    }
    if (threadIdx.x == 0) shared.best = ~0u;
    __syncthreads();
    least = __reduce_min_sync(~0u, least);
    if (threadIdx.x % 32 == 0) atomicMin(&shared.best, least);
    __syncthreads();
    uint32_t low = shared.best, high = top;
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      uint32_t reaching = 0;
#pragma unroll
      for (const uint32_t key : own) reaching += key >= middle;
      reaching = block_count(reaching);
      if (reaching >= k) {
        low = middle;
        if (reaching <= k + k / 4) break;  // close enough
      } else {
        high = middle;
      }
    }
    __syncthreads();
    return low;
  }
};

// grid (sequences, layers)
template <class T>
__global__ void __launch_bounds__(kThreads) row_cutoff_kernel(VerifyArgs args) {
  __shared__ Shared shared;
  wait_for_previous_kernel();
  const RowScratch scratch = scratch_of(args);
  const SlotRow info = row_of_slot(args, blockIdx.x, blockIdx.y);
  if (!info.exists) return;
  const int64_t slot = info.slot;
  const Parameters& s = info.parameters;
  float2 sum = combine_strips(scratch.strips + slot * scratch.num_strips, scratch.num_strips, s.slope);
  RowLaw law = law_of(sum, s.slope);
  const bool bad = signbit(sum.y);
  sum.y = fabsf(sum.y);
  if (s.truncates() && sum.x != minus_infinity()) {
    const RowView<T> row = view_of<T>(args, info);
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    Selection<T> select{row,
                        scratch.group_keys + slot * scratch.num_groups,
                        (row.length + kGroup - 1) / kGroup,
                        sum.x,
                        s.slope,
                        shared};
    const uint32_t top = key_of(sum.x) + 1, lowest = key_of(minus_infinity()) + 1;
    uint32_t low = lowest;
    if (s.top_k > 0) {
      const uint32_t bound = select.bound_of_top_k(top, s.top_k);
      // Fewer than k finite values: all of them stay.
      if (bound >= lowest || select.template tally<false>(lowest, top) >= static_cast<uint64_t>(s.top_k))
        low =
            select.template find<false>(bound > lowest ? bound : lowest, top, static_cast<uint64_t>(s.top_k));
    }
    if (s.top_p < 1.0f) {
      uint64_t total;
      if (low > lowest) {
        total = select.template tally<true>(low, top);
      } else {
        // All values below this weigh less than 1 - top_p together, with room for rounding.
        total = static_cast<uint64_t>(static_cast<double>(sum.y) * 0x1p44);
        const double share = (1.0 - static_cast<double>(s.top_p)) * 0.999 * static_cast<double>(sum.y) /
                             static_cast<double>(row.length);
        const float bound =
            static_cast<float>(static_cast<double>(sum.x) + log2(share) / static_cast<double>(s.slope));
        const uint32_t key = key_of(fmaxf(bound, -3.4028235e38f));
        low = key < top ? key : top - 1;
      }
      low = select.template find<true>(low, top, mass_to_keep(s.top_p, total));
    }
    if (s.min_p > 0.0f) {
      const uint32_t key = key_of(fmaxf(min_p_cutoff(sum.x, s), -3.4028235e38f));
      low = key > low ? key : low;
      low = low < top ? low : top - 1;
    }
    if (low > lowest) {
      law.cutoff = value_of_key(low);
      const double mass = static_cast<double>(select.template tally<true>(low, top));
      law.scale = static_cast<float>(0x1p44 / mass) * (bad ? -1.0f : 1.0f);
    }
  }
  if (threadIdx.x == 0) scratch.laws[slot] = law;
}

}  // namespace

int64_t verify_scratch_bytes(const VerifyArgs& args) {
  if (!args.target_is_logits && !args.draft_is_logits) return 0;
  const RowScratch s = scratch_of(args);
  return 2 * s.slots *
         static_cast<int64_t>(sizeof(RowLaw) + 8 * s.num_strips + (s.has_laws ? 4 * s.num_groups : 0));
}

cudaError_t launch_row_laws(const VerifyArgs& args, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  const RowScratch scratch = scratch_of(args);
  const auto sequences = static_cast<unsigned>(args.num_sequences);
  const auto layers = static_cast<unsigned>(layers_of(args));
  const dim3 grid(sequences, static_cast<unsigned>((scratch.num_strips + kWarps - 1) / kWarps), layers);
  visit_real(args.value_type, [&]<class T>(T) {
    row_stats_kernel<T><<<grid, kThreads, 0, stream>>>(args);
    if (!scratch.has_laws) return;
    Launch launch(dim3(sequences, layers), kThreads, stream);
    launch.follow_previous_kernel(major);
    error = cudaLaunchKernelEx(&launch.config, row_cutoff_kernel<T>, args);
  });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm

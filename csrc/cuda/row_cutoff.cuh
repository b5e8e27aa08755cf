// SPDX-License-Identifier: MIT
// The cutoff of a truncated row of logits, by one block: the maxima of its groups bound the k-th
// largest value from below, so only groups that reach the bound are read again, and what reaches it
// is ranked without sorting. A flat row under top-p alone is halved by passes over it.
#pragma once
#include "row_kept.cuh"

namespace quantgemm {

constexpr int kLawThreads = 512, kLawWarps = kLawThreads / 32;
constexpr int kMaxGroups = (kMaxVocab + kGroup) / kGroup, kBins = 256;
constexpr int kCapacity = 1024;

struct LawShared {
  uint32_t group_keys[kMaxGroups];
  uint64_t partial[2][kLawWarps];
  uint64_t mass[kCapacity];
  uint32_t key[kCapacity], token[kCapacity];
  uint64_t above[kCapacity];  // the mass of the keys above this one
  uint32_t rank[kCapacity];   // and their number
  uint32_t count, best, bins[kBins], num_listed;
  uint16_t listed[kMaxGroups];
};

__device__ __forceinline__ LawShared& law_shared() {  // so that all functions know it to be shared memory
  __shared__ LawShared shared;
  return shared;
}

// A row being truncated, by one block. All members are the same in every thread.
template <class T>
struct Selection {
  RowView<T> row;
  int num_groups;
  float max, slope;
  LawShared& shared;
  int turn = 0;
  uint32_t list_low = ~0u, list_high = 0;  // the list holds just the keys of [low, high)
  uint32_t listed_low = ~0u;               // and the groups listed reach this

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
    for (int w = 0; w < kLawWarps; ++w) sum += shared.partial[turn][w];
    return sum;
  }

  // Lists the groups that hold a value from `low` up.
  __device__ void list_groups(uint32_t low) {
    if (listed_low == low) return;
    listed_low = low;
    __syncthreads();
    if (threadIdx.x == 0) shared.num_listed = 0;
    __syncthreads();
#pragma unroll 1
    for (int g = threadIdx.x; g < num_groups; g += kLawThreads)
      if (shared.group_keys[g] >= low)
        shared.listed[atomicAdd(&shared.num_listed, 1u)] = static_cast<uint16_t>(g);
    __syncthreads();
  }

  // f(key, token) for every value of the row with low <= key < high.
  template <class Fn>
  __device__ void for_each(uint32_t low, uint32_t high, Fn f) {
    constexpr int kAhead = 3;  // groups in flight
    list_groups(low);
    const int lane = threadIdx.x % 32, count = static_cast<int>(shared.num_listed);
    for (int first = threadIdx.x / 32; first < count; first += kLawWarps * kAhead) {
      float v[kAhead][8];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j * kLawWarps >= count) continue;
        load_group(v[j], row, shared.listed[first + j * kLawWarps] * kGroup, lane, minus_infinity());
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j * kLawWarps >= count) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const uint32_t key = key_of(clean_logit(v[j][e]));
          if (key < low || key >= high) continue;
          f(key, shared.listed[first + j * kLawWarps] * kGroup + index_in_group<T>(lane, e));
        }
      }
    }
  }

  // The same for few values: f is there once and reads what it needs again.
  template <class Fn>
  __device__ __forceinline__ void for_few(uint32_t low, uint32_t high, Fn f) {
    constexpr int kAhead = 3;
    list_groups(low);
    const int lane = threadIdx.x % 32, count = static_cast<int>(shared.num_listed);
#pragma unroll 1
    for (int first = threadIdx.x / 32; first < count; first += kLawWarps * kAhead) {
      float v[kAhead][8];
      uint32_t wanted = 0;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j * kLawWarps >= count) continue;
        load_group(v[j], row, shared.listed[first + j * kLawWarps] * kGroup, lane, minus_infinity());
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j * kLawWarps >= count) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const uint32_t key = key_of(clean_logit(v[j][e]));
          if (key >= low && key < high) wanted |= 1u << (8 * j + e);
        }
      }
#pragma unroll 1
      for (; wanted; wanted &= wanted - 1) {
        const int bit = __ffs(wanted) - 1;
        const int token =
            shared.listed[first + bit / 8 * kLawWarps] * kGroup + index_in_group<T>(lane, bit % 8);
        f(key_of(clean_logit(row.at(token))), token);
      }
    }
  }

  // Collects the keys of [low, high); returns how many there are, stored or not.
  template <bool Few = false>
  __device__ int64_t gather(uint32_t low, uint32_t high) {
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    const auto keep = [&](uint32_t key, int token) {
      const uint32_t at = atomicAdd(&shared.count, 1u);
      if (at < kCapacity) shared.key[at] = key, shared.token[at] = token, shared.mass[at] = mass_of(key);
    };
    if constexpr (Few) {
      for_few(low, high, keep);
    } else {
      for_each(low, high, keep);
    }
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
      for (uint32_t i = threadIdx.x; i < shared.count; i += kLawThreads)
        if (shared.key[i] >= low) sum += Mass ? shared.mass[i] : 1;
    } else {
      for_each(low, high, [&](uint32_t key, int) { sum += Mass ? mass_of(key) : 1; });
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
    // Four lanes rank a key.
    const uint32_t size = shared.count;
    for (uint32_t first = threadIdx.x / 32 * 8; first < size; first += kLawThreads / 4) {
      const uint32_t i = first + threadIdx.x % 32 / 4;
      const uint32_t key = i < size ? shared.key[i] : ~0u;
      uint64_t above = 0;
      for (uint32_t j = threadIdx.x % 4; j < size; j += 4)
        if (shared.key[j] > key) above += Mass ? shared.mass[j] : 1;
      above += __shfl_xor_sync(~0u, above, 1);
      above += base + __shfl_xor_sync(~0u, above, 2);
      if (threadIdx.x % 4 == 0 && above < goal && key >= low) atomicMin(&shared.best, key);
    }
    __syncthreads();
    const uint32_t best = shared.best;
    __syncthreads();
    return best == ~0u ? low : best;
  }

  // A key that at least k groups reach, so that the k-th largest value does. Groups are counted by
  // their distance from the top, in 256 steps that grow until they hold k groups.
  __device__ uint32_t bound_of_top_k(uint32_t top, int64_t k) {
    if (num_groups < k) return 0;
    static_assert(kBins == 32 * 8);
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int shift = 15;; shift += 3) {  // the last is 24
      __syncthreads();
      if (threadIdx.x < kBins) shared.bins[threadIdx.x] = 0;
      __syncthreads();
#pragma unroll 1
      for (int g = threadIdx.x; g < num_groups; g += kLawThreads) {
        const uint32_t bin = (top - 1 - shared.group_keys[g]) >> shift;
        if (bin < kBins) atomicAdd(&shared.bins[bin], 1u);
      }
      __syncthreads();
      uint32_t own[8], sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += own[j] = shared.bins[lane * 8 + j];
      uint32_t prefix = sum;
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, prefix, step);
        if (lane >= step) prefix += other;
      }
      const uint32_t reaching = __ballot_sync(~0u, prefix >= k);
      if (reaching == 0) continue;
      int steps = lane * 8 + 1;  // from the top to the end of the bin where k is reached
      prefix -= sum;
#pragma unroll
      for (int j = 0; j < 7; ++j) steps += (prefix += own[j]) < k;
      steps = __shfl_sync(~0u, steps, __ffs(reaching) - 1);
      const int64_t bound = static_cast<int64_t>(top) - (static_cast<int64_t>(steps) << shift);
      return bound > 0 ? static_cast<uint32_t>(bound) : 0;
    }
  }
};

// The least key that the parameters keep of a row, and the mass that is kept; nothing is cut off at the
// key of -inf. sum: the row's max and Σ exp2. bound: from bound_of_top_k.
struct Selected {
  uint32_t low;
  uint64_t mass;
};
template <class T>
__device__ Selected select_slowly(Selection<T>& select, const RowView<T>& row, float2 sum,
                                  const Parameters& s, uint32_t bound) {
  const uint32_t top = key_of(sum.x) + 1, lowest = key_of(minus_infinity()) + 1;
  uint32_t low = lowest;
  uint64_t mass = 0;
  if (s.top_k > 0) {
    // Fewer than k finite values: all of them stay.
    if (bound >= lowest || select.template tally<false>(lowest, top) >= static_cast<uint64_t>(s.top_k))
      low = select.template find<false>(bound > lowest ? bound : lowest, top, static_cast<uint64_t>(s.top_k));
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
  low = raise_to_min_p(low, top, sum.x, s);
  if (low > lowest) mass = select.template tally<true>(low, top);
  return {low, mass};
}

template <class T>
__device__ __noinline__ Selected select_out_of_line(RowView<T> row, float2 sum, Parameters s,
                                                    uint32_t bound) {
  Selection<T> select{row, (row.length + kGroup - 1) / kGroup, sum.x, s.slope, law_shared()};
  return select_slowly(select, row, sum, s, bound);
}

// The same where what reaches the bound has been gathered and fits: by every warp for itself, from how
// many keys, and of what mass, are above each.
__device__ __forceinline__ Selected select_from_list(LawShared& shared, uint32_t top, float max,
                                                     const Parameters& s) {
  const uint32_t size = shared.count, lane = threadIdx.x % 32;
  // Four lanes rank a key.
#pragma unroll 1
  for (uint32_t first = threadIdx.x / 32 * 8; first < size; first += kLawThreads / 4) {
    const uint32_t i = first + lane / 4, key = i < size ? shared.key[i] : ~0u;
    uint64_t above = 0;
    uint32_t rank = 0;
#pragma unroll 1
    for (uint32_t j = lane % 4; j < size; j += 4)
      if (shared.key[j] > key) above += shared.mass[j], ++rank;
    above += __shfl_xor_sync(~0u, above, 1), rank += __shfl_xor_sync(~0u, rank, 1);
    above += __shfl_xor_sync(~0u, above, 2), rank += __shfl_xor_sync(~0u, rank, 2);
    if (lane % 4 == 0 && i < size) shared.above[i] = above, shared.rank[i] = rank;
  }
  __syncthreads();
  uint32_t least = ~0u, low = ~0u;
#pragma unroll 1
  for (uint32_t i = lane; i < size; i += 32)
    if (shared.rank[i] < s.top_k) least = min(least, shared.key[i]);
  least = __reduce_min_sync(~0u, least);
  const auto mass_from = [&](uint32_t key) {
    uint64_t sum = 0;
#pragma unroll 1
    for (uint32_t i = lane; i < size; i += 32)
      if (shared.key[i] >= key) sum += shared.mass[i];
    return warp_sum(sum);
  };
  uint64_t mass = mass_from(least);
  if (s.top_p < 1.0f) {
    const uint64_t goal = mass_to_keep(s.top_p, mass);
#pragma unroll 1
    for (uint32_t i = lane; i < size; i += 32)
      if (shared.key[i] >= least && shared.above[i] < goal) low = min(low, shared.key[i]);
    low = __reduce_min_sync(~0u, low);
  } else {
    low = least;
  }
  low = raise_to_min_p(low, top, max, s);
  if (low != least) mass = mass_from(low);
  return {low, mass};
}

// The token drawn from the values gathered, all that the law keeps. -1: nothing has weight.
__device__ __forceinline__ int draw_from_list(LawShared& shared, const RowLaw& law, uint64_t fraction) {
  const uint32_t size = shared.count;
  __syncthreads();  // every warp is done with the masses
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < size; i += kLawThreads)
    shared.mass[i] = to_fixed(softmax_probability(value_of_key(shared.key[i]), law));
  __syncthreads();
  const bool found = pick<kLawThreads>(shared.token, shared.mass, size, fraction, shared.best);
  __syncthreads();
  return found ? static_cast<int>(shared.token[shared.best]) : -1;
}

// A row's law; a token, if one was wanted and is cheap, else -1; how many tokens it keeps are listed.
struct LawAndToken {
  RowLaw law;
  int token;
  uint32_t num_kept;
};

// From the row's strips and its groups' keys, by a block: to draw with the fraction, or for the list
// `kept`, if it is not null. Not inlined: the shared memory is its own, so that it is known to be that.
template <bool Draws, class T>
__device__ __noinline__ LawAndToken law_of_row(RowScratch scratch, int64_t slot, RowView<T> row, Parameters s,
                                               uint64_t fraction, Kept* kept) {
  LawShared& shared = law_shared();
  const int num_groups = (row.length + kGroup - 1) / kGroup;
  const bool truncates = s.truncates();
#pragma unroll 1
  for (int g = threadIdx.x; truncates && g < num_groups; g += kLawThreads)
    shared.group_keys[g] = scratch.group_keys[slot * scratch.num_groups + g];
  const Joined joined = join_strips(scratch.strips + slot * kMaxStrips, row.length, s.slope,
                                    static_cast<int>(threadIdx.x) % 32);
  RowLaw law = joined.law;
  if (!truncates || joined.sum.x == minus_infinity()) return {law, -1, 0};
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  Selection<T> select{row, num_groups, joined.sum.x, s.slope, shared};
  const uint32_t top = key_of(joined.sum.x) + 1, lowest = key_of(minus_infinity()) + 1;
  const uint32_t bound = s.top_k > 0 ? select.bound_of_top_k(top, s.top_k) : 0;
  const bool listed = bound >= lowest && select.template gather<true>(bound, top) <= kCapacity;
  Selected selected;
  if (listed) {
    selected = select_from_list(shared, top, joined.sum.x, s);
  } else if constexpr (Draws) {
    selected = select_slowly(select, row, joined.sum, s, bound);
  } else {
    selected = select_out_of_line(row, joined.sum, s, bound);
  }
  const auto [low, mass] = selected;
  if (low == lowest) return {law, -1, 0};
  law.cutoff = value_of_key(low);
  law.scale = copysignf(static_cast<float>(0x1p44 / static_cast<double>(mass)), law.scale);
  RowLaw plain = law;
  plain.scale = fabsf(law.scale);
  if constexpr (Draws) {
    return {law, listed ? draw_from_list(shared, plain, fraction) : -1, 0};
  } else {
    static_assert(kLawThreads >= kMaxKept);
    const uint32_t num_kept = kept != nullptr && listed && shared.count <= kMaxKept ? shared.count : 0;
    if (threadIdx.x < num_kept)
      kept[threadIdx.x] = {shared.token[threadIdx.x],
                           softmax_probability(value_of_key(shared.key[threadIdx.x]), plain)};
    return {law, -1, num_kept};
  }
}

}  // namespace quantgemm

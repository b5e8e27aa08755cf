// SPDX-License-Identifier: MIT
// The cutoff of a truncated row of logits, by one block: the maxima of its groups bound the k-th
// largest value from below, so only lanes' shares that reach the bound are read again, and what reaches
// it is ranked without sorting. A flat row under top-p alone is halved by passes over it.
#pragma once
#include "row_laws.cuh"

namespace quantgemm {

// Enough for the groups of a strip. Most of the end of a row is done by each warp for itself: twice as many
// would wait for each other's instructions.
constexpr int kLawThreads = 256;
constexpr int kMaxGroups = (kMaxVocab + kGroup) / kGroup, kBins = 256;
constexpr int kCapacity = 512, kMaxVectors = 2048;
constexpr int kFew = 64;  // that many are ended by row_few.cuh

struct alignas(16) LawShared {
  union {
    uint32_t group_keys[kMaxGroups];
    struct {
      uint64_t down_to[kCapacity];  // the mass of the keys from this one up
      uint64_t above[kCapacity];    // of the keys above this one
      uint32_t rank[kCapacity];     // and their number; in the upper half how many tokens are before this one
    } ranked;                       // later, of the keys gathered
  };
  uint64_t partial[2][kLawThreads / 32];
  uint64_t mass[kCapacity];
  alignas(16) uint32_t key[kCapacity], token[kCapacity];
  struct alignas(16) {
    uint64_t mass[kFew];  // from the largest key down
    uint32_t key[kFew];
    uint2 of_token[kFew];  // keys and tokens, in the order of these
  } few;
  uint32_t count, best, bins[kBins], num_listed;
  union {
    uint16_t listed[kMaxGroups];    // groups
    uint32_t vectors[kMaxVectors];  // 16 bytes of the row each
  };
};

__device__ __forceinline__ LawShared& law_shared() {  // so that all functions know it to be shared memory
  __shared__ LawShared shared;
  return shared;
}

// Neighbouring values as one 16-byte load.
__device__ __forceinline__ void load_vector(float (&v)[4], const float* x) {
  const float4 a = *reinterpret_cast<const float4*>(x);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
}
template <class Real16>
__device__ __forceinline__ void load_vector(float (&v)[8], const Real16* x) {
  load8(v, x);
}

// A row being truncated, by one block. All members are the same in every thread.
template <int Threads, class T>
struct Selection {
  static constexpr int kWarps = Threads / 32;
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
    for (int w = 0; w < kWarps; ++w) sum += shared.partial[turn][w];
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
    for (int g = threadIdx.x; g < num_groups; g += Threads)
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
    for (int first = threadIdx.x / 32; first < count; first += kWarps * kAhead) {
      float v[kAhead][8];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j * kWarps >= count) continue;
        load_group(v[j], row, shared.listed[first + j * kWarps] * kGroup, lane, minus_infinity());
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (first + j * kWarps >= count) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const uint32_t key = key_of(clean_logit(v[j][e]));
          if (key < low || key >= high) continue;
          f(key, shared.listed[first + j * kWarps] * kGroup + index_in_group<T>(lane, e));
        }
      }
    }
  }

  // Collects the keys of [low, high); returns how many there are, stored or not.
  __device__ int64_t gather(uint32_t low, uint32_t high) {
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    for_each(low, high, [&](uint32_t key, int token) { keep(key, token); });
    __syncthreads();
    list_low = low, list_high = high;
    return shared.count;
  }
  __device__ __forceinline__ void keep(uint32_t key, int token) {
    const uint32_t at = atomicAdd(&shared.count, 1u);
    if (at < kCapacity) shared.key[at] = key, shared.token[at] = token, shared.mass[at] = mass_of(key);
  }

  // Eight keys of lanes, this thread's in some round of gather_few.
  __device__ __forceinline__ static uint4 lane_keys_at(const uint16_t* lane_keys, int first, int row_length) {
    if (first >= lanes_of<T>(row_length)) return {};
    return *reinterpret_cast<const uint4*>(lane_keys + first);
  }

  // Of a lane's vectors in a chunk those that lie in a group that reaches `low`, as bits.
  __device__ __forceinline__ uint32_t vectors_that_reach(uint32_t low, int chunk) const {
    constexpr int kGroups = kChunk<T> / kGroup, kVectors = kChunkVectors / kGroups;
    uint32_t vectors = 0;
    const uint4* const keys = reinterpret_cast<const uint4*>(shared.group_keys + chunk * kGroups);
    const auto add = [&](uint32_t key, int j) {
      if (key >= low) vectors |= ((1u << kVectors) - 1) << j * kVectors;
    };
#pragma unroll
    for (int j = 0; j < kGroups; j += 4) {
      const uint4 four = keys[j / 4];
      add(four.x, j), add(four.y, j + 1), add(four.z, j + 2), add(four.w, j + 3);
    }
    return vectors;
  }

  // The same as gather for few values from `low` up, by the keys of the row's lanes, but without their
  // masses; true if the list has them all. Before, shared.count and num_listed are 0. keys, next: of the
  // first two rounds, asked for early.
  __device__ __forceinline__ bool gather_few(const uint16_t* lane_keys, uint4 keys, uint4 next, uint32_t low,
                                             uint32_t high) {
    constexpr int kPer = kPerVector<T>;
    const uint32_t least = low >> 16;
#pragma unroll 1
    for (int first = threadIdx.x * 8; first < lanes_of<T>(row.length); first += Threads * 8) {
      const uint32_t pairs[4] = {keys.x, keys.y, keys.z, keys.w};
      keys = next, next = lane_keys_at(lane_keys, first + 2 * Threads * 8, row.length);
      uint32_t wanted = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((pairs[j] & 0xffff) >= least) wanted |= 1u << 2 * j;
        if (pairs[j] >> 16 >= least) wanted |= 2u << 2 * j;
      }
      if (wanted == 0) continue;
      const uint32_t vectors = vectors_that_reach(low, first / 32);
      // All of this thread's lanes have the same. What does not fit is not wanted any more.
      const uint32_t more = __popc(wanted) * __popc(vectors);
      uint32_t at = atomicAdd(&shared.num_listed, more);
      if (at + more > kMaxVectors) continue;
#pragma unroll 1
      for (; wanted; wanted &= wanted - 1) {  // once, as a rule
        const uint32_t lane = first / 32 * (kChunkVectors * 32) + first % 32 + __ffs(wanted) - 1;
#pragma unroll
        for (int v = 0; v < kChunkVectors; ++v)
          if (vectors >> v & 1) shared.vectors[at++] = lane + v * 32;
      }
    }
    __syncthreads();
    const uint32_t count = shared.num_listed;
    if (count > kMaxVectors) return false;
    const float least_value = value_of_key(low);  // a number: then values compare as their keys do
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count; i += Threads) {
      const int begin = static_cast<int>(shared.vectors[i]) * kPer;
      float v[kPer];
      uint32_t wanted = 0;
#pragma unroll
      for (int e = 0; e < kPer; ++e) v[e] = minus_infinity();
      if (row.aligned && begin + kPer <= row.length) {
        load_vector(v, row.data + begin);
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e)
          if (begin + e < row.length) v[e] = row.at(begin + e);
      }
#pragma unroll
      for (int e = 0; e < kPer; ++e)
        if (v[e] >= least_value) wanted |= 1u << e;
#pragma unroll 1
      for (; wanted; wanted &= wanted - 1) {
        const int at = __ffs(wanted) - 1;
        float x = v[0];
#pragma unroll
        for (int e = 1; e < kPer; ++e) x = at == e ? v[e] : x;
        const uint32_t place = atomicAdd(&shared.count, 1u);
        if (place < kCapacity) shared.key[place] = key_of(clean_logit(x)), shared.token[place] = begin + at;
      }
    }
    __syncthreads();
    list_low = low, list_high = high, listed_low = ~0u;
    return shared.count <= kCapacity;
  }

  __device__ bool list_has(uint32_t low, uint32_t high) const {
    return list_low <= low && list_high == high && shared.count <= kCapacity;
  }

  // Σ over keys of [low, high): their mass, or their number.
  template <bool Mass>
  __device__ uint64_t tally(uint32_t low, uint32_t high) {
    uint64_t sum = 0;
    if (list_has(low, high)) {
      for (uint32_t i = threadIdx.x; i < shared.count; i += Threads)
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
    for (uint32_t first = threadIdx.x / 32 * 8; first < size; first += Threads / 4) {
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
  // their distance from the top, in 256 steps that grow until they hold k groups. Before, all have been
  // counted in the first ones.
  static constexpr int kFirstShift = 15;
  __device__ __forceinline__ void count_group(uint32_t key, uint32_t top, int shift) {
    const uint32_t bin = (top - 1 - key) >> shift;
    if (bin < kBins) atomicAdd(&shared.bins[bin], 1u);
  }
  __device__ uint32_t bound_of_top_k(uint32_t top, int64_t top_k) {
    if (num_groups < top_k) return 0;
    static_assert(kBins == 32 * 8);
    const int lane = threadIdx.x % 32;
    const auto k = static_cast<uint32_t>(top_k);
#pragma unroll 1
    for (int shift = kFirstShift;; shift += 3) {  // the last is 24
      if (shift != kFirstShift) {
        __syncthreads();
        if (threadIdx.x < kBins) shared.bins[threadIdx.x] = 0;
        __syncthreads();
#pragma unroll 1
        for (int g = threadIdx.x; g < num_groups; g += Threads) count_group(shared.group_keys[g], top, shift);
        __syncthreads();
      }
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
template <int Threads, class T>
__device__ Selected select_slowly(Selection<Threads, T>& select, const RowView<T>& row, float2 sum,
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

// Long code that is rarely wanted.
__device__ __noinline__ inline uint32_t raise_to_min_p_out_of_line(uint32_t low, uint32_t top, float max,
                                                                   Parameters s) {
  return raise_to_min_p(low, top, max, s);
}
template <int Threads, class T>
__device__ __noinline__ Selected select_out_of_line(RowView<T> row, float2 sum, Parameters s,
                                                    uint32_t bound) {
  Selection<Threads, T> select{row, (row.length + kGroup - 1) / kGroup, sum.x, s.slope, law_shared()};
  return select_slowly(select, row, sum, s, bound);
}

// A token drawn and its probability; -1: nothing has weight.
struct Drawn {
  int token;
  float p;
};
constexpr Drawn kNotDrawn = {-1, 0.0f};

}  // namespace quantgemm

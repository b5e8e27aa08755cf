// SPDX-License-Identifier: MIT
// Reading a row of logits strip by strip, by warps that know nothing of each other: of each strip its
// maximum and Σ exp2((x - max)·slope), and where truncation is asked for the largest key of each group
// of 256 and of each lane's share of a chunk. Limit: DRAM, and for 16-bit values instructions.
#pragma once
#include "ptx.cuh"
#include "row_laws.cuh"

namespace quantgemm {

// PTX max.NaN: NaN wins.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
}
__device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b, Half) {
  uint32_t max;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  return max;
}
__device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b, BFloat16) {
  uint32_t max;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  return max;
}

// The part of a strip that a warp has in registers, as it lies in memory.
template <class T>
struct Chunk {
  static constexpr int kVectors = kChunkVectors, kPer = kPerVector<T>, kValues = kChunk<T>;
  static_assert(kValues == kVectors * 32 * kPer);
  static constexpr int kGroups = kValues / kGroup, kGroupVectors = kVectors / kGroups;
  uint32_t words[kVectors][4];

  static constexpr uint32_t kFill = sizeof(T) == 4            ? 0xff800000u
                                    : std::is_same_v<T, Half> ? 0xfc00fc00u
                                                              : 0xff80ff80u;  // -inf

  __device__ __forceinline__ void put(int v, uint4 w) {
    words[v][0] = w.x, words[v][1] = w.y, words[v][2] = w.z, words[v][3] = w.w;
  }
  // Of an aligned row that ends with a whole vector, or not.
  template <bool Streams>
  __device__ __forceinline__ void load(const T* own, int count, int lane) {
    const auto load_vector = [&](int v) {
      const uint4* const vector = reinterpret_cast<const uint4*>(own) + v * 32;
      return Streams ? __ldcs(vector) : __ldg(vector);
    };
    if (count >= kValues) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) put(v, load_vector(v));
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        put(v, make_uint4(kFill, kFill, kFill, kFill));
        if ((v * 32 + lane) * kPer < count) put(v, load_vector(v));
      }
    }
  }

  // The same from shared memory. address: of the chunk, of which `count` values have been written
  __device__ __forceinline__ void load_shared(uint32_t address, int count, int lane) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) put(v, quantgemm::load_shared(address + (v * 32 + lane) * 16));
    if (count < kValues) {
      asm volatile("");  // a branch, not 32 selections for every chunk
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if ((v * 32 + lane) * kPer >= count) put(v, make_uint4(kFill, kFill, kFill, kFill));
    }
  }

  __device__ __forceinline__ float value(int v, int e) const {
    if constexpr (kPer == 4) {
      return __uint_as_float(words[v][e]);
    } else {
      return to_float(T{static_cast<uint16_t>(words[v][e / 2] >> (16 * (e % 2)))});
    }
  }

  // Of a lane's values of group g; NaN wins.
  __device__ __forceinline__ float group_max(int g) const {
    if constexpr (kPer == 4) {
      float max = value(g * kGroupVectors, 0);
#pragma unroll
      for (int i = 1; i < 8; ++i) max = max_or_nan(max, value(g * kGroupVectors + i / 4, i % 4));
      return max;
    } else {
      uint32_t pair = words[g][0];
#pragma unroll
      for (int w = 1; w < 4; ++w) pair = max_or_nan(pair, words[g][w], T{});
      return max_or_nan(to_float(T{static_cast<uint16_t>(pair)}),
                        to_float(T{static_cast<uint16_t>(pair >> 16)}));
    }
  }

  // Σ exp2((x - base)·slope) of a lane's values.
  __device__ __forceinline__ float sum(float base, float slope) const {
    float part[4] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kPer; ++e) part[e % 4] += relative_weight(value(v, e), base, slope);
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
};

// (base, Σ relative to base) of a lane so far.
struct Running {
  float base = -3.4028235e38f, sum = 0.0f;
  __device__ __forceinline__ void raise(float max, float slope) {
    const float next = fmaxf(base, max);
    sum = multiply(sum, relative_weight(base, next, slope));
    base = next;
  }
};

// Where the keys of a row go, if there is truncation; else null. Not only of rows whose own parameters
// truncate: to look at those first would be a round trip to memory.
struct KeysInScratch {
  uint32_t* groups = nullptr;
  uint16_t* lanes = nullptr;

  __device__ __forceinline__ bool wanted() const { return groups != nullptr; }
  __device__ __forceinline__ void put_group(int i, uint32_t key) const { groups[i] = key; }
  // By a whole warp, of its lanes of a chunk: the upper halves of their keys.
  __device__ __forceinline__ void put_lanes(int chunk, int lane, uint32_t key) const {
    lanes[chunk * 32 + lane] = static_cast<uint16_t>(key >> 16);
  }
};
__device__ __forceinline__ KeysInScratch keys_of(const RowScratch& scratch, int64_t slot) {
  if (!scratch.has_keys) return {};
  return {scratch.group_keys + slot * scratch.num_groups, scratch.lane_keys + slot * scratch.num_lanes};
}

// A chunk value by value: with NaN or +inf in it, of a row that is not aligned, or ragged. The same
// sums in the same order as Chunk's. Returns whether it is bad.
template <class T, class Keys>
__device__ __noinline__ float4 read_slowly(const T* row, int begin, int end, float slope, Running so_far,
                                           Keys keys) {
  constexpr int kPer = kPerVector<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float max = minus_infinity(), group_max = minus_infinity();
  bool bad = false;
#pragma unroll 1
  for (int v = 0; v < Chunk<T>::kVectors; ++v) {
#pragma unroll 1
    for (int e = 0; e < kPer; ++e) {
      const int at = begin + (v * 32 + lane) * kPer + e;
      const float x = at < end ? to_float(row[at]) : minus_infinity();
      bad |= is_bad_value(x, true);
      group_max = fmaxf(group_max, clean_logit(x));
    }
    if ((v + 1) % Chunk<T>::kGroupVectors != 0) continue;
    const int group = (begin + v * 32 * kPer) / kGroup;
    const uint32_t key = __reduce_max_sync(~0u, key_of(group_max));
    if (keys.wanted() && lane == 0 && group * kGroup < end) keys.put_group(group, key);
    max = fmaxf(max, group_max), group_max = minus_infinity();
  }
  if (keys.wanted()) keys.put_lanes(begin / Chunk<T>::kValues, lane, key_of(max));
  so_far.raise(max, slope);
  float part[4] = {};
#pragma unroll 1
  for (int v = 0; v < Chunk<T>::kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      const int at = begin + (v * 32 + lane) * kPer + e;
      const float x = at < end ? to_float(row[at]) : minus_infinity();
      part[e % 4] += relative_weight(clean_logit(x), so_far.base, slope);
    }
  }
  return {so_far.base, so_far.sum + ((part[0] + part[1]) + (part[2] + part[3])), max, bad ? 1.0f : 0.0f};
}

__device__ __forceinline__ void put_strip(float2* strips, int i, float2 sum) { strips[i] = sum; }

// What a lane knows of the strip that its warp reads.
struct StripSums {
  Running sum;
  float max = minus_infinity();
  bool bad = false;

  // A chunk with NaN or +inf in it, of a row that is not aligned, or ragged.
  template <class T, class Keys>
  __device__ __forceinline__ void add_slowly(const RowView<T>& row, int begin, int end, float slope,
                                             const Keys& keys) {
    const float4 r = read_slowly(row.data, begin, end, slope, sum, keys);
    sum.base = r.x, sum.sum = r.y;
    max = fmaxf(max, r.z), bad |= r.w != 0.0f;
  }
  // Any chunk from values in registers; false if it must be read slowly.
  template <class T, class Keys>
  __device__ __forceinline__ bool add(const Chunk<T>& chunk, int begin, int end, float slope, bool sums,
                                      int lane, const Keys& keys) {
    float chunk_max = minus_infinity(), group_max[Chunk<T>::kGroups];
#pragma unroll
    for (int g = 0; g < Chunk<T>::kGroups; ++g)
      chunk_max = max_or_nan(chunk_max, group_max[g] = chunk.group_max(g));
    if (__any_sync(~0u, is_bad_value(chunk_max, true))) return false;
    if (keys.wanted()) {
      // Some behind each other, without a look at a result in between.
      constexpr int kTogether = 4;
      uint32_t key[kTogether], own_key = 0;
#pragma unroll
      for (int g = 0; g < Chunk<T>::kGroups; g += kTogether) {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) key[j] = __reduce_max_sync(~0u, key_of(group_max[g + j]));
#pragma unroll
        for (int j = 0; j < kTogether; ++j) own_key = lane == g + j ? key[j] : own_key;
      }
      if (lane < Chunk<T>::kGroups && begin + lane * kGroup < end)
        keys.put_group(begin / kGroup + lane, own_key);
      keys.put_lanes(begin / Chunk<T>::kValues, lane, key_of(chunk_max));
    }
    max = fmaxf(max, chunk_max);
    if (sums) {
      sum.raise(chunk_max, slope);
      sum.sum += chunk.sum(sum.base, slope);
    }
    return true;
  }
  // (max, Σ) of the strip; the sum is negative if there is NaN or +inf, and 0 or 1 if none is wanted.
  __device__ __forceinline__ float2 end(float slope, bool sums) const {
    float2 strip;
    if (sums) {
      strip = warp_join(max, sum.base, sum.sum, slope);
    } else {
      strip.x = value_of_key(__reduce_max_sync(~0u, key_of(max)));
      strip.y = strip.x > minus_infinity() ? 1.0f : 0.0f;
    }
    return {strip.x, __any_sync(~0u, bad) ? -strip.y : strip.y};
  }
};

// What is to be kept of a strip, by a warp.
template <bool Streams, class T, class Keys>
__device__ __forceinline__ float2 read_strip(const RowView<T>& row, int begin, int end, float slope,
                                             bool sums, int lane, const Keys& keys) {
  constexpr int kPer = kPerVector<T>;
  const bool in_vectors = row.aligned && row.length % kPer == 0;
  StripSums strip;
#pragma unroll 1
  for (; begin < end; begin += Chunk<T>::kValues) {
    bool is_odd = !in_vectors;
    if (in_vectors) {
      Chunk<T> chunk;
      chunk.template load<Streams>(row.data + begin + lane * kPer, end - begin, lane);
      is_odd = !strip.add(chunk, begin, end, slope, sums, lane, keys);
    }
    if (is_odd) strip.add_slowly(row, begin, end, slope, keys);
  }
  return strip.end(slope, sums);
}

// The strips `first`, first + step, … of a row, by a warp. Streams: what is read leaves
// the L2 first. sums: see needs_sums. strips: whatever put_strip knows.
template <bool Streams, class T, class Strips, class Keys>
__device__ __forceinline__ void read_strips(const RowView<T>& row, int first, int step, float slope,
                                            bool sums, const Strips& strips, const Keys& keys) {
  const int length = strip_length(row.length), lane = static_cast<int>(threadIdx.x) % 32;
  for (int strip = first; strip * length < row.length; strip += step) {
    const int begin = strip * length, end = begin + length < row.length ? begin + length : row.length;
    const float2 sum = read_strip<Streams>(row, begin, end, slope, sums, lane, keys);
    if (lane == 0) put_strip(strips, strip, sum);
  }
}

// The index of the largest value, the lowest on ties: the first strip that has it is read again.
template <int Threads, class T>
__device__ __noinline__ int index_of_largest(uint32_t& shared, const float2* strips, RowView<T> row) {
  const int lane = static_cast<int>(threadIdx.x) % 32, length = strip_length(row.length);
  const StripPair pair = strips_of_lane(strips, row.length, lane);
  const uint32_t first = key_of(pair.own[0].x), second = key_of(pair.own[1].x);
  const uint32_t largest = __reduce_max_sync(~0u, first > second ? first : second);
  const uint32_t in_first = __ballot_sync(~0u, first == largest);
  const uint32_t in_second = __ballot_sync(~0u, second == largest);
  const int begin = (in_first != 0 ? __ffs(in_first) - 1 : 31 + __ffs(in_second)) * length;
  const int end = begin + length < row.length ? begin + length : row.length;
  if (threadIdx.x == 0) shared = ~0u;
  __syncthreads();
  uint32_t found = ~0u;
#pragma unroll 4
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += Threads)
    if (key_of(clean_logit(row.at(i))) == largest) found = min(found, static_cast<uint32_t>(i));
  found = __reduce_min_sync(~0u, found);
  if (lane == 0) atomicMin(&shared, found);
  __syncthreads();
  return static_cast<int>(shared);
}

// How many blocks, 2^share, are to read each of so many rows: enough for a few on each multiprocessor's four
// places, but none without a strip per warp.
constexpr int kStripThreads = 256, kStripWarps = kStripThreads / 32;
inline int share_for(int length, int64_t rows, int multiprocessors) {
  const int strip = strip_length(length), num_strips = (length + strip - 1) / strip;
  int share = 0;
  while (rows << share < 16 * multiprocessors && num_strips > kStripWarps << share) ++share;
  return share;
}

}  // namespace quantgemm

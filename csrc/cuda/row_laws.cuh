// SPDX-License-Identifier: MIT
// Rows of logits cut into strips and groups of 256 values, and what is kept of them between kernels.
// The cut depends on the vocabulary only, and partial results are combined in a fixed order: the
// law of a row has the same bits for every grid and batch.
//
//   slot = (is it a draft row) * slots + sequence * (max_drafts + 1) + position
//   strips [2 slots, 64]   laws [2 slots]
//   kept [slots, 256] (chains with truncation only)   lane_keys [2 slots, num_lanes] (truncation only)
//   num_kept [slots] (as kept)   states [sequences] (row_waves.cuh)
//   group_keys [2 slots, num_groups] (truncation only)
#pragma once
#include "../sampling.h"
#include "memory.cuh"

namespace quantgemm {

constexpr int kGroup = 256;  // values; a warp's 8 values per lane

constexpr int kMaxStrips = 64;

// A multiple of 2048, so that no more than kMaxStrips of them make up a row.
__host__ __device__ __forceinline__ int strip_length(int row_length) {
  constexpr int kStep = 2048;
  return (row_length + kStep * kMaxStrips - 1) / (kStep * kMaxStrips) * kStep;
}

// What a truncation has kept of a row of p, if it is little; what is behind the cutoff has p = 0.
constexpr int kMaxKept = 256;
struct alignas(8) Kept {
  uint32_t token;
  float p;
};

// Does a row's law come from Σ exp of the row? Not with a top-k that its groups' maxima bound: what is kept
// will be listed and summed, so that reading the row is only to find maxima. (For a row that has fewer values
// than that above -inf, sum_again makes up for it.) top_k as given, or as checked.
__device__ __forceinline__ bool needs_sums(int64_t top_k, int row_length) {
  return top_k <= 0 || top_k >= row_length || top_k > (row_length + kGroup - 1) / kGroup;
}

// A warp reads 8 vectors of 16 bytes per lane at once. What a lane has of such a chunk is the smallest part
// of a row that has a key of its own: the upper half of its largest value's.
constexpr int kChunkVectors = 8;
template <class T>
constexpr int kChunk = kChunkVectors * 32 * kPerVector<T>;
template <class T>
__host__ __device__ constexpr int lanes_of(int row_length) {
  return (row_length + kChunk<T> - 1) / kChunk<T> * 32;
}

struct RowScratch {
  int64_t slots;
  int num_groups, num_lanes;
  bool has_keys, has_kept;
  float2* strips;  // maximum, and Σ exp2((x - maximum)·slope), or 1: negative if there is NaN or +inf
  RowLaw* laws;
  Kept* kept;
  uint16_t* lane_keys;
  uint32_t* num_kept;  // 0: not listed
  uint32_t* states;
  uint32_t* group_keys;  // the largest key of each group
};

__host__ __device__ inline RowScratch scratch_of(const VerifyArgs& a) {
  RowScratch s;
  const int64_t cols = a.vocab > a.draft_vocab ? a.vocab : a.draft_vocab;
  s.slots = a.num_sequences * (a.max_drafts + 1);
  s.num_groups = static_cast<int>((cols + kGroup - 1) / kGroup);
  s.num_lanes = lanes_of<float>(static_cast<int>(cols));
  s.has_keys = a.parameters.top_k || a.parameters.top_p || a.parameters.min_p;
  s.strips = static_cast<float2*>(a.row_laws);
  s.laws = reinterpret_cast<RowLaw*>(s.strips + 2 * s.slots * kMaxStrips);
  s.has_kept = s.has_keys && a.max_drafts > 0 && a.mode == VerifyMode::kChain;
  s.kept = reinterpret_cast<Kept*>(s.laws + 2 * s.slots);
  s.lane_keys = reinterpret_cast<uint16_t*>(s.kept + (s.has_kept ? s.slots * kMaxKept : 0));
  s.num_kept = reinterpret_cast<uint32_t*>(s.lane_keys + (s.has_keys ? 2 * s.slots * s.num_lanes : 0));
  s.states = s.num_kept + (s.has_kept ? s.slots : 0);
  s.group_keys = s.states + a.num_sequences;
  return s;
}

// Who turns strips into laws? A kernel of its own where there are cutoffs to be found for many rows of
// a sequence, and for trees and blocks; otherwise whoever asks.
__host__ __device__ __forceinline__ bool laws_are_stored(const VerifyArgs& a) {
  const bool truncation = a.parameters.top_k || a.parameters.top_p || a.parameters.min_p;
  return (truncation && a.max_drafts > 0) || a.mode != VerifyMode::kChain;
}

template <class T>
struct RowView {
  const T* data;
  int length;
  bool aligned;  // for 16-byte loads

  RowView() = default;
  __device__ RowView(const T* row, int64_t n)
      : data(row), length(static_cast<int>(n)), aligned(reinterpret_cast<uintptr_t>(row) % 16 == 0) {}
  __device__ float at(int64_t i) const { return to_float(data[i]); }
};

template <class T>
__device__ __forceinline__ RowView<T> target_row(const VerifyArgs& a, int64_t row) {
  return {static_cast<const T*>(a.target) + row * a.target_stride, a.vocab};
}
template <class T>
__device__ __forceinline__ RowView<T> draft_row(const VerifyArgs& a, int64_t sequence, int64_t k) {
  return {static_cast<const T*>(a.draft) + sequence * a.draft_strides[0] + k * a.draft_strides[1],
          a.draft_vocab};
}

// Which value of a group v[e] of a lane is; the same for aligned and other rows.
template <class T>
__device__ __forceinline__ int index_in_group(int lane, int e) {
  return sizeof(T) == 4 ? e / 4 * 128 + lane * 4 + e % 4 : lane * 8 + e;
}

// A lane's part of a group of an aligned row that lies inside it, as it is in memory.
template <class T>
struct Vectors {
  uint4 words[sizeof(T) / 2];

  __device__ __forceinline__ void load(const RowView<T>& row, int begin, int lane) {
    const uint4* const own = reinterpret_cast<const uint4*>(row.data + begin) + lane;
    words[0] = __ldg(own);
    if constexpr (sizeof(T) == 4) words[1] = __ldg(own + 32);
  }
  // The same if it is wanted, here and without a branch: behind one the compiler would put all else first.
  __device__ __forceinline__ void load_now(const RowView<T>& row, int begin, int lane, bool wanted) {
#ifdef __CUDA_ARCH__
    const uint4* const own = reinterpret_cast<const uint4*>(row.data + begin) + lane;
#pragma unroll
    for (int j = 0; j < static_cast<int>(sizeof(T) / 2); ++j)
      asm volatile(
          "{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;"
          " @wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
          : "+r"(words[j].x), "+r"(words[j].y), "+r"(words[j].z), "+r"(words[j].w)
          : "l"(own + 32 * j), "r"(static_cast<uint32_t>(wanted)));
#else
    if (wanted) load(row, begin, lane);
#endif
  }
  // What comes from these registers is computed behind this.
  __device__ __forceinline__ void keep_here() {
#pragma unroll
    for (uint4& w : words) asm volatile("" : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w));
  }
  __device__ __forceinline__ void unpack(float (&v)[8]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        v[4 * w] = __uint_as_float(words[w].x), v[4 * w + 1] = __uint_as_float(words[w].y);
        v[4 * w + 2] = __uint_as_float(words[w].z), v[4 * w + 3] = __uint_as_float(words[w].w);
      }
    } else {
      const uint32_t pairs[4] = {words[0].x, words[0].y, words[0].z, words[0].w};
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = to_float(T{static_cast<uint16_t>(pairs[e / 2] >> (16 * (e % 2)))});
    }
  }
};
template <class T>
__device__ __forceinline__ void load_vectors(float (&v)[8], const RowView<T>& row, int begin, int lane) {
  Vectors<T> vectors;
  vectors.load(row, begin, lane);
  vectors.unpack(v);
}

// A group, from a multiple of 256; `fill` stands beyond the end.
template <class T>
__device__ __forceinline__ void load_group(float (&v)[8], const RowView<T>& row, int begin, int lane,
                                           float fill) {
  if (row.aligned && begin + kGroup <= row.length) {
    load_vectors(v, row, begin, lane);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = begin + index_in_group<T>(lane, e);
      v[e] = i < row.length ? row.at(i) : fill;
    }
  }
}

// Sum and maximum of 64-bit numbers in a warp. The sum by three reductions of 27, 27 and 10 bits, none of
// which waits for another: 32 numbers of 27 bits do not overflow.
__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
  constexpr uint32_t kPart = (1u << 27) - 1;
  const uint32_t low = __reduce_add_sync(~0u, static_cast<uint32_t>(x) & kPart);
  const uint32_t middle = __reduce_add_sync(~0u, static_cast<uint32_t>(x >> 27) & kPart);
  const uint32_t high = __reduce_add_sync(~0u, static_cast<uint32_t>(x >> 54));
  return low + (uint64_t{middle} << 27) + (uint64_t{high} << 54);
}
__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
  for (int step = 16; step; step /= 2) {
    const uint64_t other = __shfl_xor_sync(~0u, x, step);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ uint64_t inclusive_prefix(uint64_t x, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// Combined over a warp: (max, Σ relative to it). Each lane has its max, and its sum relative to base.
__device__ __forceinline__ float2 warp_join(float max, float base, float sum, float slope) {
  max = value_of_key(__reduce_max_sync(~0u, key_of(max)));
  sum = max == minus_infinity() ? 0.0f : sum * relative_weight(base, max, slope);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return {max, sum};
}

// A row from its strips, by a warp.
struct Joined {
  float2 sum;  // max, Σ exp2
  RowLaw law;  // without truncation; scale is negative if there is NaN or +inf
};
// The compiler takes a pointer for changed here: it is computed before what follows, a wait for example.
template <class P>
__device__ __forceinline__ void keep_here(P*& pointer) {
  asm volatile("" : "+l"(pointer));
}

__device__ __forceinline__ void keep_here(int& number) { asm volatile("" : "+r"(number)); }

// Two strips of a lane, `step` apart.
struct StripPair {
  float2 own[2];
  StripPair() = default;
  __device__ __forceinline__ StripPair(const float2* strips, int row_length, int first, int step) {
    const int length = strip_length(row_length);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int strip = first + step * j;
      own[j] = strip * length < row_length ? strips[strip] : float2{minus_infinity(), 0.0f};
    }
  }
};
__device__ __forceinline__ StripPair strips_of_lane(const float2* strips, int row_length, int lane) {
  return {strips, row_length, lane, 32};
}
__device__ __forceinline__ Joined join_strips(const StripPair& strips, float slope) {
  const float2(&own)[2] = strips.own;
  const bool bad = __any_sync(~0u, signbit(own[0].y) || signbit(own[1].y));
  const float max = fmaxf(own[0].x, own[1].x), base = fmaxf(max, -3.4028235e38f);
  // The same roundings in every kernel, whatever the compiler would make of a·b + c·d.
  const float sum = fmaf(fabsf(own[0].y), relative_weight(own[0].x, base, slope),
                         multiply(fabsf(own[1].y), relative_weight(own[1].x, base, slope)));
  Joined out;
  out.sum = warp_join(max, base, sum, slope);
  const float scale = out.sum.y != 0.0f ? 1.0f / out.sum.y : 0.0f;
  out.law = {out.sum.y != 0.0f ? out.sum.x : 0.0f, slope, bad ? -scale : scale, minus_infinity()};
  return out;
}

// What a slot stands for, if a row of logits lies there whose law somebody will ask for.
struct SlotRow {
  bool exists, is_draft;
  int64_t sequence, position, slot;
  Rows rows;
  Parameters parameters;
};

__device__ __forceinline__ SlotRow row_of_slot(const VerifyArgs& a, int64_t sequence, int position,
                                               bool is_draft) {
  SlotRow r;
  uint32_t status = 0;
  const int64_t positions = a.max_drafts + 1;
  r.is_draft = is_draft;
  r.sequence = sequence, r.position = position;
  r.slot = (is_draft ? a.num_sequences * positions : 0) + sequence * positions + position;
  r.rows = rows_of(a, sequence, status);
  r.parameters = parameters_of(a.parameters, sequence, is_draft ? a.draft_vocab : a.vocab, status);
  const bool is_logits = is_draft ? a.draft_is_logits && !a.draft_lse : a.target_is_logits;
  r.exists = is_logits && !r.parameters.greedy && position <= r.rows.drafts - (is_draft ? 1 : 0);
  return r;
}

template <class T>
__device__ __forceinline__ RowView<T> view_of(const VerifyArgs& a, const SlotRow& r) {
  return r.is_draft ? draft_row<T>(a, r.sequence, r.position) : target_row<T>(a, r.rows.first + r.position);
}

}  // namespace quantgemm

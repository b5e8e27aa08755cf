// SPDX-License-Identifier: MIT
// Rows of logits cut into strips of 1024 and groups of 256 values, and what is kept of them between
// kernels. The cut depends on the vocabulary only, and partial results are combined in a fixed
// order: the law of a row has the same bits for every grid and batch.
//
//   slot = (is it a draft row) * slots + sequence * (max_drafts + 1) + position
//   strips [2 slots, num_strips] (max, Σ exp2)   group_keys [2 slots, num_groups]   laws [2 slots]
#pragma once
#include "../sampling.h"
#include "memory.cuh"

namespace quantgemm {

constexpr int kStrip = 1024, kGroup = 256;  // values; a group is one warp's 8 values per lane

struct RowScratch {
  int64_t slots;
  int num_strips, num_groups;
  bool has_laws;
  float2* strips;
  uint32_t* group_keys;
  RowLaw* laws;
};

__host__ __device__ inline RowScratch scratch_of(const VerifyArgs& a) {
  RowScratch s;
  const int64_t cols = a.vocab > a.draft_vocab ? a.vocab : a.draft_vocab;
  s.slots = a.num_sequences * (a.max_drafts + 1);
  s.num_strips = static_cast<int>((cols + kStrip - 1) / kStrip);
  s.num_groups = s.num_strips * (kStrip / kGroup);
  s.has_laws = a.parameters.top_k || a.parameters.top_p || a.parameters.min_p;
  char* at = static_cast<char*>(a.strips);
  s.laws = reinterpret_cast<RowLaw*>(at);
  s.strips = reinterpret_cast<float2*>(at + 2 * s.slots * static_cast<int64_t>(sizeof(RowLaw)));
  s.group_keys = reinterpret_cast<uint32_t*>(s.strips + 2 * s.slots * s.num_strips);
  return s;
}

template <class T>
struct RowView {
  const T* data;
  int length;
  bool aligned;  // for 16-byte loads

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

template <class T>
__device__ __forceinline__ void unpack16(float (&v)[8], uint4 words) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] = to_float(T{static_cast<uint16_t>(pairs[e / 2] >> (16 * (e % 2)))});
}
__device__ __forceinline__ void unpack(float* v, float4 x) { v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w; }

// A group of an aligned row that lies inside it.
template <class T>
__device__ __forceinline__ void load_vectors(float (&v)[8], const RowView<T>& row, int begin, int lane) {
  if constexpr (sizeof(T) == 4) {
    const float4* x = reinterpret_cast<const float4*>(row.data + begin) + lane;
    unpack(v, __ldg(x)), unpack(v + 4, __ldg(x + 32));
  } else {
    unpack16<T>(v, __ldg(reinterpret_cast<const uint4*>(row.data + begin) + lane));
  }
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

// Sum and maximum of 64-bit numbers in a warp.
__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
  for (int step = 16; step; step /= 2) {
    const uint64_t other = __shfl_xor_sync(~0u, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// (max, sum) of two parts: the sum counts relative to the max.
__device__ __forceinline__ float2 join(float2 a, float2 b, float slope) {
  const float max = fmaxf(a.x, b.x);
  if (max == minus_infinity()) return {max, 0.0f};
  const float left = a.x == minus_infinity() ? 0.0f : a.y * relative_weight(a.x, max, slope);
  const float right = b.x == minus_infinity() ? 0.0f : b.y * relative_weight(b.x, max, slope);
  return {max, left + right};
}

__device__ __forceinline__ float2 warp_join(float2 x, float slope) {
  for (int step = 16; step; step /= 2) {
    const float2 other = {__shfl_xor_sync(~0u, x.x, step), __shfl_xor_sync(~0u, x.y, step)};
    x = join(x, other, slope);
  }
  return x;
}

// The row's max and Σ exp2((x - max)·slope), by one warp. A strip that saw NaN or +inf has a negative
// sum, and so has then the result; the law's scale passes the sign on.
__device__ __forceinline__ float2 combine_strips(const float2* strips, int count, float slope) {
  constexpr int kAhead = 4;
  float2 sum = {minus_infinity(), 0.0f};
  bool bad = false;
  for (int first = threadIdx.x % 32; first < count; first += 32 * kAhead) {
    float2 next[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + 32 * j;
      next[j] = i < count ? strips[i] : float2{minus_infinity(), 0.0f};
    }
#pragma unroll
    for (const float2& part : next) {
      bad |= signbit(part.y);
      sum = join(sum, {part.x, fabsf(part.y)}, slope);
    }
  }
  sum = warp_join(sum, slope);
  return {sum.x, __any_sync(~0u, bad) ? -sum.y : sum.y};
}

__device__ __forceinline__ RowLaw law_of(float2 sum, float slope) {
  const float scale = sum.y != 0.0f ? 1.0f / sum.y : sum.y;
  return {sum.y != 0.0f ? sum.x : 0.0f, slope, scale, minus_infinity()};
}

// What a slot stands for, if a row of logits lies there whose law somebody will ask for.
struct SlotRow {
  bool exists, is_draft;
  int64_t sequence, position, target_row, slot;
  Parameters parameters;
};

__device__ __forceinline__ SlotRow row_of_slot(const VerifyArgs& a, int64_t sequence, int layer) {
  SlotRow r;
  uint32_t status = 0;
  const int positions = static_cast<int>(a.max_drafts) + 1;
  r.is_draft = layer >= positions;
  r.sequence = sequence, r.position = r.is_draft ? layer - positions : layer;
  r.slot = (r.is_draft ? a.num_sequences * positions : 0) + sequence * positions + r.position;
  const Rows rows = rows_of(a, sequence, status);
  r.target_row = rows.first + r.position;
  r.parameters = parameters_of(a.parameters, sequence, r.is_draft ? a.draft_vocab : a.vocab, status);
  const bool is_logits = r.is_draft ? a.draft_is_logits && !a.draft_lse : a.target_is_logits;
  r.exists = is_logits && !r.parameters.greedy && r.position <= rows.drafts - (r.is_draft ? 1 : 0);
  return r;
}

template <class T>
__device__ __forceinline__ RowView<T> view_of(const VerifyArgs& a, const SlotRow& r) {
  return r.is_draft ? draft_row<T>(a, r.sequence, r.position) : target_row<T>(a, r.target_row);
}

// Programmatic dependent launch (PTX griddepcontrol, sm_90): a kernel's blocks are set up while the
// previous kernel ends, and wait here for its results.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];

  Launch(dim3 grid, int threads, cudaStream_t stream) {
    config.gridDim = grid, config.blockDim = threads, config.stream = stream;
    config.attrs = attributes;
  }
  void follow_previous_kernel(int compute_major) {
    if (compute_major < 9) return;
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  void in_clusters_of(int blocks) {
    if (blocks == 1) return;
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  }
};

// Layers of positions: 0…max_drafts are the target's, then the draft's if their laws are needed.
inline int layers_of(const VerifyArgs& a) {
  const bool drafts = a.draft && a.draft_is_logits && !a.draft_lse;
  return static_cast<int>(a.max_drafts + 1) * (drafts ? 2 : 1);
}

}  // namespace quantgemm

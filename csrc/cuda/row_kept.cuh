// SPDX-License-Identifier: MIT
// The tokens that a truncation has kept, where they are few: the draw from them without the row. They come
// in any order; the token is the first whose prefix sum in the order of the tokens exceeds the draw.
#pragma once
#include "row_laws.cuh"

namespace quantgemm {

constexpr uint32_t kNotPicked = ~0u;

// By a block: the place of the token drawn in a list in shared memory goes to `at`, which is kNotPicked
// before and stays it if nothing has weight; for all threads behind the next barrier.
template <int Threads>
__device__ __forceinline__ void pick(const uint32_t* tokens, const uint64_t* masses, uint32_t size,
                                     uint64_t fraction, uint32_t& at) {
  const uint32_t lane = threadIdx.x % 32;
  // Eight lanes rank a token.
#pragma unroll 1
  for (uint32_t first = threadIdx.x / 32 * 4; first < size; first += Threads / 8) {
    const uint32_t i = first + lane / 8, token = i < size ? tokens[i] : 0;
    uint64_t before = 0, total = 0;
#pragma unroll 1
    for (uint32_t j = lane % 8; j < size; j += 8) {
      const uint64_t mass = masses[j];
      total += mass;
      if (tokens[j] < token) before += mass;
    }
#pragma unroll 1
    for (int step = 1; step < 8; step *= 2)
      before += __shfl_xor_sync(~0u, before, step), total += __shfl_xor_sync(~0u, total, step);
    const uint64_t rest = draw(fraction, total);
    if (lane % 8 == 0 && i < size && before <= rest && rest < before + masses[i]) at = i;
  }
}

struct KeptShared {
  uint64_t masses[kMaxKept];
  uint32_t tokens[kMaxKept];
  float p[kMaxKept];
  uint32_t at;
};
struct KeptToken {
  int token;  // -1: nothing has weight
  float p;
};

// By a block of at least kMaxKept threads. Row: Weights<T, …>, for what is taken from p.
template <int Threads, class Row>
__device__ __forceinline__ KeptToken draw_from_kept(KeptShared& shared, const Row& weights, const Kept* kept,
                                                    uint32_t size, bool has_draft, uint64_t fraction) {
  static_assert(Threads >= kMaxKept);
  __syncthreads();
  if (threadIdx.x < size) {
    const Kept own = kept[threadIdx.x];
    float rest = own.p;
    if (has_draft && static_cast<int>(own.token) == weights.one_hot) rest = 0.0f;
    if (has_draft && weights.q.data != nullptr) {
      const int64_t j = weights.map != nullptr ? weights.map[own.token] : int64_t{own.token};
      if (j >= 0 && j < weights.q.length) rest = residual(rest, probability(weights.q.at(j), weights.q_law));
    }
    shared.tokens[threadIdx.x] = own.token, shared.p[threadIdx.x] = own.p;
    shared.masses[threadIdx.x] = to_fixed(rest);
  }
  if (threadIdx.x == 0) shared.at = kNotPicked;
  __syncthreads();
  pick<Threads>(shared.tokens, shared.masses, size, fraction, shared.at);
  __syncthreads();
  if (shared.at == kNotPicked) return {-1, 0.0f};
  return {static_cast<int>(shared.tokens[shared.at]), shared.p[shared.at]};
}

}  // namespace quantgemm

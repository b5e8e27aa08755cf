// SPDX-License-Identifier: MIT
// The tokens that a truncation has kept, where they are few: the draw from them without the row. They come
// in any order; the token is the first whose prefix sum in the order of the tokens exceeds the draw.
#pragma once
#include "row_laws.cuh"

namespace quantgemm {

// By a block: the place of the token drawn in a list in shared memory goes to `at`, for all threads
// behind the next barrier. False if nothing has weight.
template <int Threads>
__device__ __forceinline__ bool pick(const uint32_t* tokens, const uint64_t* masses, uint32_t size,
                                     uint64_t fraction, uint32_t& at) {
  const uint32_t lane = threadIdx.x % 32;
  uint64_t total = 0;
#pragma unroll 1
  for (uint32_t i = lane; i < size; i += 32) total += masses[i];
  total = warp_sum(total);
  if (total == 0) return false;
  const uint64_t rest = draw(fraction, total);
  // Four lanes rank a token.
#pragma unroll 1
  for (uint32_t first = threadIdx.x / 32 * 8; first < size; first += Threads / 4) {
    const uint32_t i = first + lane / 4, token = i < size ? tokens[i] : 0;
    uint64_t before = 0;
#pragma unroll 1
    for (uint32_t j = lane % 4; j < size; j += 4)
      if (tokens[j] < token) before += masses[j];
    before += __shfl_xor_sync(~0u, before, 1);
    before += __shfl_xor_sync(~0u, before, 2);
    if (lane % 4 == 0 && i < size && before <= rest && rest < before + masses[i]) at = i;
  }
  return true;
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
  __syncthreads();
  if (!pick<Threads>(shared.tokens, shared.masses, size, fraction, shared.at)) return {-1, 0.0f};
  __syncthreads();
  return {static_cast<int>(shared.tokens[shared.at]), shared.p[shared.at]};
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// A team: the blocks of a cluster (sm_90; elsewhere a single block) that share a piece of work, how
// they talk.
#pragma once
#include <cooperative_groups.h>

#include "../args.h"
#include "dependent_launch.cuh"

namespace quantgemm {

constexpr int kMaxRanks = 8;

__device__ __forceinline__ int log2_of(int power_of_two) { return 31 - __clz(power_of_two); }

struct Team {
  int64_t task;  // a sequence, or a row
  int rank, ranks, lane, warp;
  int turn = 0;  // of four

  // Blocks of a team, a power of two, follow each other in x.
  __device__ __forceinline__ explicit Team(int num_ranks)
      : task(blockIdx.x >> log2_of(num_ranks)),
        rank(static_cast<int>(blockIdx.x) & (num_ranks - 1)),
        ranks(num_ranks),
        lane(static_cast<int>(threadIdx.x) % 32),
        warp(static_cast<int>(threadIdx.x) / 32) {}

  // All blocks are there, in two halves: they may write to each other only behind the second. Relaxed:
  // for memory written before, a fence is needed.
  __device__ __forceinline__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait() const {
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) {
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }

  // Where a variable in shared memory lies in the block of that rank.
  template <class V>
  __device__ __forceinline__ V* at_rank(V* variable, [[maybe_unused]] int other) const {
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) return cooperative_groups::this_cluster().map_shared_rank(variable, other);
#endif
    return variable;
  }
};

}  // namespace quantgemm

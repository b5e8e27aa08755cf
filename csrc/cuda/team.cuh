// SPDX-License-Identifier: MIT
// A team: the blocks of a cluster (sm_90; elsewhere a single block) that share a piece of work, how
// they talk.
#pragma once
#include <cooperative_groups.h>

#include "../args.h"
#include "dependent_launch.cuh"

namespace quantgemm {

constexpr int kMaxRanks = 8;

struct Team {
  int64_t task;  // a sequence, or a row
  int rank, ranks, lane, warp;
  int turn = 0;  // of two buffers

  // Blocks of a team follow each other in x.
  __device__ explicit Team(int num_ranks)
      : task(blockIdx.x / num_ranks),
        rank(static_cast<int>(blockIdx.x) % num_ranks),
        ranks(num_ranks),
        lane(static_cast<int>(threadIdx.x) % 32),
        warp(static_cast<int>(threadIdx.x) / 32) {}

  // A barrier of all threads of all blocks in two halves. Memory written before the first is seen
  // behind the second. Blocks may write to each other only after they have met once.
  __device__ __forceinline__ void arrive() const {
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
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

// SPDX-License-Identifier: MIT
// A team: the blocks of a cluster (sm_90; elsewhere a single block) that share a piece of work, how
// they talk.
#pragma once
#include <cooperative_groups.h>

#include "../args.h"
#include "dependent_launch.cuh"

namespace quantgemm {

// How a row is cut: each warp of each of the blocks has a piece of it.
struct TeamShape {
  int ranks, piece_length;
};

struct Team {
  int64_t task;  // a sequence, or a row
  int rank, ranks, lane, warp, piece_length;
  int turn = 0;  // of four

  // grid (tasks, blocks of a team)
  __device__ __forceinline__ explicit Team(TeamShape shape)
      : task(blockIdx.x),
        rank(static_cast<int>(blockIdx.y)),
        ranks(shape.ranks),
        lane(static_cast<int>(threadIdx.x) % 32),
        warp(static_cast<int>(threadIdx.x) / 32),
        piece_length(shape.piece_length) {}

  // Which piece a warp has: the last pieces, which may be empty, are spread over all blocks.
  __device__ __forceinline__ int piece_of(int some_warp) const { return some_warp * ranks + rank; }

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

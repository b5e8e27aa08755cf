// SPDX-License-Identifier: MIT
// A team: the blocks of a cluster (sm_90; elsewhere a single block) that share a piece of work, how
// they talk.
#pragma once
#include <cooperative_groups.h>

#include "../args.h"
#include "dependent_launch.cuh"

namespace quantgemm {

// How a row is cut: each warp of each of the blocks has a piece of it, so many steps of 512 values, the first
// ones one more.
constexpr int kPieceStep = 512;
struct TeamShape {
  int ranks, steps, more;

  static __host__ __device__ constexpr TeamShape of(int ranks, int warps, int64_t row_length) {
    const int row_steps = static_cast<int>((row_length + kPieceStep - 1) / kPieceStep);
    return {ranks, row_steps / (ranks * warps), row_steps % (ranks * warps)};
  }
  __host__ __device__ constexpr int longest() const { return steps + (more > 0 ? 1 : 0); }
};

struct Team {
  int64_t task;  // a sequence, or a row
  int rank, ranks, lane, warp, steps, more;
  int turn = 0;  // of four

  // grid (tasks, blocks of a team)
  __device__ __forceinline__ explicit Team(TeamShape shape)
      : task(blockIdx.x),
        rank(static_cast<int>(blockIdx.y)),
        ranks(shape.ranks),
        lane(static_cast<int>(threadIdx.x) % 32),
        warp(static_cast<int>(threadIdx.x) / 32),
        steps(shape.steps),
        more(shape.more) {}

  // Which piece a warp has: the shorter ones, the last, are spread over all blocks.
  __device__ __forceinline__ int piece_of(int some_warp) const { return some_warp * ranks + rank; }
  // Where a piece begins, and the one before it ends.
  __device__ __forceinline__ int begin_of(int piece) const {
    return (piece * steps + (piece < more ? piece : more)) * kPieceStep;
  }

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

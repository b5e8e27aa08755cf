// SPDX-License-Identifier: MIT
// What a thread block of a packed product multiplies one after the other, where experts share the work:
// strips of one expert with a group of its tokens (expert_routes.cuh). It lies in shared memory: the
// registers are full.
#pragma once
#include "expert_routes.cuh"
#include "packed_stage.cuh"

namespace quantgemm::packed_gemm {

struct Pieces {
  OwnRoutes own;
  const ExpertGroup* groups;
  const int32_t *all_slots, *slots;  // `slots` of the piece's tokens
  uint32_t at, end;                  // strips of all groups, those to come
  int32_t first_strip, strips, tokens, expert;

  // All threads do these; then members can be read. Blocks share the strips of all groups evenly; each has
  // those of one group, if that makes none slower.
  __device__ __forceinline__ void begin(const ExpertRoutes& routes, const Split& split) {
    const bool for_itself = routes.groups == nullptr;
    if (for_itself) make_own_routes(own, routes);
    if (threadIdx.x == 0) {
      groups = for_itself ? own.groups : routes.groups, all_slots = for_itself ? own.slots : routes.slots;
      const uint32_t count = for_itself ? own.num_groups : *routes.num_groups, each = split.strips;
      const uint32_t total = count * each, few = total / gridDim.x, more = total % gridDim.x;
      const uint32_t most = few + (more > 0), blocks = most > 0 ? (each + most - 1) / most : 1;  // of a group
      if (count * blocks > gridDim.x) {
        at = few * blockIdx.x + min(blockIdx.x, more), end = at + few + (blockIdx.x < more);
      } else {
        const uint32_t group = blockIdx.x / blocks, part = blockIdx.x % blocks;
        at = group * each + each * part / blocks;
        end = group < count ? group * each + each * (part + 1) / blocks : at;
      }
    }
    next(split);
  }
  // No strips: that was all.
  __device__ __forceinline__ void next(const Split& split) {
    __syncthreads();
    if (threadIdx.x == 0) {
      strips = 0;
      if (at < end) {
        const uint32_t each = split.strips;
        const ExpertGroup group = groups[at / each];
        first_strip = static_cast<int32_t>(at % each);
        strips = min(static_cast<int32_t>(min(end - at, each - first_strip)), split.most_strips);
        at += strips;
        expert = group.expert, tokens = group.count, slots = all_slots + group.first;
      }
    }
    __syncthreads();
  }
};

}  // namespace quantgemm::packed_gemm

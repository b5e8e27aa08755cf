// SPDX-License-Identifier: MIT
// Groups of slots that have the same expert (ExpertRoutes of args.h), where a product reads them: made by
// launch_expert_routes for many slots, by every thread block for itself, in shared memory, for few.
#pragma once
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {

__device__ __forceinline__ int64_t expert_of(const ExpertRoutes& routes, int64_t slot) {
  const int64_t id = routes.wide ? static_cast<const int64_t*>(routes.ids)[slot]
                                 : int64_t{static_cast<const int32_t*>(routes.ids)[slot]};
  return id >= 0 && id < routes.experts ? id : -1;
}

// A row of zeros, by `threads` threads of which this is one.
template <class T>
__device__ __forceinline__ void clear_row(T* row, int64_t n, int thread, int threads) {
  for (int64_t i = thread; i < n; i += threads) store1(row + i, 0.0f);
}

// What a thread block that groups for itself has in shared memory.
struct alignas(16) OwnRoutes {
  int32_t num_groups, leaders[kOwnSlots / 32], ids[kOwnSlots], slots[kOwnSlots];
  ExpertGroup groups[kOwnSlots];
};

// All threads, at least kOwnSlots. A slot leads a group if those of its expert before it fill groups.
static __device__ __noinline__ void make_own_routes(OwnRoutes& own, const ExpertRoutes& routes) {
  const auto i = static_cast<int>(threadIdx.x), count = static_cast<int>(routes.num_slots);
  if (i < kOwnSlots) own.ids[i] = i < count ? static_cast<int32_t>(expert_of(routes, i)) : -1;
  __syncthreads();
  int id = -1, rank = 0, leader = -1;
  if (i < kOwnSlots) {
    id = own.ids[i];
#pragma unroll 8
    for (int j = 0; j < i; ++j) {
      if (own.ids[j] != id) continue;
      if (rank == 0) leader = j;
      if (++rank == routes.tile) rank = 0;
    }
    if (rank == 0) leader = i;
    const uint32_t leads = __ballot_sync(~0u, id >= 0 && leader == i);
    if (i % 32 == 0) own.leaders[i / 32] = static_cast<int32_t>(leads);
  }
  __syncthreads();
  if (i < kOwnSlots && id >= 0) {
    int group = 0;  // leaders before this slot's
    for (int j = 0; j < leader / 32; ++j) group += __popc(own.leaders[j]);
    group += __popc(own.leaders[leader / 32] & ((1u << leader % 32) - 1));
    if (leader == i) own.groups[group] = {id, group, 0, 0};
    own.ids[i] = group * 256 + rank;
  }
  if (i == 0) {
    int groups = 0;
    for (const int32_t leads : own.leaders) groups += __popc(leads);
    own.num_groups = groups;
  }
  __syncthreads();
  // Groups lie side by side: a slot's place is how many slots are in groups before its own, and its rank.
  if (i < kOwnSlots && id >= 0) {
    int place = rank, members = 0;
    const int group = own.ids[i] / 256;
    for (int j = 0; j < count; ++j) {
      if (own.ids[j] < 0) continue;
      place += own.ids[j] / 256 < group;
      members += own.ids[j] / 256 == group;
    }
    own.slots[place] = i;
    if (rank == 0) own.groups[group].first = place, own.groups[group].count = members;
  }
  __syncthreads();
}

}  // namespace quantgemm

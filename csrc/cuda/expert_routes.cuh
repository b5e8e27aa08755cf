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
  ExpertGroup groups[kOwnSlots];
  int32_t ids[kOwnSlots], slots[kOwnSlots];
  int32_t counts[kOwnSlots];  // of the group that begins at a place, else 0
  uint32_t begins[kOwnSlots / 32];
  int32_t num_groups;
};

// All threads, at least kOwnSlots. Slots are sorted by expert: a slot's place is how many come before it.
static __device__ __noinline__ void make_own_routes(OwnRoutes& own, const ExpertRoutes& routes) {
  constexpr int kNone = 0x7fffffff;  // behind all experts
  const auto i = static_cast<int>(threadIdx.x), count = static_cast<int>(routes.num_slots);
  int id = kNone, smaller = 0, before = 0, equal = 0;
  if (i < kOwnSlots) {
    if (i < count && expert_of(routes, i) >= 0) id = static_cast<int>(expert_of(routes, i));
    own.ids[i] = id, own.counts[i] = 0;
  }
  __syncthreads();
  if (id != kNone) {
    const int4* const ids = reinterpret_cast<const int4*>(own.ids);
#pragma unroll 2
    for (int j = 0; j < count; j += 4) {
      const int4 four = ids[j / 4];
      smaller += (four.x < id) + (four.y < id) + (four.z < id) + (four.w < id);
      equal += (four.x == id) + (four.y == id) + (four.z == id) + (four.w == id);
      before += (four.x == id && j < i) + (four.y == id && j + 1 < i) + (four.z == id && j + 2 < i) +
                (four.w == id && j + 3 < i);
    }
    own.slots[smaller + before] = i;
    if (before % routes.tile == 0) own.counts[smaller + before] = min(equal - before, routes.tile);
  }
  __syncthreads();
  if (i < kOwnSlots) {
    const uint32_t begins = __ballot_sync(~0u, own.counts[i] != 0);
    if (i % 32 == 0) own.begins[i / 32] = begins;
  }
  __syncthreads();
  if (i < kOwnSlots) {
    int group = __popc(own.begins[i / 32] & ((1u << i % 32) - 1));
    for (int j = 0; j < i / 32; ++j) group += __popc(own.begins[j]);
    const int members = own.counts[i];
    if (members != 0) own.groups[group] = {own.ids[own.slots[i]], i, members, 0};
    if (i == kOwnSlots - 1) own.num_groups = group + (members != 0);
  }
  __syncthreads();
}

}  // namespace quantgemm

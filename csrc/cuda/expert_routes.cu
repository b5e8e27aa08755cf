// SPDX-License-Identifier: MIT
// Slots by expert: one thread block counts, adds up and places them; the others clear rows of y whose slot
// has no expert. Which of an expert's slots comes first is not fixed, and no result depends on it. Limit: the
// latency of two passes over the ids, about 10 µs for 32768 slots.
#include <algorithm>

#include "dependent_launch.cuh"
#include "expert_routes.cuh"

namespace quantgemm {
namespace {

constexpr int kGatherThreads = 256;
constexpr int kThreads = 1024, kPerThread = kMaxExperts / kThreads;

// Of two numbers in one word, sums over the threads before this one.
__device__ __forceinline__ uint64_t sum_before(uint64_t own) {
  __shared__ uint64_t sums[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  uint64_t all = sums[lane];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t before = __shfl_up_sync(~0u, all, step);
    if (lane >= step) all += before;
  }
  const uint64_t warps_before = __shfl_sync(~0u, all, warp > 0 ? warp - 1 : 0);
  return sum - own + (warp > 0 ? warps_before : 0);
}

__device__ __forceinline__ void group_slots(const ExpertRoutes& routes) {
  __shared__ int32_t counts[kMaxExperts];  // then each expert's first place
  const auto thread = static_cast<int>(threadIdx.x), slots = static_cast<int>(routes.num_slots);
  for (int e = thread; e < kMaxExperts; e += kThreads) counts[e] = 0;
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < slots; i += kThreads) {
    const int64_t expert = expert_of(routes, i);
    if (expert >= 0) routes.ranks[i] = atomicAdd(counts + expert, 1);
  }
  __syncthreads();
  int own[kPerThread];
  uint64_t sums = 0;  // groups above, slots below
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    own[j] = counts[thread * kPerThread + j];
    sums += static_cast<uint64_t>((own[j] + routes.tile - 1) / routes.tile) << 32 | own[j];
  }
  const uint64_t before = sum_before(sums);
  auto group = static_cast<int32_t>(before >> 32), place = static_cast<int32_t>(before);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int expert = thread * kPerThread + j;
    counts[expert] = place;
    for (int first = 0; first < own[j]; first += routes.tile)
      routes.groups[group++] = {expert, place + first, min(own[j] - first, routes.tile), 0};
    place += own[j];
  }
  if (thread == kThreads - 1) *routes.num_groups = group;
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < slots; i += kThreads) {
    const int64_t expert = expert_of(routes, i);
    if (expert >= 0) routes.slots[counts[expert] + routes.ranks[i]] = i;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) routes_kernel(const GemmPackedArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (blockIdx.x == 0) return group_slots(args.routes);
  const int64_t warps = (gridDim.x - 1) * int64_t{kThreads / 32};
  for (int64_t slot = (blockIdx.x - 1) * int64_t{kThreads / 32} + threadIdx.x / 32;
       slot < args.routes.num_slots; slot += warps)
    if (expert_of(args.routes, slot) < 0)
      clear_row(static_cast<T*>(args.y) + slot * args.n, args.n, threadIdx.x % 32, 32);
}

// Rows of x by slots, a warp to a row. Rows are multiples of 64 bytes.
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const GemmPackedArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const ExpertRoutes& routes = args.routes;
  const int groups = *routes.num_groups;
  const int slots = groups == 0 ? 0 : routes.groups[groups - 1].first + routes.groups[groups - 1].count;
  const int64_t vectors = args.k / 8;
  for (int i = blockIdx.x * (kGatherThreads / 32) + threadIdx.x / 32; i < slots;
       i += gridDim.x * (kGatherThreads / 32)) {
    const auto* from = static_cast<const uint4*>(args.x) + routes.slots[i] / routes.slots_per_row * vectors;
    auto* to = static_cast<uint4*>(routes.sorted) + i * vectors;
#pragma unroll 4
    for (int64_t v = threadIdx.x % 32; v < vectors; v += 32) to[v] = from[v];
  }
}

}  // namespace

cudaError_t launch_expert_routes(const GemmPackedArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  const int64_t clearing = (args.routes.num_slots + kThreads / 32 - 1) / (kThreads / 32);
  const auto blocks = 1 + static_cast<unsigned>(std::min<int64_t>(clearing, device.multiprocessors));
  const DependentLaunch launch(blocks, kThreads, device, stream);
  cudaError_t launched = cudaErrorInvalidValue;
  visit_real(args.type,
             [&]<class T>(T) { launched = cudaLaunchKernelEx(&launch.config, routes_kernel<T>, args); });
  if (launched != cudaSuccess || args.routes.sorted == nullptr) return launched;
  const int64_t rows = (args.routes.num_slots + kGatherThreads / 32 - 1) / (kGatherThreads / 32);
  const auto gathering = static_cast<unsigned>(std::min<int64_t>(rows, 8 * device.multiprocessors));
  const DependentLaunch gather(gathering, kGatherThreads, device, stream);
  return cudaLaunchKernelEx(&gather.config, gather_kernel, args);
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// A team: the blocks of a cluster (sm_90; elsewhere a single block) that share a piece of work, how
// they talk, and how such kernels are launched one behind the other.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime_api.h>

#include "../args.h"

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

// Programmatic dependent launch (PTX griddepcontrol, sm_90): a kernel's blocks are set up while the
// previous kernel ends, and wait here for its results.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once all blocks have said this or ended, the next kernel's take the places that become free. Only
// behind the wait: so what the next kernel reads before its own wait was there before this one began.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Properties of the current device.
struct Device {
  int processors = 0, major = 0;
  cudaError_t read() {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return error;
  }
};

// A kernel of teams of `ranks` blocks, following the kernel before it.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];

  Launch(dim3 grid, int threads, int ranks, const Device& device, cudaStream_t stream) {
    config.gridDim = grid, config.blockDim = threads, config.stream = stream;
    config.attrs = attributes;
    if (device.major < 9) return;
    cudaLaunchAttribute& follow = attributes[config.numAttrs++];
    follow.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    follow.val.programmaticStreamSerializationAllowed = 1;
    if (ranks == 1) return;
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  }
};

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// Programmatic dependent launch (PTX griddepcontrol, sm_90): a kernel's blocks are set up while the
// previous kernel ends, and wait for its results where they need them. Older devices: one after the other.
#pragma once
#include "device.h"

namespace quantgemm {

// From here on, what the previous kernel wrote can be read, and what it reads overwritten.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks have said this or ended, the next kernel's take the places that become free. Behind the
// wait, or where the kernel before has waited before it let this one start: then what the next kernel reads
// before its own wait was there before this one began.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether a kernel may begin while the one before it ends: the device can, and this build has code for its
// generation. PTX of an older one knows no waiting.
inline bool launches_overlap(const Device& device) {
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (arch / 100 == device.major) return device.major >= 9;
  return false;
}

// A kernel that follows the one before it in this way, in clusters of `ranks` blocks along x.
struct DependentLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];

  DependentLaunch(dim3 grid, int threads, const Device& device, cudaStream_t stream, int shared_bytes = 0,
                  int ranks = 1) {
    config.gridDim = grid, config.blockDim = threads, config.stream = stream;
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = attributes;
    if (device.major < 9) return;
    if (launches_overlap(device)) {
      cudaLaunchAttribute& follow = attributes[config.numAttrs++];
      follow.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      follow.val.programmaticStreamSerializationAllowed = 1;
    }
    in_clusters(static_cast<unsigned>(ranks), 1);
  }
  void in_clusters(unsigned x, unsigned y) {
    if (x * y == 1) return;
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {x, y, 1};
  }
};

}  // namespace quantgemm

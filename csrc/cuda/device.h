// SPDX-License-Identifier: MIT
// What launchers ask of the current device.
#pragma once
#include <cuda_runtime_api.h>

namespace quantgemm {

// Shared memory in bytes: the most that a block can have, and what the system takes of it for itself
// from each block on a multiprocessor.
constexpr int kReservedShared = 1024;
struct Device {
  int multiprocessors = 0, shared_per_block = 0, shared_per_multiprocessor = 0, major = 0;

  cudaError_t read() {
    int id = 0;
    cudaError_t status = cudaGetDevice(&id);
    const auto ask = [&](int& value, cudaDeviceAttr attribute) {
      if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, id);
    };
    ask(multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    ask(major, cudaDevAttrComputeCapabilityMajor);
    return status;
  }
};

// The same where a plan is made that cannot fail: with no device it suits none, and its launch will say why.
inline Device current_device() {
  Device device;
  return device.read() == cudaSuccess ? device : Device{1, 0, 0, 0};
}

}  // namespace quantgemm

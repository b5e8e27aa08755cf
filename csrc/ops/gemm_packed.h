// SPDX-License-Identifier: MIT
// What the products with packed weights share: the choice of an algorithm, its launch, and the CPU's way.
#pragma once
#include <cmath>
#include <string>
#include <utility>

#include "../gemm_select.h"
#include "launch_scope.h"
#include "packed_checks.h"

namespace quantgemm {

PackedAlgo check_packed_algo(const std::string& name, const PackedProblem& problem);
struct PackedJob {
  PackedAlgo algo;
  GemmPackedArgs args;
  bool* launched = nullptr;    // with a norm: false, if this device has no room for the kernel that has one
  uint8_t* scratch = nullptr;  // of wgmma_scratch_bytes(), if any
};
#ifdef QG_WITH_CUDA
cudaError_t launch_gemm_packed(const PackedJob& job, cudaStream_t stream);
#endif
inline float silu_on_cpu(float x) { return x / (1.0f + std::exp(-x)); }

// x and y are float32 here; without bias. With up, x · wᵀ goes to args.gate and x · upᵀ to y.
void multiply_packed_on_cpu(const GemmPackedArgs& args, const PackedShape& shape, bool in_int8 = false);

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// What the products with packed weights share: the choice of an algorithm, its launch, and the CPU's way.
#pragma once
#include <string>
#include <utility>

#include "../gemm_select.h"
#include "launch_scope.h"
#include "packed_checks.h"

namespace quantgemm {

PackedAlgo check_packed_algo(const std::string& name, const PackedProblem& problem);
#ifdef QG_WITH_CUDA
cudaError_t launch_gemm_packed(const std::pair<PackedAlgo, GemmPackedArgs>& job, cudaStream_t stream);
#endif
// x and y are float32 here; without bias.
void multiply_packed_on_cpu(const GemmPackedArgs& args, const PackedShape& shape);

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// The int8 tensor-core products for more than 128 tokens (gemm_5_mma_q8_many.cuh) and for a thousand and more
// (gemm_5_mma_q8_most.cuh), as their rung calls them.
#pragma once
#include "launch.h"

namespace quantgemm::mma_q8 {

bool serves_many(const GemmArgs& args);
int64_t many_scratch_bytes(const GemmArgs& args);
cudaError_t launch_many(const GemmArgs& args, cudaStream_t stream);

bool serves_most(const GemmArgs& args);
int64_t most_scratch_bytes(const GemmArgs& args);
cudaError_t launch_most(const GemmArgs& args, cudaStream_t stream);

}  // namespace quantgemm::mma_q8

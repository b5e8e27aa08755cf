// SPDX-License-Identifier: MIT
// The int8 tensor-core product for more than 128 tokens (gemm_5_mma_q8_many.cuh), as its rung calls it.
#pragma once
#include "launch.h"

namespace quantgemm::mma_q8 {

bool serves_many(const GemmArgs& args);
int64_t many_scratch_bytes(const GemmArgs& args);
cudaError_t launch_many(const GemmArgs& args, cudaStream_t stream);

}  // namespace quantgemm::mma_q8

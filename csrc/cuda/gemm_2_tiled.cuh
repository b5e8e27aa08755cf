// SPDX-License-Identifier: MIT
// The tiled rung's second kernel, for few tokens, is a file of its own.
#pragma once
#include <cuda_runtime_api.h>

#include "../args.h"

namespace quantgemm {

// Up to here it was faster than tiles of 64 tokens (H200, n = 4096 and 14336, k = 4096).
constexpr int kFewTokens = 32;

cudaError_t launch_gemm_few_tokens(const GemmArgs& args, cudaStream_t stream);

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// The tiled rung's second tile, for few tokens, is a file of its own.
#pragma once
#include <cuda_runtime_api.h>

#include "../args.h"

namespace quantgemm {

constexpr int kFewTokens = 16;
cudaError_t launch_gemm_few_tokens(const GemmArgs& args, cudaStream_t stream);

}  // namespace quantgemm

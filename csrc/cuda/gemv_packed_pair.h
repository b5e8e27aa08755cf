// SPDX-License-Identifier: MIT
#pragma once
#include "launch.h"

namespace quantgemm {

// Both products of the same x, up to eight tokens of float16 or bfloat16, in one launch, where their types
// are a pair of formats/mixed_pairs.h; else cudaErrorNotSupported.
cudaError_t launch_gemv_pair(const GemmPackedArgs& one, const GemmPackedArgs& other, cudaStream_t stream);

}  // namespace quantgemm

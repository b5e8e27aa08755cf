// SPDX-License-Identifier: MIT
// The instances of gemv_packed.cuh: activation type and tokens; 8 serves any number up to it, and experts.
#pragma once
#include "launch.h"

namespace quantgemm::packed_gemv {

cudaError_t launch_f16_1(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_f16_8(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_bf16_1(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_bf16_8(const GemmPackedArgs& args, cudaStream_t stream);

}  // namespace quantgemm::packed_gemv

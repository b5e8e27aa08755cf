// SPDX-License-Identifier: MIT
// The instances of gemm_packed.cuh: activation type and columns of a pass; any m, in passes.
#pragma once
#include "launch.h"

namespace quantgemm {
// y += residual, or y *= silu(gate) if there is up.
cudaError_t launch_finish(const GemmPackedArgs& args, cudaStream_t stream);
}  // namespace quantgemm

namespace quantgemm::packed_gemm {

cudaError_t launch_f32_8(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_f16_16(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_bf16_16(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_f32_32(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_f16_32(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_bf16_32(const GemmPackedArgs& args, cudaStream_t stream);

}  // namespace quantgemm::packed_gemm

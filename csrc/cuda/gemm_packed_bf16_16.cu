// SPDX-License-Identifier: MIT
#include "gemm_packed.cuh"
#include "gemm_packed.h"

namespace quantgemm::packed_gemm {
cudaError_t launch_bf16_16(const GemmPackedArgs& args, cudaStream_t stream) {
  return launch_passes<BFloat16, 2>(args, stream);
}
}  // namespace quantgemm::packed_gemm

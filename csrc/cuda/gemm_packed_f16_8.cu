// SPDX-License-Identifier: MIT
#include "gemm_packed.cuh"
#include "gemm_packed.h"

namespace quantgemm::packed_gemm {
cudaError_t launch_f16_8(const GemmPackedArgs& args, cudaStream_t stream) {
  return launch_passes<Half, 1>(args, stream);
}
}  // namespace quantgemm::packed_gemm

// SPDX-License-Identifier: MIT
#include "gemv_packed.cuh"
#include "gemv_packed.h"

namespace quantgemm::packed_gemv {
cudaError_t launch_bf16_1(const GemmPackedArgs& args, cudaStream_t stream) {
  return launch_tokens<BFloat16, 1>(args, stream);
}
}  // namespace quantgemm::packed_gemv

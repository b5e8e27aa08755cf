// SPDX-License-Identifier: MIT
#include "gemv_packed.cuh"
#include "gemv_packed.h"

namespace quantgemm::packed_gemv {
cudaError_t launch_f16_8(const GemmPackedArgs& args, cudaStream_t stream) {
  return launch_tokens<Half, 8>(args, stream);
}
}  // namespace quantgemm::packed_gemv

// SPDX-License-Identifier: MIT
#include "gemm_packed_few.cuh"

namespace quantgemm::packed_few {
cudaError_t launch_f16_8(const GemmPackedArgs& args, const Device& device, cudaStream_t stream) {
  return launch_type<Half, 8>(args, device, stream);
}
}  // namespace quantgemm::packed_few

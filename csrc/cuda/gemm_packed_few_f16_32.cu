// SPDX-License-Identifier: MIT
#include "gemm_packed_few.cuh"

namespace quantgemm::packed_few {
cudaError_t launch_f16_32(const GemmPackedArgs& args, const Schedule& schedule, const Device& device,
                          cudaStream_t stream) {
  return launch_type<Half, 32>(args, schedule, device, stream);
}
}  // namespace quantgemm::packed_few

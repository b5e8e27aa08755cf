// SPDX-License-Identifier: MIT
#include "gemm_packed_wgmma.cuh"

namespace quantgemm::packed_wgmma {
cudaError_t launch_f16_32(const GemmPackedArgs& args, const Schedule& schedule, const Device& device,
                          cudaStream_t stream) {
  return launch_type<Half, 32>(args, schedule, device, stream);
}
}  // namespace quantgemm::packed_wgmma

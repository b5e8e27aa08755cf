// SPDX-License-Identifier: MIT
#include "gemm_packed_wgmma.cuh"

namespace quantgemm::packed_wgmma {
cudaError_t launch_bf16_256_ragged(const GemmPackedArgs& args, const Schedule& schedule, const Device& device,
                                   cudaStream_t stream) {
  return launch_type<BFloat16, 256, true>(args, schedule, device, stream);
}
}  // namespace quantgemm::packed_wgmma

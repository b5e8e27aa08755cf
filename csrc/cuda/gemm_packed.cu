// SPDX-License-Identifier: MIT
// Packed products by activation type. Kernels: gemm_packed.cuh, instantiated in
// gemm_packed_<type>_<tiles>.cu, which the compiler can build side by side.
#include "gemm_packed.h"

namespace quantgemm {

cudaError_t launch_gemv_packed(const GemmPackedArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case Real::kFloat32: return packed_gemm::launch_f32_8(args, stream);
    case Real::kFloat16: return packed_gemm::launch_f16_8(args, stream);
    case Real::kBFloat16: return packed_gemm::launch_bf16_8(args, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_mma_packed(const GemmPackedArgs& args, cudaStream_t stream) {
  const int64_t tokens = args.routes.ids == nullptr ? args.m : args.routes.tile;
  switch (args.type) {
    case Real::kFloat32: return packed_gemm::launch_f32_32(args, stream);
    case Real::kFloat16:
      return tokens <= 16 ? packed_gemm::launch_f16_16(args, stream)
                          : packed_gemm::launch_f16_32(args, stream);
    case Real::kBFloat16:
      return tokens <= 16 ? packed_gemm::launch_bf16_16(args, stream)
                          : packed_gemm::launch_bf16_32(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace quantgemm

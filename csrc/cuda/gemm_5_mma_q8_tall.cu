// SPDX-License-Identifier: MIT
// Int8 tensor cores by warpgroups: the launch of the tall kernel, and whether it can run.
#include "gemm_5_mma_q8_tall.cuh"

namespace quantgemm::mma_q8 {
namespace {

// Other architectures' code has the kernel too, empty. This tells which code the device runs.
#if defined(__CUDA_ARCH__) && !defined(QG_WGMMA)
constexpr int kProbeThreads = 32;
#else
constexpr int kProbeThreads = 64;
#endif
__global__ void __launch_bounds__(kProbeThreads) wgmma_probe() {}

}  // namespace

bool device_has_wgmma() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, wgmma_probe) == cudaSuccess &&
         attributes.maxThreadsPerBlock == 64;
}

cudaError_t launch_tall_tiles(const GemmArgs& args, const Work& work, int64_t grid, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (Tall<F>) {
      using L = TallLayout<F>;
      const auto kernel = gemm_mma_q8_tall_kernel<F>;
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
      if (status != cudaSuccess) return;
      kernel<<<static_cast<unsigned>(grid), L::kThreads + kCopyThreads, L::kBytes, stream>>>(args, work);
      status = cudaGetLastError();
    }
  });
  return status;
}

}  // namespace quantgemm::mma_q8

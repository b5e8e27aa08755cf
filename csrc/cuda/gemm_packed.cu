// SPDX-License-Identifier: MIT
// Packed products by activation type. Kernels: gemv_packed.cuh and gemm_packed.cuh, instantiated in
// gemv_packed_<type>_<tokens>.cu and gemm_packed_<type>_<columns>.cu, which the compiler can build side by
// side.
#include "gemm_packed.h"

#include "dependent_launch.cuh"
#include "expert_routes.cuh"
#include "gemm_packed_wgmma.h"
#include "gemv_packed.h"

namespace quantgemm {
namespace {

constexpr int kThreads = 256;

// y += residual, or y *= silu(gate). A row of y to blocks of the same blockIdx.y in turn.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ GemmPackedArgs args) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int64_t row = blockIdx.y; row < args.m; row += gridDim.y) {
    if (args.routes.ids != nullptr && expert_of(args.routes, row) < 0) continue;
    for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < args.n; i += int64_t{gridDim.x} * kThreads) {
      const int64_t at = row * args.n + i;
      float y = to_float(static_cast<const T*>(args.y)[at]);
      if (args.up_at != 0) y *= silu(to_float(static_cast<const T*>(args.gate)[at]));
      if (args.residual != nullptr) y += to_float(static_cast<const T*>(args.residual)[at]);
      store1(static_cast<T*>(args.y) + at, y);
    }
  }
}

}  // namespace

cudaError_t launch_finish(const GemmPackedArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>((args.n + 4 * kThreads - 1) / (4 * kThreads)),
                  static_cast<unsigned>(args.m < 16384 ? args.m : 16384));
  const DependentLaunch launch(grid, kThreads, device, stream);
  cudaError_t launched = cudaErrorInvalidValue;
  visit_real(args.type,
             [&]<class T>(T) { launched = cudaLaunchKernelEx(&launch.config, finish_kernel<T>, args); });
  return launched;
}

cudaError_t launch_wgmma_and_finish(const GemmPackedArgs& args, uint8_t* scratch, cudaStream_t stream) {
  GemmPackedArgs product = args;
  product.up_at = 0, product.residual = nullptr;
  cudaError_t status = cudaSuccess;
  if (args.up_at != 0) {
    product.y = args.gate, product.routes.weights = nullptr;
    status = launch_wgmma_packed(product, scratch, stream);
    product.y = args.y, product.packed += args.up_at, product.routes.weights = args.routes.weights;
  }
  if (status == cudaSuccess) status = launch_wgmma_packed(product, scratch, stream);
  const bool finished = args.up_at == 0 && args.residual == nullptr;
  return status != cudaSuccess || finished ? status : launch_finish(args, stream);
}

// Any m, in passes of eight tokens.
cudaError_t launch_gemv_packed(const GemmPackedArgs& args, cudaStream_t stream) {
  if (args.type == Real::kFloat32) return packed_gemm::launch_f32_8(args, stream);
  constexpr int64_t kTokens = 8;
  const bool half = args.type == Real::kFloat16, routed = args.routes.ids != nullptr;
  const auto launch = [&](const GemmPackedArgs& pass) {
    const bool one = pass.m == 1 && !routed;
    const auto gemv = one ? (half ? packed_gemv::launch_f16_1 : packed_gemv::launch_bf16_1)
                          : (half ? packed_gemv::launch_f16_8 : packed_gemv::launch_bf16_8);
    const cudaError_t status = gemv(pass, stream);  // its rings may be too large for small shared memory
    const bool refused = status == cudaErrorNotSupported && pass.norm_weight == nullptr;
    return refused ? launch_mma_packed(pass, stream) : status;
  };
  if (routed) return args.routes.tile <= kTokens ? launch(args) : cudaErrorNotSupported;  // groups are passes
  cudaError_t status = cudaSuccess;
  for (int64_t token = 0; token < args.m && status == cudaSuccess; token += kTokens) {
    const auto at = [&](const void* rows, int64_t cols) {
      return rows == nullptr ? nullptr : static_cast<const uint8_t*>(rows) + 2 * token * cols;
    };
    GemmPackedArgs pass = args;
    pass.m = args.m - token < kTokens ? args.m - token : kTokens;
    pass.x = at(args.x, args.k), pass.residual = at(args.residual, args.n);
    pass.y = static_cast<uint8_t*>(args.y) + 2 * token * args.n;
    status = launch(pass);
  }
  return status;
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

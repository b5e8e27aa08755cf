// SPDX-License-Identifier: MIT
// Launches of the int8 product: x and w are rounded, then multiplied (gemm_packed_int8.cuh).
#include "gemm_packed_int8.cuh"

#include "gemm_packed.h"

namespace quantgemm {
namespace packed_int8 {
namespace {

cudaError_t launch_product(const GemmPackedArgs& args, uint8_t* scratch, const Device& device,
                           cudaStream_t stream) {
  const Int8Layout layout(args.m, args.n, args.k);
  const int64_t token_tiles = (args.m + kInt8Tokens - 1) / kInt8Tokens;
  Schedule s{};
  s.mates = token_tiles > 1 ? 2 : 1;
  const int64_t token_sets = (token_tiles + s.mates - 1) / s.mates;
  const int64_t row_tiles = (args.n + kInt8Rows - 1) / kInt8Rows;
  if (token_sets * row_tiles > 1 << 30) return cudaErrorNotSupported;
  s.token_sets = static_cast<int>(token_sets), s.row_tiles = static_cast<int>(row_tiles);
  s.tiles = s.token_sets * s.row_tiles;
  const int most = device.multiprocessors / s.mates;
  s.clusters = s.tiles < most ? s.tiles : most;
  s.groups = static_cast<int>(layout.groups);
  s.scale_tokens = layout.tokens, s.scale_rows = layout.all_rows;
  CUtensorMap x, w;
  cudaError_t status = describe_tiles(x, {scratch, args.m, layout.cols, layout.cols}, kInt8Tokens);
  if (status == cudaSuccess)
    status = describe_tiles(w, {scratch + layout.weights_at(), layout.rows, layout.cols, layout.cols},
                            kInt8Tokens);
  if (status != cudaSuccess) return status;
  visit_real(args.type, [&]<class T>(T) {
    const auto kernel = int8_kernel<T>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return;
    const DependentLaunch launch(s.clusters * s.mates, kThreads, device, stream, kSharedBytes, s.mates);
    status = cudaLaunchKernelEx(&launch.config, kernel, args, s, x, w,
                                reinterpret_cast<const float*>(scratch + layout.token_scales_at()),
                                reinterpret_cast<const float*>(scratch + layout.row_scales_at()));
  });
  return status;
}

}  // namespace
}  // namespace packed_int8

cudaError_t launch_int8_packed(const GemmPackedArgs& args, uint8_t* scratch, cudaStream_t stream) {
  using namespace packed_int8;
  Device device;
  cudaError_t status = device.read();
  const auto then = [&](auto launch) {
    if (status == cudaSuccess) status = launch();
  };
  GemmPackedArgs product = args;
  product.up_at = 0, product.residual = nullptr;
  then([&] { return launch_round_tokens(args, scratch, device, stream); });
  then([&] { return launch_round_weights(product, scratch, false, device, stream); });
  if (args.up_at != 0) {
    product.y = args.gate;
    then([&] { return launch_product(product, scratch, device, stream); });
    product.y = args.y, product.packed += args.up_at;
    then([&] { return launch_round_weights(product, scratch, true, device, stream); });
  }
  then([&] { return launch_product(product, scratch, device, stream); });
  if (args.up_at != 0 || args.residual != nullptr) then([&] { return launch_finish(args, stream); });
  return status;
}

}  // namespace quantgemm

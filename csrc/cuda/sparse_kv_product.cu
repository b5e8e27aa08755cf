// SPDX-License-Identifier: MIT
// Products with the sparse key-value container: how the work is cut, and the sum over the cuts.
#include "../kv.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {

constexpr int kWarps = 8;  // of a thread block (sparse_kv_product.cuh)

// In sparse_kv_product_*.cu. rows: of a lane.
template <int Bits>
cudaError_t launch_product_of(const KvProductArgs& args, int rows, bool share_rows, cudaStream_t stream);

namespace {

int num_multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Cut {
  int rows;         // of a lane
  bool share_rows;  // the warps of a block divide k instead
};
// A value's rows are its channels, and all of k lies ahead. A key has as many rows as tokens: the more
// of them a lane owns, the less it does per tile, but all multiprocessors should have warps. (With 32
// rows registers spill: 41 instead of 37 us for 8 x 8192 tokens on an H200.)
Cut cut_of(const KvProductArgs& args) {
  if (args.is_value) return {static_cast<int>(args.m / 8), true};
  const int64_t warps = args.heads * divide_up(args.columns, 8) * divide_up(args.m, 8 * 16);
  return {warps >= int64_t{8} * num_multiprocessors() ? 16 : 8, false};
}

// y = Σ partial. One thread per 4 neighbouring values.
template <class Real16>
__global__ void __launch_bounds__(256) add_splits_kernel(KvProductArgs args) {
  const int64_t count = args.heads * args.columns * args.m, i = 4 * (int64_t{blockIdx.x} * 256 + threadIdx.x);
  if (i >= count) return;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int64_t s = 0; s < args.split; ++s) {
    const float4 v = __ldcs(reinterpret_cast<const float4*>(args.partial + s * count + i));
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  auto* y = static_cast<uint16_t*>(args.y) + i;
  *reinterpret_cast<uint2*>(y) =
      make_uint2(pack_pair(sum.x, sum.y, Real16{}), pack_pair(sum.z, sum.w, Real16{}));
}

}  // namespace

int64_t sparse_kv_product_split(const KvProductArgs& args) {
  if (!args.is_value) return 1;
  // Two blocks fit a multiprocessor, and more than fit at once only wait. Each warp should have four steps.
  const int64_t blocks = args.heads * divide_up(args.columns, 8), most = divide_up(args.k, 4 * 16 * kWarps);
  const int64_t wave = blocks > 0 ? int64_t{2} * num_multiprocessors() / blocks : 1;
  const int64_t split = wave < most ? wave : most;
  return split > 1 ? split : 1;
}

cudaError_t launch_sparse_kv_product(const KvProductArgs& args, cudaStream_t stream) {
  const Cut cut = cut_of(args);
  cudaError_t status = cudaErrorInvalidValue;
  if (args.bits == 2) status = launch_product_of<2>(args, cut.rows, cut.share_rows, stream);
  if (args.bits == 4) status = launch_product_of<4>(args, cut.rows, cut.share_rows, stream);
  if (args.bits == kRawBits) status = launch_product_of<kRawBits>(args, cut.rows, cut.share_rows, stream);
  if (status != cudaSuccess || args.split == 1) return status;
  const auto grid = static_cast<unsigned>(divide_up(args.heads * args.columns * args.m, 4 * 256));
  if (args.type == Real::kFloat16)
    add_splits_kernel<Half><<<grid, 256, 0, stream>>>(args);
  else
    add_splits_kernel<BFloat16><<<grid, 256, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace quantgemm

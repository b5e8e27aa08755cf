// SPDX-License-Identifier: MIT
// Rows of activations to int8 with a scale and a sum per 32 values (formats/activation.h).
// Four lanes own a group: each loads 8 neighbouring values, two shuffles give the group's maximum
// and its integer sum, and each lane writes 8 codes. Maxima and integer sums do not depend on the
// order, so the bytes equal the CPU's. Limit: DRAM.
#include "activation_group.cuh"
#include "dependent_launch.cuh"
#include "launch.h"

namespace quantgemm {
namespace {

constexpr int kThreads = 256, kPerThread = 8;
constexpr int kLanesPerGroup = ActivationRow::kGroup / kPerThread;

// grid (tiles of a row, rows), the rows wrapping around in y
template <class In>
__global__ void __launch_bounds__(kThreads) quantize_activations_kernel(ActivationArgs args) {
  let_next_kernel_start();  // a product may start to fetch its weights
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  const bool inside = col < args.num_cols;  // whole groups are inside or outside: shuffles stay full
  for (int64_t r = blockIdx.y; r < args.num_rows; r += gridDim.y) {
    const In* x = static_cast<const In*>(args.x) + r * args.num_cols + col;
    uint8_t* row = args.rows + r * ActivationRow::bytes(args.num_cols);
    float v[kPerThread];
    if (inside) {
      load8(v, x);
    } else {
      for (float& value : v) value = 0;
    }
    const EightActivations eight = quantize_eight(v);
    int sum = eight.sum;
    for (int lane = 1; lane < kLanesPerGroup; lane *= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    if (!inside) continue;
    *reinterpret_cast<uint2*>(row + col) = make_uint2(eight.codes[0], eight.codes[1]);
    const int64_t group = col / ActivationRow::kGroup;
    if (threadIdx.x % kLanesPerGroup == 0) {
      uint8_t* scales = row + ActivationRow::scales_offset(args.num_cols);
      reinterpret_cast<float2*>(scales)[group] = make_float2(eight.scale, activation_sum(eight.scale, sum));
    }
    const int64_t used = args.num_cols / 4 * 5, row_bytes = ActivationRow::bytes(args.num_cols);
    if (col == 0)
      for (int64_t i = used; i < row_bytes; ++i) row[i] = 0;
  }
}

}  // namespace

cudaError_t launch_quantize_activations(const ActivationArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.num_cols == 0) return cudaSuccess;
  constexpr int kTile = kThreads * kPerThread;
  const dim3 grid(static_cast<unsigned>((args.num_cols + kTile - 1) / kTile),
                  static_cast<unsigned>(args.num_rows < 65535 ? args.num_rows : 65535));
  visit_real(args.x_type,
             [&]<class In>(In) { quantize_activations_kernel<In><<<grid, kThreads, 0, stream>>>(args); });
  return cudaGetLastError();
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// Rows of activations to int8 with a scale and a sum per 32 values (formats/activation.h).
// Four lanes own a group: each loads 8 neighbouring values, two shuffles give the group's maximum
// and its integer sum, and each lane writes 8 codes. Maxima and integer sums do not depend on the
// order, so the bytes equal the CPU's. Limit: DRAM, and nearly as much the instructions.
#include "activation_group.cuh"
#include "dependent_launch.cuh"
#include "launch.h"

namespace quantgemm {
namespace {

constexpr int kThreads = 256, kPerThread = 8;
constexpr int kLanesPerGroup = ActivationRow::kGroup / kPerThread;

// grid (tiles of a row, kRows rows each), the rows wrapping around in y
template <class In, int kRows>
__global__ void __launch_bounds__(kThreads) quantize_activations_kernel(ActivationArgs args) {
  let_next_kernel_start();  // a product may start to fetch its weights
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  const int64_t row_bytes = ActivationRow::bytes(args.num_cols), used = args.num_cols / 4 * 5;
  const bool inside = col < args.num_cols;  // whole groups are inside or outside: shuffles stay full
  const int64_t step = int64_t{gridDim.y} * kRows;
  for (int64_t first = int64_t{blockIdx.y} * kRows; first < args.num_rows; first += step) {
    const In* x = static_cast<const In*>(args.x) + first * args.num_cols + col;
    const int count = !inside ? 0 : static_cast<int>(min(args.num_rows - first, int64_t{kRows}));
    float v[kRows][kPerThread] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i)  // all loads first
      if (i < count) load8(v[i], x + i * args.num_cols);
    uint8_t* row = args.rows + first * row_bytes;
#pragma unroll
    for (int i = 0; i < kRows; ++i, row += row_bytes) {
      const EightActivations eight = quantize_eight(v[i]);
      int sum = eight.sum;
      for (int lane = 1; lane < kLanesPerGroup; lane *= 2) sum += __shfl_xor_sync(~0u, sum, lane);
      if (i >= count) continue;
      *reinterpret_cast<uint2*>(row + col) = make_uint2(eight.codes[0], eight.codes[1]);
      if (threadIdx.x % kLanesPerGroup == 0) {
        uint8_t* scales = row + ActivationRow::scales_offset(args.num_cols);
        reinterpret_cast<float2*>(scales)[col / ActivationRow::kGroup] =
            make_float2(eight.scale, activation_sum(eight.scale, sum));
      }
      if (col == 0 && used < row_bytes) *reinterpret_cast<uint2*>(row + used) = make_uint2(0, 0);
    }
  }
}

template <int kRows>
void launch_rows(const ActivationArgs& args, cudaStream_t stream) {
  constexpr int kTile = kThreads * kPerThread;
  const int64_t rows = (args.num_rows + kRows - 1) / kRows;
  const dim3 grid(static_cast<unsigned>((args.num_cols + kTile - 1) / kTile),
                  static_cast<unsigned>(rows < 65535 ? rows : 65535));
  visit_real(args.x_type, [&]<class In>(In) {
    quantize_activations_kernel<In, kRows><<<grid, kThreads, 0, stream>>>(args);
  });
}

}  // namespace

cudaError_t launch_quantize_activations(const ActivationArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.num_cols == 0) return cudaSuccess;
  // Where there is work for the whole device several times over, several loads of a thread are under way.
  if (args.num_rows * args.num_cols >= int64_t{4} << 20)
    launch_rows<2>(args, stream);
  else
    launch_rows<1>(args, stream);
  return cudaGetLastError();
}

}  // namespace quantgemm

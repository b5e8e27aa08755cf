// SPDX-License-Identifier: MIT
// How a packed product of few tokens divides its work. Kernels: gemm_packed_few.cuh, instantiated in
// gemm_packed_few_<type>_<tokens>.cu.
#include "gemm_packed_few.h"

#include "../formats/packed.h"

namespace quantgemm {
namespace {

using packed_few::Schedule;

// Clusters of so many blocks that fit on the device at once, one block a multiprocessor (an H200 has room for
// 66 of two, 33 of three, 30 of four).
int clusters_at_once(int multiprocessors, int parts) {
  return parts < 4 ? multiprocessors / parts : multiprocessors * 10 / (11 * parts);
}

// Does not depend on the tokens.
Schedule schedule_of(const GemmPackedArgs& args, int multiprocessors) {
  Schedule best{};
  double least = 1e300;
  const bool gated = args.up_at != 0;
  for (const int row_groups : {2, 1})
    for (const int parts : {1, 2, 3, 4}) {
      if (gated && row_groups == 1) continue;
      Schedule s{};
      s.row_groups = row_groups, s.parts = parts, s.gated = gated;
      const int64_t rows = int64_t{packed_few::kGroupRows} * (gated ? 1 : row_groups);
      const int64_t tiles = (args.n + rows - 1) / rows;
      s.steps = static_cast<int>(padded_cols(args.k) / kTileCols);
      const int most = clusters_at_once(multiprocessors, parts);
      if (most == 0 || (parts > 1 && (tiles > most || s.steps < 8 * parts))) continue;
      const int64_t turns = (tiles + most - 1) / most;
      // Clocks, of 64 columns of 64 rows, of a tile's end, of parts that meet.
      const double clocks =
          static_cast<double>(turns) * (135.0 * row_groups * ((s.steps + parts - 1) / parts) + 1000) +
          (parts > 1 ? 1000 + 300 * parts : 0);
      if (clocks >= least) continue;
      least = clocks;
      s.tiles = static_cast<int>(tiles);
      s.clusters = s.tiles < most ? s.tiles : most;
      best = s;
    }
  return best;
}

}  // namespace

cudaError_t launch_few_packed(const GemmPackedArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t status = device.read();
  const Schedule schedule = schedule_of(args, device.multiprocessors);
  const bool half = args.type == Real::kFloat16;
  constexpr int64_t kMost = 32;
  for (int64_t token = 0; token < args.m && status == cudaSuccess; token += kMost) {
    const auto at = [&](const void* rows, int64_t cols) {
      return rows == nullptr ? nullptr : static_cast<const uint8_t*>(rows) + 2 * token * cols;
    };
    GemmPackedArgs pass = args;
    pass.m = args.m - token < kMost ? args.m - token : kMost;
    pass.x = at(args.x, args.k), pass.residual = at(args.residual, args.n);
    pass.y = static_cast<uint8_t*>(args.y) + 2 * token * args.n;
    using namespace packed_few;
    const auto launch =
        pass.m <= 16 ? (half ? launch_f16_16 : launch_bf16_16) : (half ? launch_f16_32 : launch_bf16_32);
    status = launch(pass, schedule, device, stream);
  }
  return status;
}

}  // namespace quantgemm

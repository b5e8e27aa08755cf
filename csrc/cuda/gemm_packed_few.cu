// SPDX-License-Identifier: MIT
// How a packed product of few tokens divides its work. Kernels: gemm_packed_few.cuh, instantiated in
// gemm_packed_few_<type>_<tokens>.cu.
#include "gemm_packed_few.h"

#include <algorithm>

#include "../formats/packed.h"

namespace quantgemm {
namespace packed_few {
namespace {

// Clusters of 2^log_parts blocks that fit on the device at once, one block a multiprocessor (an H200 has room
// for 66 of two, 30 of four).
int clusters_at_once(int multiprocessors, int log_parts) {
  return log_parts < 2 ? multiprocessors >> log_parts : multiprocessors * 10 / 44;
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What shared memory holds; false: there is too little.
bool fit(Schedule& s, const Sizes& sizes, int tokens, int limit) {
  // At least what is on its way from memory at a time, else four entries, and not much: activations wait
  // behind all of it.
  constexpr int kUsualRing = 4, kMostRing = 16, kLeast = 36 * 1024, kMost = 76 * 1024;
  const int parts = 1 << s.log_parts, slots = ceil_div(s.most_strips >> s.gated, parts);
  s.received = (slots << s.gated) * (parts - 1);
  const int others =
      tokens * (sizes.x_pitch + (s.most_strips + s.received) * kTokenBytes) + kBlockBarriers + 8 * slots;
  const int entry = sizes.entry_bytes + kEntryBarriers, room = (limit - others) / entry;
  const int used = sizes.entry_bytes * s.run / kRunUnits;
  const int wanted = std::max(ceil_div(kLeast, used), std::min(kUsualRing, ceil_div(kMost, used)));
  s.ring = std::min({room, kMostRing, wanted});
  s.bytes = s.ring * entry + others;
  return s.ring >= 2;
}

// An estimate. A panel's entries take what reading them takes, 17 bytes a clock, or multiplying them; its
// activations come while those of the panel before are multiplied.
double clocks_of(const Schedule& s, const Sizes& sizes) {
  const double read = sizes.entry_bytes / 17.0 * s.run / kRunUnits,
               product = (s.phases > 1 ? 303.0 / s.phases : 275.0) * sizes.unit_tiles;
  const double entries = s.most_strips * (read > product ? read : product);
  const double x = 600 + 1.8 * s.run * sizes.unit_tiles * kTileCols, shared = x / 2;
  const double wait = x - entries > shared ? x - entries : shared;
  return x + entries + (s.panels - 1) * (entries + wait) + 3000 +
         (s.log_parts > 0 ? 600 + (200 << s.log_parts) : 0);
}

}  // namespace

Schedule schedule_of(const GemmPackedArgs& args, const Device& device, const Sizes& sizes, int tokens) {
  constexpr int kMostStrips = 64, kPlannedTokens = 16;
  Schedule best{};
  double least = 1e300;
  const int strips = static_cast<int>((args.n + kStripRows - 1) / kStripRows);
  const int limit = device.shared_per_block - kReservedShared;
  for (const int log_parts : {0, 1, 2}) {
    Schedule s{};
    s.log_parts = log_parts, s.gated = args.up_at != 0;
    s.tiles = static_cast<int>(padded_cols(args.k) / kTileCols);
    s.units = ceil_div(s.tiles, sizes.unit_tiles);
    const int at_once = clusters_at_once(device.multiprocessors, log_parts);
    if (at_once == 0 || (log_parts > 0 && s.units < 2 << log_parts)) continue;
    s.clusters = strips < at_once ? strips : at_once;
    int turns = 1;
    for (; ceil_div(strips, s.clusters) << s.gated > kMostStrips; ++turns) s.clusters += at_once;
    s.each = strips / s.clusters, s.more = strips % s.clusters;
    s.most_strips = (s.each + (s.more > 0)) << s.gated;
    const int units = ceil_div(s.units, 1 << log_parts);
    s.panels = ceil_div(units, kRunUnits), s.run = ceil_div(units, s.panels), s.phases = kRunUnits / s.run;
    if (!fit(s, sizes, kPlannedTokens, limit)) continue;
    const double clocks = turns * clocks_of(s, sizes);
    if (clocks >= least) continue;
    least = clocks;
    best = s;
  }
  if (best.clusters > 0) fit(best, sizes, tokens, limit);  // fewer tokens, more room
  return best;
}

}  // namespace packed_few

cudaError_t launch_few_packed(const GemmPackedArgs& args, cudaStream_t stream) {
  using namespace packed_few;
  Device device;
  cudaError_t status = device.read();
  const bool half = args.type == Real::kFloat16;
  constexpr int64_t kMost = 16;
  for (int64_t token = 0; token < args.m && status == cudaSuccess; token += kMost) {
    const auto at = [&](const void* rows, int64_t cols) {
      return rows == nullptr ? nullptr : static_cast<const uint8_t*>(rows) + 2 * token * cols;
    };
    GemmPackedArgs pass = args;
    pass.m = args.m - token < kMost ? args.m - token : kMost;
    pass.x = at(args.x, args.k), pass.residual = at(args.residual, args.n);
    pass.y = static_cast<uint8_t*>(args.y) + 2 * token * args.n;
    const auto launch =
        pass.m <= 8 ? (half ? launch_f16_8 : launch_bf16_8) : (half ? launch_f16_16 : launch_bf16_16);
    status = launch(pass, device, stream);
  }
  return status;
}

}  // namespace quantgemm

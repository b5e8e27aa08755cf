// SPDX-License-Identifier: MIT
// Which tiles a packed product on wgmma has: tokens of a tile, blocks of a cluster. Kernels:
// gemm_packed_wgmma.cuh, instantiated in gemm_packed_wgmma_<type>_<tokens>.cu; those for ragged tiles
// multiply half a tile where no more is there, and are up to 6 % slower with whole ones.
#include "gemm_packed_wgmma.h"

#include "../formats/packed.h"

namespace quantgemm {
namespace {

using packed_wgmma::Schedule;

struct Choice {
  int tokens = 0;
  Schedule schedule{};
  double clocks = 1e300;
};

// Clusters of so many blocks that fit on the device at once, one block a multiprocessor: 30 of four and 15 of
// eight on an H200's 132, whose parts have 16 or 18 each, and of three at least 32.
int clusters_at_once(int multiprocessors, int ranks) {
  if (ranks == 3) return multiprocessors / 4;
  return ranks < 3 ? multiprocessors / ranks : multiprocessors * 10 / (11 * ranks);
}

// Measured on an H200, as those below: clocks of a tile that is cut, and of so many tokens' sums there and
// back, by their square; the wait for these where pieces of a tile may end at the same time. What pays by
// less than 3 % has lost as often.
constexpr double kCutClocks = 500, kCutTokensClocks = 0.21, kCutWaitClocks = 4000, kCutMargin = 1.03;

void consider(Choice& best, const GemmPackedArgs& args, int multiprocessors, int tokens, int mates, int parts,
              bool cut = false) {
  using namespace packed_wgmma;
  Schedule s{};
  s.mates = mates, s.parts = parts;
  s.row_sets = static_cast<int>((args.n + kRows * mates - 1) / (kRows * mates));
  s.token_tiles = static_cast<int>((args.m + tokens - 1) / tokens);
  const int64_t tiles = int64_t{s.row_sets} * s.token_tiles;
  s.steps = static_cast<int>(padded_cols(args.k) / kTileCols);
  const int most = clusters_at_once(multiprocessors, s.ranks());
  if (tiles > 1 << 30 || most == 0 || s.ranks() == 6 ||  // few clusters of six would fit
      (parts > 1 && (tiles > most || s.steps < 8 * parts)))
    return;
  s.tiles = static_cast<int>(tiles);
  s.clusters = s.tiles < most ? s.tiles : most;
  int turns = (s.tiles + s.clusters - 1) / s.clusters;
  int units = (s.units() + parts - 1) / parts * turns;
  double more = 300 * (mates - 1) + 2600 * (parts - 1);
  if (cut) {  // the last turn, and the one before it, if there is one
    const int whole = s.tiles < most ? 0 : s.tiles / most - 1;
    s.cut_tiles = s.tiles - whole * most;
    const int64_t all = int64_t{s.cut_tiles} * s.units();
    if (s.tiles % most == 0 || all > 1 << 30) return;
    if (tokens == 256 && s.tiles < most) return;  // parts were faster
    s.range = static_cast<int>(all < 2 * most ? 2 : (all + most - 1) / most);
    s.clusters = whole > 0 ? most : static_cast<int>((all + s.range - 1) / s.range);
    turns = whole + (s.range + s.units() - 1) / s.units();
    units = whole * s.units() + s.range;
    more += kCutClocks + kCutTokensClocks * tokens * tokens + (s.range < s.units() ? kCutWaitClocks : 0);
  }
  // Measured on an H200: clocks of a step, of a tile's end, of parts that meet; bytes come from the L2 at 28
  // a clock.
  const double work = 420 + 2.6 * tokens, copies = (128.0 * tokens / mates + 4608) / 28;
  double clocks = (work > copies ? work : copies) * kUnitSteps * units + turns * (600 + 4 * tokens) + more;
  if (cut) clocks *= kCutMargin;
  if (clocks < best.clocks) best = {tokens, s, clocks};
}

Choice choose(const GemmPackedArgs& args, int multiprocessors, bool may_cut) {
  Choice best;
  if (args.routes.groups != nullptr) {  // a group is a tile; how many there are the device knows
    GemmPackedArgs most = args;
    most.m = args.routes.most_groups * args.routes.tile;
    for (const int mates : {2, 1}) consider(best, most, multiprocessors, args.routes.tile, mates, 1);
    return best;
  }
  for (const int tokens : {256, 128, 64, 32}) {
    if (tokens == 32 && args.m > 32) continue;  // two of 32 are slower than one of 64
    for (const int mates : {2, 1}) {
      for (const int parts : {1, 2, 3, 4}) consider(best, args, multiprocessors, tokens, mates, parts);
      if (may_cut) consider(best, args, multiprocessors, tokens, mates, 1, true);
    }
  }
  return best;
}

}  // namespace

int64_t wgmma_scratch_bytes(const GemmPackedArgs& args) {
  Device device;
  if (device.read() != cudaSuccess) return 0;  // the launch will say so
  const Choice best = choose(args, device.multiprocessors, true);
  return packed_wgmma::scratch_bytes(best.schedule, best.tokens);
}

cudaError_t launch_wgmma_packed(const GemmPackedArgs& args, uint8_t* scratch, cudaStream_t stream) {
  Device device;
  const cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  Choice best = choose(args, device.multiprocessors, scratch != nullptr);
  best.schedule.scratch = scratch;
  using namespace packed_wgmma;
  const bool half = args.type == Real::kFloat16;
  const int64_t over = args.m % 256;  // of the last tile
  // One ragged tile behind four whole ones or more would not pay for these being up to 6 % slower.
  const bool ragged = args.routes.groups != nullptr || (args.m <= 1024 && over > 0 && over <= 128);
  const auto launch = [&] {
    switch (best.tokens) {
      case 32: return half ? launch_f16_32 : launch_bf16_32;
      case 64: return half ? launch_f16_64 : launch_bf16_64;
      case 128: return half ? launch_f16_128 : launch_bf16_128;
    }
    if (ragged) return half ? launch_f16_256_ragged : launch_bf16_256_ragged;
    return half ? launch_f16_256 : launch_bf16_256;
  }();
  return best.tokens == 0 ? cudaErrorNotSupported : launch(args, best.schedule, device, stream);
}

}  // namespace quantgemm

// SPDX-License-Identifier: MIT
// Int8 tensor cores for a thousand tokens and more: which problems, and their two launches.
#include "gemm_5_mma_q8_many.h"
#include "gemm_5_mma_q8_most_fragments.cuh"

namespace quantgemm::mma_q8 {
namespace {

// Calls f for a format whose groups are whole products; the others have twice the scales.
template <class Fn>
void visit_most(const GemmArgs& args, Fn&& f) {
  BlockFormats::visit(args.qtype, [&]<class F>(F format) {
    if constexpr (F::kElems % 32 == 0 && F::kGroup % 32 == 0) f(format);
  });
}

// Warps without tokens leave the last token tile to the others, which are faster then, but not as much: as if
// two more of the six had tokens, of eight.
template <class L>
TileSchedule most_schedule(const GemmArgs& args) {
  const int64_t token_tiles = (args.m + L::kTokens - 1) / L::kTokens;
  const int64_t chunks = (args.k + L::kChunk - 1) / L::kChunk, warp_tokens = L::kTokens / L::kWarpsM;
  const int64_t busy = (args.m - (token_tiles - 1) * L::kTokens + warp_tokens - 1) / warp_tokens;
  const int64_t last_units = (chunks * (busy + 2) + L::kWarpsM + 1) / (L::kWarpsM + 2);
  return schedule_tiles((args.n + L::kRows - 1) / L::kRows, token_tiles, chunks,
                        current_device().multiprocessors, true, last_units);
}

// Scratch memory: what cut tiles want, then the fragments.
template <class L>
int64_t tile_bytes(const TileSchedule& schedule) {
  return (PartialTiles::bytes(schedule, L::kElems) + 127) / 128 * 128;
}

template <class F>
cudaError_t launch_format(const GemmArgs& args, cudaStream_t stream) {
  using L = MostTokens<F::kOffset>;
  const auto kernel = gemm_mma_q8_most_kernel<F::kOffset>;
  const TileSchedule schedule = most_schedule<L>(args);
  uint8_t* const fragments = static_cast<uint8_t*>(args.scratch) + tile_bytes<L>(schedule);
  const int64_t row_bytes = args.k / F::kElems * F::kBytes;
  MmaProblem problem{args.activations, fragments, args.y, {},        schedule,
                     args.m,           args.n,    args.k, row_bytes, args.type};
  if (schedule.cut) problem.partial = PartialTiles::at(args.scratch, schedule);
  CUtensorMap codes;
  cudaError_t status =
      describe_tiles(codes, {args.activations, args.m, args.k, ActivationRow::bytes(args.k)}, L::kTokens);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (status != cudaSuccess) return status;
  const Device device = current_device();
  using C = FragmentChunk<F>;
  const dim3 grid(static_cast<unsigned>((args.k + C::kElems - 1) / C::kElems),
                  schedule.tiles / schedule.token_tiles);
  const DependentLaunch before(grid, 32 * C::kWarps, device, stream);
  status = cudaLaunchKernelEx(&before.config, mma_q8_fragments_kernel<F>,
                              FragmentArgs{args.w, fragments, args.n, args.k, row_bytes,
                                           problem.partial.arrivals, schedule.cut ? schedule.tiles : 0});
  if (status != cudaSuccess) return status;
  const DependentLaunch launch(schedule.blocks, L::kThreads, device, stream, L::kBytes);
  return cudaLaunchKernelEx(&launch.config, kernel, problem, codes);
}

}  // namespace

// As serves_many(), and where the product takes so long that making fragments is soon regained.
bool serves_most(const GemmArgs& args) {
  const double products =
      static_cast<double>(args.m) * static_cast<double>(args.n) * static_cast<double>(args.k);
  if (args.m < 1024 || products < 0x1p34 || args.k >= int64_t{1} << 23) return false;
  if (args.n > int64_t{65535} * 128) return false;  // rows of tiles in a grid
  const Device device = current_device();
  bool serves = false;
  visit_most(args, [&]<class F>(F) {
    using L = MostTokens<F::kOffset>;
    const int64_t padded = (args.m + L::kTokens - 1) / L::kTokens * L::kTokens;
    if (device.major != 9 || L::kBytes > device.shared_per_block || 20 * padded > 23 * args.m) return;
    if (L::weight_bytes(args.n, args.k) > int64_t{1} << 29) return;  // so much scratch memory is too much
    static const bool built = [] {
      cudaFuncAttributes attributes{};
      const cudaError_t status = cudaFuncGetAttributes(&attributes, gemm_mma_q8_most_kernel<F::kOffset>);
      return status == cudaSuccess && attributes.ptxVersion >= 90;
    }();
    serves = built;
  });
  return serves;
}

int64_t most_scratch_bytes(const GemmArgs& args) {
  int64_t bytes = 0;
  visit_most(args, [&]<class F>(F) {
    using L = MostTokens<F::kOffset>;
    bytes = tile_bytes<L>(most_schedule<L>(args)) + L::weight_bytes(args.n, args.k);
  });
  return bytes;
}

cudaError_t launch_most(const GemmArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  visit_most(args, [&]<class F>(F) { status = launch_format<F>(args, stream); });
  return status;
}

}  // namespace quantgemm::mma_q8

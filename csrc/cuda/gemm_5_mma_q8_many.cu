// SPDX-License-Identifier: MIT
// Int8 tensor cores for more than 128 tokens: which problems, and their launch.
#include "gemm_5_mma_q8_many.cuh"

#include "device.h"
#include "gemm_5_mma_q8_many.h"

namespace quantgemm::mma_q8 {
namespace {

// Calls f for a format whose groups are whole products; the others have twice the scales.
template <class Fn>
void visit_many(const GemmArgs& args, Fn&& f) {
  BlockFormats::visit(args.qtype, [&]<class F>(F format) {
    if constexpr (F::kElems % 32 == 0 && F::kGroup % 32 == 0) f(format);
  });
}

template <class F>
TileSchedule many_schedule(const GemmArgs& args) {
  using L = ManyTokens<F>;
  return schedule_tiles((args.n + L::kRows - 1) / L::kRows, (args.m + L::kTokens - 1) / L::kTokens,
                        (args.k + L::kChunk - 1) / L::kChunk, current_device().multiprocessors, true);
}

}  // namespace

// Compute capability 9.0 only, whose warps can pass registers on; and where little of a tile is empty. The
// machine code may have been made from an older device's PTX, without the copy engine.
bool serves_many(const GemmArgs& args) {
  if (args.m <= 128 || args.k >= int64_t{1} << 23) return false;
  const Device device = current_device();
  bool serves = false;
  visit_many(args, [&]<class F>(F) {
    using L = ManyTokens<F>;
    const int64_t padded = (args.m + L::kTokens - 1) / L::kTokens * L::kTokens;
    if (device.major != 9 || L::kBytes > device.shared_per_block || 20 * padded > 23 * args.m) return;
    static const bool built = [] {
      cudaFuncAttributes attributes{};
      const cudaError_t status = cudaFuncGetAttributes(&attributes, gemm_mma_q8_many_kernel<F>);
      return status == cudaSuccess && attributes.ptxVersion >= 90;
    }();
    serves = built;
  });
  return serves;
}

int64_t many_scratch_bytes(const GemmArgs& args) {
  int64_t bytes = 0;
  visit_many(args,
             [&]<class F>(F) { bytes = PartialTiles::bytes(many_schedule<F>(args), ManyTokens<F>::kElems); });
  return bytes;
}

cudaError_t launch_many(const GemmArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  visit_many(args, [&]<class F>(F) {
    using L = ManyTokens<F>;
    CUtensorMap codes;
    status =
        describe_tiles(codes, {args.activations, args.m, args.k, ActivationRow::bytes(args.k)}, L::kTokens);
    if (status != cudaSuccess) return;
    GemmArgs rounded = args;
    rounded.x = args.activations;
    status = quantgemm::launch_tiles(gemm_mma_q8_many_kernel<F>, L::kThreads, L::kBytes, rounded,
                                     args.k / F::kElems * F::kBytes, many_schedule<F>(args), stream, codes);
  });
  return status;
}

}  // namespace quantgemm::mma_q8
